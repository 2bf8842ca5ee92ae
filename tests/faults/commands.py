"""Every command that writes, on small real inputs."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from placer.cli.main import main
from placer.model import ModelSpec
from placer.placement import Placement
from tests.plans import unsolved_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command: its words but the output, and what the output is.

    Attributes
    ----------
    resumable
        A run that was ended leaves its finished parts, and the same command goes on.
    replaceable
        placer knows what it wrote there before, so --force replaces it.
    """

    words: str
    option: str = "--out"
    suffix: str = ""
    directory: bool = False
    resumable: bool = False
    replaceable: bool = True

    def line(self, inputs: Path, out: Path, *more: str) -> list[str]:
        """Return the command line; words in capitals are files of ``inputs``."""
        words = [
            str(inputs / word.lower().replace("_", ".")) if word.isupper() else word
            for word in self.words.split()
        ]
        return [*words, self.option, str(out), *more]


_SOLVE = "--gpus-per-node 4 --max-imbalance 4 --num-rounds 0 --proof none"
_RECORD = "record MODEL --corpus TEXT --sequence-length 24 --batch-size 2 --chunk-tokens 48"
#: Those that load torch come last: a process that holds more takes longer to fork.
COMMANDS = {
    "import csv": Command(words="import csv ROWS_CSV", directory=True),
    "import npz": Command(words="import npz ARCHIVE_NPZ", directory=True),
    "import csv-loads": Command(words="import csv-loads LOADS_CSV --model MODEL"),
    "import sglang-map": Command(
        words="import sglang-map MAP_JSON --model MODEL --gpus-per-node 4", suffix=".json"
    ),
    "affinity": Command(words="affinity TRACE --workers 1"),
    "affinity --rows": Command(words="affinity TRACE --rows sequences --workers 1"),
    "affinity --merge": Command(words="affinity COUNTS OTHER_COUNTS --merge"),
    "solve": Command(words=f"solve TRACE {_SOLVE} --fold 0/2", suffix=".json"),
    "solve counts": Command(words=f"solve COUNTS {_SOLVE}", suffix=".json"),
    "solve --frontier": Command(
        words=f"solve TRACE {_SOLVE} --frontier 3,4".replace("--max-imbalance 4 ", ""),
        directory=True,
    ),
    "tables": Command(words="tables PLAN_JSON TRACE --embeddings MODEL"),
    "trace split": Command(words="trace split TRACE --fold 0/2", directory=True),
    "trace sample": Command(words="trace sample TRACE --sequences 2", directory=True),
    "trace merge": Command(words="trace merge TRACE OTHER", directory=True),
    "trace dedup": Command(words="trace dedup TRACE", directory=True),
    "export checkpoint": Command(
        words="export checkpoint PLAN_JSON MODEL", directory=True, resumable=True
    ),
    "export checkpoint --link": Command(
        words="export checkpoint PLAN_JSON MODEL --link --hash",
        directory=True,
        resumable=True,
    ),
    "export --inverse": Command(
        words="export checkpoint EXPORTED --inverse",
        directory=True,
        resumable=True,
        replaceable=False,
    ),
    "export ranks": Command(
        words="export ranks PAIR_JSON MODEL", directory=True, resumable=True
    ),
    "export sglang": Command(words="export sglang PLAN_JSON MODEL", suffix=".json"),
    "export trtllm": Command(words="export trtllm PLAN_JSON MODEL", suffix=".yaml"),
    "export vllm-ascend": Command(
        words="export vllm-ascend PLAN_JSON MODEL", suffix=".json"
    ),
    "export eplb": Command(words="export eplb PLAN_JSON MODEL", suffix=".safetensors"),
    "export eplb .npz": Command(words="export eplb PLAN_JSON MODEL", suffix=".npz"),
    "export csv": Command(words="export csv PLAN_JSON", suffix=".csv"),
    "inspect": Command(words="inspect PLAN_JSON TRACE", option="--html"),
    "export deepspeed": Command(words="export deepspeed SMALL_JSON SAVED", directory=True),
    "export sglang .pt": Command(words="export sglang PLAN_JSON MODEL", suffix=".pt"),
    "export ktransformers": Command(
        words="export ktransformers COUNTS MODEL", suffix=".pt"
    ),
    "record": Command(words=_RECORD, directory=True, resumable=True),
    "record --generate": Command(
        words=f"{_RECORD} --max-tokens 100 --generate 3", directory=True, resumable=True
    ),
}


