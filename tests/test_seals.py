"""No flipped bit of an affinity, a plan or a table passes its reader."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from placer.affinity import Affinity
from placer.affinity.from_traces import affinity_of_traces
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.placement.reference import contiguous
from placer.run.seals import require_seal, sealed, unsealed
from placer.run.writing import write_tensors
from placer.table import Table, build_table
from placer.trace import EVERYTHING, Chunk, Trace


def accepted(path: Path, read: Callable[[Path], object], seed: int, number: int) -> int:
    """How many of a number of single flipped bits the reader lets pass."""
    content, rng, found = path.read_bytes(), random.Random(seed), 0
    for _ in range(number):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            read(path)
        except PlacerError:
            continue
        found += 1
    path.write_bytes(content)
    read(path)
    return found


@pytest.fixture
def affinity(make_trace: Callable[..., Trace], tmp_path: Path) -> Path:
    path = tmp_path / "affinity.safetensors"
    affinity_of_traces([make_trace()], EVERYTHING, rows="sequences").write(path)
    return path


def test_no_flipped_bit_of_an_affinity_passes(affinity: Path) -> None:
    assert accepted(affinity, Affinity.read, seed=0, number=300) == 0


def test_no_flipped_bit_of_a_plan_passes(
    write_plan: Callable[..., Path],
) -> None:
    placement = Placement.from_json([[3, 2, 1, 0]] * 2, (4, 4), num_ranks=2, num_nodes=1)
    path = write_plan(ModelSpec(num_experts=(4, 4), top_k=2), placement)
    assert accepted(path, Plan.read, seed=1, number=300) == 0


def test_no_flipped_bit_of_a_table_passes(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    path = tmp_path / "table.safetensors"
    placement = contiguous((8, 8, 8), 4)
    build_table(placement, make_chunk(), vocab_size=60, with_token_score=True).write(path)
    assert accepted(path, Table.read, seed=3, number=300) == 0


def test_a_document_of_version_1_says_no_hash_and_passes() -> None:
    document = {"loads": [1, 2]}
    assert unsealed(document) == {"loads": [1, 2], "sha256": None}
    require_seal(unsealed(document), "plan x", "solve again")
    require_seal(sealed(document), "plan x", "solve again")
    with pytest.raises(PlacerError, match="plan x was changed after it was written"):
        require_seal(sealed(document) | {"loads": [2, 1]}, "plan x", "solve again")


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change counts as a program of someone else may, which writes no hash."""
    with safe_open(path, "np") as opened:
        header = json.loads(opened.metadata()["placer"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors)
    write_tensors(path, tensors, header | {"sha256": None})


@pytest.mark.parametrize("name", ["load", "coactivation", "transition"])
def test_every_changed_count_breaks_a_sum(affinity: Path, name: str) -> None:
    """Without the hash: by arithmetic alone, wherever the count is."""
    content, rng = affinity.read_bytes(), np.random.default_rng(2)
    for _ in range(40):
        layer = int(rng.integers(2))

        def change(tensors: dict[str, Any], name: str = f"{name}.{layer}") -> None:
            counts = tensors[name].reshape(-1)
            counts[rng.integers(counts.size)] += int(rng.choice([1, 7, 1 << 40]))

        rewrite(affinity, change)
        with pytest.raises(PlacerError, match=rf"affinity\.safetensors.*\.{layer}"):
            Affinity.read(affinity)
        affinity.write_bytes(content)


def test_the_error_names_layer_expert_and_both_values(affinity: Path) -> None:
    with safe_open(affinity, "np") as opened:
        before = opened.get_tensor("transition.1")

    def change(tensors: dict[str, Any]) -> None:
        tensors["transition.1"][2, 5] += 3

    rewrite(affinity, change)
    row = int(before[2].sum())
    match = rf"transition\.1, row 2 adds up to {row + 3}, .* requires {row}$"
    with pytest.raises(PlacerError, match=match):
        Affinity.read(affinity)
