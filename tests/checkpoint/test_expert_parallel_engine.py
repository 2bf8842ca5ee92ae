"""transformers' expert parallelism loads the permuted checkpoint as the plan says.

Four gloo ranks, each with a batch of its own, exchange tokens by all-to-all. Logits are
those of the original, each rank holds the experts that the plan gives it, and sends to each
rank as many (token, expert) pairs as the original's routing and the plan predict.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from placer.checkpoint.export import export_checkpoint
from placer.model import Architecture, ModelSpec
from placer.placement import Placement
from placer.run.documents import read_json
from placer.trace.capture import RouterCapture
from tests.families import build, legal_rows, randomise

NUM_RANKS = 4
# Router groups; experts and their biases fused; one tensor per expert.
MODEL_TYPES = ("deepseek_v3", "gpt_oss", "qwen3_moe")
# FSDP gives every rank its own batch; it does not run in inference mode.
ENGINE = """
import sys

import torch
from transformers import AutoModelForCausalLM, DistributedConfig
from transformers.distributed.expert_parallel import AllToAllEP

sent = []
dispatch = AllToAllEP._dispatch_tokens


def watched(self, *args):
    result = dispatch(self, *args)
    sent.append(result[-1].send_sizes)
    return result


AllToAllEP._dispatch_tokens = watched
config = DistributedConfig(fsdp_size=4, ep_size=4, ep_implementation="all_to_all")
for folder in sys.argv[1:]:
    sent.clear()
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=config, dtype=torch.float32
    ).eval()
    rank = torch.distributed.get_rank()
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(rank))
    experts = [
        parameter.to_local().clone()
        for name, parameter in model.named_parameters()
        if name.endswith("experts.down_proj")
    ]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    found = {"logits": logits, "sent": torch.tensor(sent), "experts": experts}
    torch.save(found, f"{folder}.{rank}")
# Threads of gloo that are still there when Python ends abort the process, now and then.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def batch(rank: int) -> torch.Tensor:
    return torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(rank))


def run(tmp_path: Path, folders: list[Path]) -> None:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node", str(NUM_RANKS), str(script), *map(str, folders)]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="transformers loads across ranks with accelerate only: pip install accelerate",
)
def test_every_rank_has_the_plans_experts_and_computes_the_same(
    write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    placements = {}
    for model_type in MODEL_TYPES:
        model = tmp_path / model_type
        randomise(build(model_type)).save_pretrained(model)
        spec = ModelSpec.from_checkpoint(model)
        placements[model_type] = Placement.from_json(
            legal_rows(spec, seed=5), spec.num_experts, num_ranks=NUM_RANKS, num_nodes=1
        )
        plan = write_plan(spec, placements[model_type])
        export_checkpoint(plan, model, tmp_path / f"{model_type}-permuted")
    run(tmp_path, [tmp_path / f"{model_type}-permuted" for model_type in MODEL_TYPES])
    for model_type, placement in placements.items():
        check(tmp_path / model_type, placement)


def check(folder: Path, placement: Placement) -> None:
    """Compare all ranks with the original, which runs in one process."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    experts = [
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith("experts.down_proj")
    ]
    architecture = Architecture.of(read_json(folder / "config.json", "config"), folder)
    spec = ModelSpec.from_checkpoint(folder)
    for rank in range(NUM_RANKS):
        found = torch.load(f"{folder}-permuted.{rank}", weights_only=True)
        with RouterCapture(model, architecture, spec) as capture, torch.no_grad():
            logits = model(input_ids=batch(rank)).logits
            routed = capture.take()
        assert (found["logits"] - logits).abs().max() <= 1e-5 * logits.abs().max()
        for layer, output in enumerate(routed):
            slots = placement.physical_to_logical_map[layer].reshape(NUM_RANKS, -1)
            assert torch.equal(found["experts"][layer], experts[layer][slots[rank]])
            ids = output.ids.reshape(-1).tolist()
            pairs = [sum(e in row for e in ids) for row in slots.tolist()]
            assert found["sent"][layer].tolist() == pairs
