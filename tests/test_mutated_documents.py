"""Mutated documents are refused in one sentence, or read as they are; never a crash."""

import copy
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from placer.affinity import Affinity
from placer.checkpoint.record import ExportRecord
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement import Plan
from placer.placement.world import read_costs
from placer.runtime_map.maps import export_map, verify_map
from placer.table import Table
from placer.target.hardware import Hardware
from placer.trace.header import TraceHeader

OLD = Path(__file__).parent / "data" / "schema1"
HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 1.5, -0.5, 10**12, 10**30, 10**50, 1e308),
    *(math.nan, math.inf, -math.inf, "", "x", "1", "1.1", "\ud800", "é", "a/b", "0" * 64),
    *([], {}, [1], [[1]], [None], {"a": 1}, [[[[1]]]]),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in a document, with each key or index of it."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def mutated(value: Any, rng: random.Random) -> Any:
    """Change one to three places: another value, none, one more, a neighbour's."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = rng.choice(list(places(value)) or [({"": 0}, "")])
        kind = rng.randrange(6)
        if kind <= 2:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[rng.choice(("surplus", "", "0", "é"))] = rng.choice(HOSTILE)
        else:
            other, place = rng.choice(list(places(value)) or [({"": 0}, "")])
            holder[key] = copy.deepcopy(other[place])
    return value


def mutated_text(text: str, rng: random.Random) -> bytes:
    """Damage the bytes of a document."""
    raw = bytearray(text.encode(errors="surrogatepass"))
    place = rng.randrange(len(raw))
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(raw[:place])
    if kind == 1:
        raw[place] = rng.randrange(256)
    elif kind == 2:
        raw[place:place] = b"[" * rng.choice((3, 100, 5000))
    elif kind == 3:
        raw[place:place] = b"9" * rng.choice((20, 60, 5000))
    else:
        raw[place:place] = raw[max(0, place - 30) : place]
    return bytes(raw)


def same(one: Any, other: Any) -> bool:
    """Compare JSON values; unlike ``==``, true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is float and type(other) is int:  # as a float field reads it
        return one == float(other)
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def in_metadata(original: Path) -> Callable[[bytes, Path], Path]:
    """Return what writes a header into a copy of a safetensors file."""
    tensors = load_file(original)

    def write(text: bytes, folder: Path) -> Path:
        path = folder / "file.safetensors"
        metadata = {"placer": text.decode(errors="replace")}
        save_file(tensors, path, metadata=metadata)
        return path

    return write


def as_file(name: str) -> Callable[[bytes, Path], Path]:
    def write(text: bytes, folder: Path) -> Path:
        (folder / name).write_bytes(text)
        return folder / name

    return write


def header_of(path: Path) -> Any:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["placer"])


def new_plan() -> Any:
    return Plan.read(OLD / "replicas.json").to_json()


def plan_said(path: Path) -> Any:
    return Plan.read(path).to_json()


def trace_said(path: Path) -> Any:
    return TraceHeader.read(path.parent).to_json()


def record_said(path: Path) -> Any:
    return ExportRecord.read(path.parent).to_json()


CASES: dict[str, tuple[Any, Callable, Callable[[Path], Any], int]] = {
    "plan of version 2": (new_plan(), as_file("p.json"), plan_said, 1500),
    "plan of version 1": (
        json.loads((OLD / "plan.json").read_text()),
        as_file("p.json"),
        plan_said,
        700,
    ),
    "trace": (
        TraceHeader.read(OLD / "trace").to_json(),
        as_file("trace.json"),
        trace_said,
        1000,
    ),
    "export record": (
        ExportRecord.read(OLD / "checkpoint").to_json(),
        as_file("placer.json"),
        record_said,
        700,
    ),
    "affinity": (
        header_of(OLD / "affinity.safetensors") | {"schema_version": 2, "sha256": None},
        in_metadata(OLD / "affinity.safetensors"),
        Affinity.read,
        700,
    ),
    "table": (
        header_of(OLD / "table.safetensors") | {"schema_version": 2, "sha256": None},
        in_metadata(OLD / "table.safetensors"),
        Table.read,
        700,
    ),
    "config": (
        json.loads((OLD / "model" / "config.json").read_text()),
        as_file("config.json"),
        lambda path: ModelSpec.from_checkpoint(path.parent),
        700,
    ),
    "topology": ([[0, 1], [1, 0]], as_file("cost.json"), read_costs, 300),
}


@pytest.mark.parametrize("name", CASES)
def test_mutated_documents(name: str, tmp_path: Path) -> None:
    value, write, read, number = CASES[name]
    rng = random.Random(name)
    refused = 0
    for turn in range(number):
        changed = mutated(value, rng)
        text = json.dumps(changed).encode()
        if turn % 3 == 2:
            changed, text = None, mutated_text(json.dumps(value), rng)
        try:
            said = read(write(text, tmp_path))
        except PlacerError as error:
            refused += 1
            assert error.message, text
            continue
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {text!r}") from error
        if (
            isinstance(said, dict)
            and changed is not None
            and changed["schema_version"] == 2
        ):
            if "solver" in changed:
                said["solver"]["seconds"] = changed["solver"]["seconds"]
            if "inverse" in changed:
                said["placer"] = changed["placer"]
            assert same(said, changed), text
    assert refused > number // 3


@pytest.mark.parametrize("target", ["sglang", "vllm-ascend", "json", "trtllm"])
def test_mutated_maps(target: str, tmp_path: Path) -> None:
    suffix = ".yaml" if target == "trtllm" else ".json"
    good, out = tmp_path / f"good{suffix}", tmp_path / f"map{suffix}"
    plan, model = OLD / "plan.json", OLD / "model"
    export_map(target, plan, model, good)
    text, rng = good.read_text(), random.Random(target)
    for turn in range(200):
        if suffix == ".yaml" or turn % 3 == 2:
            out.write_bytes(mutated_text(text, rng))
        else:
            out.write_bytes(json.dumps(mutated(json.loads(text), rng)).encode())
        try:
            verify_map(out, plan, model)
        except PlacerError:
            continue
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {out.read_bytes()!r}") from error


def test_mutated_hardware(tmp_path: Path) -> None:
    text = (
        "bf16_flops = 1e12\nfp8_flops = 1e12\nmemory_bandwidth = 1e12\n"
        'notes = ["a"]\nfast = { bandwidth = 1e9, latency = 1e-6 }\n'
        "[slow]\nbandwidth = 1e9\nlatency = 1e-6\nboth_ways = [[0, 1], [1, 2]]\n"
        "one_way = [[0, 1], [1, 2]]\n"
    )
    rng, path = random.Random(0), tmp_path / "h.toml"
    for _ in range(300):
        path.write_bytes(mutated_text(text, rng))
        try:
            Hardware.named(str(path))
        except PlacerError:
            continue
        except Exception as error:
            raise AssertionError(
                f"{type(error).__name__}: {path.read_bytes()!r}"
            ) from error


def test_the_originals_are_read(tmp_path: Path) -> None:
    """What the mutations start from is not refused anyway."""
    for value, write, read, _ in CASES.values():
        read(write(json.dumps(value).encode(), tmp_path))
    shutil.rmtree(tmp_path)