ALL = os.environ.get("PLACER_FAULTS") == "all"


def run(*words: object) -> None:
    """Run a command that must succeed, in this process."""
    try:
        main([str(word) for word in words])
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"exit {ended.code}: {words}") from ended


def make_inputs(model: Path, inputs: Path) -> None:
    """Write what the commands read: of a model of 2 MoE layers of 8 experts."""
    shutil.copytree(model, inputs / "model")
    (inputs / "text").mkdir()
    (inputs / "text" / "text.txt").write_text("one two three four five six seven\n" * 8)
    rng = np.random.default_rng(0)
    rows = [
        f"{s},{p},{layer},{rng.integers(4)},{4 + rng.integers(4)}"
        for s in range(6)
        for p in range(8)
        for layer in range(2)
    ]
    header = "sequence_id,position,layer,e0,e1"
    (inputs / "rows.csv").write_text("\n".join([header, *rows]) + "\n")
    counts = [f"{layer},{expert},{expert + 3}" for layer in range(2) for expert in range(8)]
    header = "layer,expert,count"
    (inputs / "loads.csv").write_text("\n".join([header, *counts]) + "\n")
    experts = np.argsort(rng.random((60, 2, 8)), axis=2)[:, :, :2].astype(np.uint8)
    np.savez(
        inputs / "archive.npz",
        experts=experts,
        sequence_ids=np.repeat(np.arange(6), 10),
        token_ids=rng.integers(0, 90, 60),
    )
    _write_plan(inputs / "plan.json", ModelSpec.from_checkpoint(model), (8, 8))
    _write_plan(inputs / "pair.json", ModelSpec.from_checkpoint(model), (8, 8), ranks=2)
    run(*COMMANDS["record"].line(inputs, inputs / "trace"))
    run("affinity", inputs / "trace", "--out", inputs / "counts", "--workers", 1)
    words = "trace sample TRACE --sequences 3"
    run(*Command(words=words).line(inputs, inputs / "other"))
    run("affinity", inputs / "other", "--out", inputs / "other.counts", "--workers", 1)
    run(*COMMANDS["export sglang"].line(inputs, inputs / "map.json"))
    run(*COMMANDS["export checkpoint"].line(inputs, inputs / "exported"))
    _write_deepspeed(inputs / "saved")
    _write_plan(inputs / "small.json", ModelSpec(num_experts=(4,), top_k=2), (4,))


def _write_plan(
    path: Path, model: ModelSpec, sizes: tuple[int, ...], ranks: int = 4
) -> None:
    rows = [list(range(size))[::-1] for size in sizes]
    placement = Placement.from_json(rows, sizes, num_ranks=ranks, num_nodes=1)
    unsolved_plan(model, placement).write(path)


def _write_deepspeed(folder: Path) -> None:
    """One MoE layer of 4 experts, as DeepSpeed lays it out."""
    folder.mkdir()
    torch.manual_seed(0)
    prefix = "transformer.layers.1.mlp.deepspeed_moe"
    module = {f"{prefix}.gate.wg.weight": torch.randn(4, 8), "embed": torch.randn(10, 8)}
    state = {"module": module, "num_experts": [4], "global_steps": 10}
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    for expert in range(4):
        name = f"{prefix}.experts.deepspeed_experts.{expert}.dense_h_to_4h.weight"
        path = folder / f"layer_0_expert_{expert}_mp_rank_00_model_states.pt"
        torch.save({name: torch.randn(12, 8)}, path)
