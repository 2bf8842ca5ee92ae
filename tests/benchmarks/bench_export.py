"""Export speed: the whole command beside ``cp -r`` of the same files, in pairs.

Both start from files in the page cache and an idle disk. The command flushes what it writes
to the disk, ``cp`` does not.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL

import numpy as np
import pytest

from placer.model import ModelSpec
from placer.placement import Placement
from tests.plans import unsolved_plan

LAYERS, EXPERTS, HIDDEN, WIDTH = 8, 64, 2048, 1024
ROUNDS = 5
CONFIG = {
    "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "hidden_size": HIDDEN,
    "vocab_size": 1000,
}


def per_expert(layer: int) -> dict[str, list[int]]:
    """Names and shapes of one layer, in bfloat16."""
    prefix = f"model.layers.{layer}.mlp"
    shapes = {f"{prefix}.gate.weight": [EXPERTS, HIDDEN]}
    for expert in range(EXPERTS):
        for part, shape in (
            ("gate_proj", [WIDTH, HIDDEN]),
            ("up_proj", [WIDTH, HIDDEN]),
            ("down_proj", [HIDDEN, WIDTH]),
        ):
            shapes[f"{prefix}.experts.{expert}.{part}.weight"] = shape
    return shapes


def fused(layer: int) -> dict[str, list[int]]:
    """The same numbers, all experts of a layer in one tensor."""
    prefix = f"model.layers.{layer}.mlp"
    return {
        f"{prefix}.router.weight": [EXPERTS, HIDDEN],
        f"{prefix}.experts.gate_up_proj": [EXPERTS, HIDDEN, 2 * WIDTH],
        f"{prefix}.experts.down_proj": [EXPERTS, WIDTH, HIDDEN],
    }


LAYOUTS = {"per-expert": ("qwen3_moe", per_expert), "fused": ("gpt_oss", fused)}


def write_shard(path: Path, shapes: dict[str, list[int]], noise: bytes) -> None:
    """Write a shard of random bytes without holding it in memory."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        while end > 0:
            end -= stream.write(noise[: min(end, len(noise))])


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(layout: str, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of about 6.5 GB, one shard per layer."""
    model_type, shapes = LAYOUTS[layout]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": model_type}))
    noise = np.random.default_rng(0).bytes(1 << 26)
    weight_map = {}
    for layer in range(LAYERS):
        file = f"model-{layer + 1:05}-of-{LAYERS:05}.safetensors"
        write_shard(folder / file, shapes(layer), noise)
        weight_map |= dict.fromkeys(shapes(layer), file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    yield folder
    shutil.rmtree(tmp_path)


def write_plan(path: Path, model: ModelSpec) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.permutation(size).tolist() for size in model.num_experts]
    placement = Placement.from_json(rows, model.num_experts, 8, 1)
    unsolved_plan(model, placement).write(path)


def timed(words: list[object], out: Path) -> tuple[float, int]:
    """Run a command that writes ``out``; return its seconds and its peak memory."""
    os.sync()
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in words], stdout=DEVNULL, stderr=DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    shutil.rmtree(out)
    return seconds, usage.ru_maxrss * 1024


def test_export_speed(layout: str, model: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    write_plan(plan, ModelSpec.from_checkpoint(model))
    copy = ["cp", "-r", model, out]
    export = [sys.executable, "-m", "placer.cli.main", "export", "checkpoint", plan, model]
    export += ["--out", out]
    timed(copy, out)
    ratios, seconds, peak = [], [], 0
    for round_number in range(ROUNDS):
        pair = [copy, export] if round_number % 2 else [export, copy]
        found = {id(words): timed(words, out) for words in pair}
        ratios.append(found[id(export)][0] / found[id(copy)][0])
        seconds.append(found[id(export)][0])
        peak = max(peak, found[id(export)][1])
    num_bytes = sum(path.stat().st_size for path in model.iterdir())
    print(
        f"\nexporting {num_bytes / 1e9:.1f} GB in {layout} layout: "
        f"{num_bytes / 1e9 / statistics.median(seconds):.2f} GB/s, "
        f"{statistics.median(ratios):.2f} times the time of cp -r (median of {ROUNDS} "
        f"pairs, {min(ratios):.2f} to {max(ratios):.2f}), peak memory {peak >> 20} MiB"
    )
