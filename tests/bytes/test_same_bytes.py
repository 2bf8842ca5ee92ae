"""The same input and seed give the same bytes, whatever the surroundings.

`make bytes` changes one thing after another, `make test` all of them at once.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from placer.affinity import Affinity
from placer.placement import Plan
from placer.trace import Trace, TraceWriter
from tests.bytes.road import WRITTEN
from tests.faults.checks import State, state_of
from tests.faults.commands import make_inputs, run

ROOT = Path(__file__).resolve().parents[2]
ALL = os.environ.get("PLACER_BYTES") == "all"
# Processor features that NumPy chooses loops by, of those that this machine has.
DISPATCHED = [
    name
    for name in np._core._multiarray_umath.__cpu_dispatch__
    if np._core._multiarray_umath.__cpu_features__.get(name)
]
SURROUNDINGS = {
    "C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "C.UTF-8 locale": {"LC_ALL": "C.UTF-8"},
    "German locale": {"LC_ALL": "de_DE.UTF-8", "LANGUAGE": "de"},
    "time zone": {"TZ": "Pacific/Kiritimati"},
    "hash seed": {"PYTHONHASHSEED": "4711"},
    "no vector loops in NumPy": {"NPY_DISABLE_CPU_FEATURES": " ".join(DISPATCHED)},
    "no vector loops in numba": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
}
for number in (1, 2, 3, 8):
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    SURROUNDINGS[f"{number} threads"] = dict.fromkeys(names, str(number))
# numba takes no more threads than it finds cores, unless it is told to.
ONCE = {
    "everything at once": {k: v for one in SURROUNDINGS.values() for k, v in one.items()}
}


@pytest.fixture(scope="module")
def inputs(tiny_sharded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of tests/faults, and what `trace sample` left out of the trace."""
    folder = tmp_path_factory.mktemp("bytes") / "inputs"
    folder.mkdir()
    make_inputs(tiny_sharded_model, folder)
    run("trace", "split", folder / "trace", "--not-fold", "0/2", "--out", folder / "rest")
    return folder


def written(inputs: Path, place: Path, changed: dict[str, str]) -> State:
    """Walk the road in a process of its own; return what it wrote."""
    place.mkdir(parents=True)
    shutil.copytree(inputs, place / "inputs")
    surroundings = os.environ | {"PYTHONPATH": str(ROOT)} | changed
    # What numba compiled for another processor is not used.
    surroundings["NUMBA_CACHE_DIR"] = (
        str(place / "numba") if "NUMBA_CPU_NAME" in changed else ""
    )
    surroundings = {
        name: value for name, value in surroundings.items() if value or name in changed
    }
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "bytes" / "road.py"],
        cwd=place,
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return state_of(place / "out")


@pytest.fixture(scope="module")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> State:
    found = written(inputs, tmp_path_factory.mktemp("usual") / "here", {})
    assert len({name[:2] for name in found}) >= len(WRITTEN)
    return found


def differing(found: State, expected: State) -> list[str]:
    return sorted(
        name for name in {*found, *expected} if found.get(name) != expected.get(name)
    )


@pytest.mark.parametrize("name", SURROUNDINGS if ALL else ONCE)
def test_surroundings_change_no_byte(
    name: str, inputs: Path, expected: State, tmp_path: Path
) -> None:
    """Another directory too: of another name, deeper, and with a blank and an umlaut."""
    place = tmp_path / "an other" / "Verzeichnis-\u00e4" / ("x" * 20)
    changed = (SURROUNDINGS | ONCE)[name]
    assert differing(written(inputs, place, changed), expected) == []


def test_a_difference_is_found(inputs: Path, expected: State) -> None:
    """The comparison can fail: one bit of one file."""
    name = min(expected)
    flipped = bytes([expected[name][0] ^ 1]) + expected[name][1:]
    assert differing(expected | {name: flipped}, expected) == [name]


def test_the_order_of_traces_changes_no_count(inputs: Path, tmp_path: Path) -> None:
    names = [inputs / "other", inputs / "rest"]
    for name, paths in (("ab", names), ("ba", names[::-1])):
        run("affinity", *paths, "--workers", 1, "--out", tmp_path / name)
    one, two = (state_of(tmp_path / name) for name in ("ab", "ba"))
    assert one == two


def test_the_size_of_chunks_changes_no_count_and_no_plan(
    inputs: Path, tmp_path: Path
) -> None:
    trace = Trace(inputs / "trace")
    tokens = trace.read()
    assert len(trace.header.chunks) > 3
    model = trace.model
    with TraceWriter(
        directory=tmp_path / "one",
        model=model,
        domains=trace.header.domains,
        provenance=trace.header.provenance,
    ) as writer:
        writer.append(tokens)
        writer.finish()
    plans, counts = [], []
    for number, path in enumerate((inputs / "trace", tmp_path / "one")):
        out = tmp_path / f"plan-{number}.json"
        words = ("--gpus-per-node", 4, "--max-imbalance", 2, "--proof", "none")
        run("solve", path, *words, "--fold", "0/2", "--out", out)
        run("affinity", path, "--workers", 1, "--out", tmp_path / f"counts-{number}")
        plans.append(Plan.read(out).to_json())
        counts.append(Affinity.read(tmp_path / f"counts-{number}"))
    for name in ("physical_to_logical_map", "solver", "metrics"):
        assert plans[0][name] == plans[1][name], name
    for one, two in zip(counts[0].load, counts[1].load, strict=True):
        assert (one == two).all()
    for one, two in zip(counts[0].transition, counts[1].transition, strict=True):
        assert (one == two).all()


def test_recordings_differ_by_ties_and_last_bits_alone(
    inputs: Path, tmp_path: Path
) -> None:
    """Threads decide the order of a sum, and so the last bits of a router's weights."""
    words = ["record", "inputs/model", "--corpus", "inputs/text", "--out"]
    found = []
    for number in ("1", "2", "8"):
        place = tmp_path / number
        place.mkdir()
        (place / "inputs").symlink_to(inputs)
        threads = {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number}
        subprocess.run(
            [sys.executable, "-m", "placer.cli.main", *words, "out"],
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | threads,
            check=True,
            capture_output=True,
        )
        found.append(Trace(place / "out").read())
    first = found[0]
    assert first.weights is not None
    for other in found[1:]:
        assert (first.token_ids == other.token_ids).all()
        pairs = zip(first.experts, other.experts, first.weights, other.weights, strict=True)
        for ids, other_ids, weights, other_weights in pairs:
            assert np.abs(weights - other_weights).max() <= 1e-3
            differ = ids != other_ids
            # Where ids differ, two weights of the token are equal to the tolerance.
            near = np.abs(np.diff(weights.astype(np.float32), axis=1)) <= 1e-3
            assert not differ[~near.any(axis=1)].any()
