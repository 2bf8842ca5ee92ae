"""``verify`` of a map compares everything: no edited field and no flipped bit passes.

An edit is refused, or the map that it leaves says the very same. The formats are edited
field by field; of archives and texts random bits are flipped.
"""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from placer.errors import PlacerError
from placer.runtime_map.maps import RUNTIMES, export_map, verify_map
from placer.target.map_formats import MAPS

OLD = Path(__file__).parents[1] / "data" / "schema1"
PLAN, MODEL = OLD / "plan.json", OLD / "model"
FORMATS = [(name, suffix) for name, one in MAPS.items() for suffix in one.suffixes]


def accepted(path: Path) -> bool:
    try:
        verify_map(path, PLAN, MODEL)
    except PlacerError as error:
        assert error.message
        return False
    return True


def content(name: str, path: Path) -> Any:
    """What a file says, by the libraries of its format."""
    if path.suffix == ".pt":
        value = torch.load(path, weights_only=True)
        return {key: one.tolist() for key, one in value.items()}
    runtime = RUNTIMES[name]
    return [list(row) for row in runtime.parse(path, path.suffix).rows]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def edits(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield copies of a document, each edited in one place, and what was done."""
    for number, (_, key) in enumerate(places(value)):
        for kind in ("remove", "more", "type", "repeat"):
            edited = copy.deepcopy(value)
            holder = [holder for holder, _ in places(edited)][number]
            one = holder[key]
            if kind == "remove":
                del holder[key]
            elif kind == "repeat" and isinstance(holder, list):
                holder.insert(key, copy.deepcopy(one))
            elif kind == "more" and type(one) is int:
                holder[key] = one + 1
            elif kind == "type" and type(one) is int:
                holder[key] = bool(one) if one in (0, 1) else float(one)
            elif kind == "type" and isinstance(one, str):
                holder[key] = one + "x"
            elif kind == "more" and isinstance(one, dict | list):
                holder[key] = None
            else:
                continue
            yield f"{kind} at {key}", edited


@pytest.mark.parametrize("name", [n for n, suffix in FORMATS if suffix == ".json"])
def test_no_edited_field_of_json_passes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    export_map(name, PLAN, MODEL, path)
    value = json.loads(path.read_text())
    number = 0
    for what, edited in edits(value):
        path.write_text(json.dumps(edited))
        assert not accepted(path), what
        number += 1
    assert number > 30
    path.write_text(json.dumps(value))
    assert accepted(path)


def header_edits(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    with safe_open(path, "np") as opened:
        header = json.loads(opened.metadata()["placer"])
    for what, edited in edits(header):
        yield what, {"placer": json.dumps(edited)}
    yield "another key", {"plader": json.dumps(header)}
    yield "one more key", {"placer": json.dumps(header), "more": "1"}


def test_no_edited_field_of_eplb_s_header_passes(tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    export_map("eplb", PLAN, MODEL, path)
    arrays, number = load_file(path), 0
    for what, metadata in list(header_edits(path)):
        save_file(arrays, path, metadata=metadata)
        # The name of a model is for people.
        assert not accepted(path) or what in ("type at id",), what
        number += 1
    assert number > 40
    # What others write has no header.
    save_file(arrays, path)
    assert accepted(path)


@pytest.mark.parametrize(("name", "suffix"), FORMATS)
def test_no_flipped_bit_changes_a_map(name: str, suffix: str, tmp_path: Path) -> None:
    """Bits that mean nothing, as in the padding of an archive, may pass."""
    path = tmp_path / f"map{suffix}"
    export_map(name, PLAN, MODEL, path)
    whole, expected, rng = path.read_bytes(), content(name, path), random.Random(name)
    refused = 0
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        if accepted(path):
            assert content(name, path) == expected, bytes(flipped)
        else:
            refused += 1
    assert refused > 60
