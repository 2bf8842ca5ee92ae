"""transformers itself serves a model through placer's exchanges, by their names."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from placer.model import ModelSpec
from placer.placement import Placement
from placer.table import build_table
from placer.trace import Chunk
from tests.families import build, randomise

NUM_RANKS = 4
# Ranks with batches of their own (FSDP); ranks that share one (tensor parallelism).
ENGINE = """
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DistributedConfig

from placer.replay.exchanges import register
from placer.replay.token_shuffle import TokenShuffle
from placer.table.table import Table

folder = sys.argv[1]
shuffle = TokenShuffle(Table.read(Path(folder, "table")))
register(ranks_per_node=2, shuffle=shuffle)
own, shared = {"fsdp_size": 4}, {"tp_size": 4}
for name, layout in (
    ("placer-dedup", own),
    ("placer-per-node", own),
    ("placer-dedup", shared),
    ("placer-shuffle", shared),
):
    config = DistributedConfig(**layout, ep_size=4, ep_implementation=name)
    model = AutoModelForCausalLM.from_pretrained(
        f"{folder}/model", distributed_config=config, dtype=torch.float32
    ).eval()
    rank = torch.distributed.get_rank()
    shuffle.watch(model)
    seed = rank if layout is own else 0
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    if hasattr(logits, "full_tensor"):
        logits = logits.full_tensor()
    torch.save(logits, f"{folder}/{name}-{next(iter(layout))}.{rank}")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="transformers loads across ranks with accelerate only: pip install accelerate",
)
def test_transformers_computes_the_same_through_every_exchange(tmp_path: Path) -> None:
    randomise(build("qwen3_moe", num_key_value_heads=4)).save_pretrained(tmp_path / "model")
    spec = ModelSpec.from_checkpoint(tmp_path / "model")
    write_table(tmp_path / "table", spec)
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    done = subprocess.run(
        [sys.executable, *words, script, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name in ("placer-dedup-fsdp_size", "placer-per-node-fsdp_size"):
        for rank in range(NUM_RANKS):
            compare(model.eval(), tmp_path / f"{name}.{rank}", seed=rank)
    for name in ("placer-dedup-tp_size", "placer-shuffle-tp_size"):
        for rank in range(NUM_RANKS):
            compare(model.eval(), tmp_path / f"{name}.{rank}", seed=0)


def write_table(path: Path, spec: ModelSpec) -> None:
    """Write a table of random routing: any table must leave the outputs alone."""
    rng = np.random.default_rng(0)
    rows = [np.argsort(rng.random((200, size)))[:, :2] for size in spec.num_experts]
    chunk = Chunk(
        experts=tuple(ids.astype(np.uint8) for ids in rows),
        token_ids=rng.integers(3, 60, 200).astype(np.int32),
        sequence_ids=np.repeat(np.arange(20, dtype=np.int32), 10),
        positions=np.tile(np.arange(10, dtype=np.int32), 20),
    )
    slots = [list(range(size)) for size in spec.num_experts]
    placement = Placement.from_json(slots, spec.num_experts, num_ranks=4, num_nodes=1)
    build_table(placement, chunk, vocab_size=64, with_combined=True).write(path)


def compare(model: torch.nn.Module, found: Path, *, seed: int) -> None:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    logits = torch.load(found, weights_only=True)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
