"""Headers of safetensors files: renamed byte for byte, and refused when they lie."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from placer.checkpoint.permutation import require_whole_groups
from placer.checkpoint.shard import Shard, rename_keys
from placer.errors import PlacerError
from placer.model import ModelSpec


@given(
    names=st.lists(
        st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
        unique=True,
        min_size=1,
        max_size=6,
    ),
    indent=st.sampled_from([None, 1, 4]),
    data=st.data(),
)
def test_renaming_keys_is_undone_by_its_inverse(
    names: list[str], indent: int | None, data: st.DataObject
) -> None:
    text = json.dumps({name: {"dtype": name} for name in names}, indent=indent)
    new = dict(zip(names, data.draw(st.permutations(names)), strict=True))
    renamed = rename_keys(text, new, Path("x.safetensors"))
    assert set(json.loads(renamed)) == set(names)
    for name in names:
        assert json.loads(renamed)[new[name]] == {"dtype": name}, "values stay"
    back = rename_keys(
        renamed, {value: key for key, value in new.items()}, Path("x.safetensors")
    )
    assert back == text


def test_only_the_names_of_tensors_are_renamed() -> None:
    """Not keys of the same spelling in metadata or below, and no values."""
    path = Path("x")
    text = '{"a": {"b": "a", "a": 1}, "b" : [{"a": 2}]}'
    assert rename_keys(text, {"a": "b", "b": "a"}, path) == (
        '{"b": {"b": "a", "a": 1}, "a" : [{"a": 2}]}'
    )
    assert rename_keys(text, {"a": "cc"}, path, "a") == text.replace('"a": 1', '"cc": 1')
    assert rename_keys(" { } ", {"a": "b"}, path) == " { } "


def test_a_name_spelled_with_escapes_is_refused() -> None:
    """Renamed and renamed back it would be spelled otherwise: not the same bytes."""
    with pytest.raises(PlacerError, match=r'spells the name a as "\\u0061"'):
        rename_keys('{"\\u0061": 1}', {"a": "b"}, Path("x.safetensors"))
    assert rename_keys('{"\\u0061": 1}', {"b": "a"}, Path("x")) == '{"\\u0061": 1}'


def test_a_renamed_header_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = {"a.1": np.arange(3.0), "b": np.ones((2, 2), np.int8)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    shard = Shard.open(path)
    header = shard.renamed_header({"a.1": "a.1234567"})
    found = load(header + path.read_bytes()[shard.data_start :])
    assert found["a.1234567"].tolist() == [0, 1, 2]
    assert found["b"].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("padding", [0, 3, 8])
@pytest.mark.parametrize("longer", [0, 1, 2, 8, 9, 5000])
def test_renaming_moves_data_by_whole_pages_or_not_at_all(
    padding: int, longer: int, tmp_path: Path
) -> None:
    """Writers that pad to no multiple of eight included."""
    path = tmp_path / "model.safetensors"
    text = json.dumps({"a": entry(0, 16, [4])}).encode() + b" " * padding
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    shard = Shard.open(path)
    header = shard.renamed_header({"a": "a" * (1 + longer)})
    moved = len(header) - shard.data_start
    assert moved % 4096 == 0
    assert moved == (0 if longer <= padding else 4096 * (1 + longer // 4097))
    assert load(header + bytes(16))["a" * (1 + longer)].tolist() == [0] * 4


def write_header(path: Path, header: object, data: bytes = bytes(16)) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, shape: list[int]) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": entry(0, 16, [3])}, "has bytes 0 to 16"),
        ({"a": entry(0, 16, [4]), "b": entry(8, 16, [2])}, "starts at byte 8, not at 16"),
        ({"a": entry(0, 8, [2])}, "end at byte 8, its data at 16"),
        ({"a": entry(8, 16, [2])}, "starts at byte 8, not at 0"),
        ({"a": entry(0, 16, [-4])}, "has bytes"),
        ({"a": {"dtype": "X9", "shape": [], "data_offsets": [0, 1]}}, "no valid dtype"),
        ({"a": 3}, "no valid dtype"),
        (
            {"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}},
            "no valid dtype",
        ),
        ({"a": entry(0, 16, [4.0])}, "no valid dtype"),
        ({"a": entry(0, 16, [True, 4])}, "no valid dtype"),
        ({"a": entry(0, 16, [float("inf")])}, "no valid dtype"),
        ({"a": entry(0, "16", [4])}, "no valid dtype"),
        ({"a": entry(0, 16, [4]), "__metadata__": {"format": 1}}, "__metadata__"),
        ({"a": entry(0, 16, [4]), "__metadata__": []}, "__metadata__"),
        ([], "not a JSON object"),
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, header: object, match: str) -> None:
    with pytest.raises(PlacerError, match=match) as caught:
        Shard.open(write_header(tmp_path / "x.safetensors", header))
    assert "x.safetensors" in caught.value.message


def test_a_header_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(PlacerError, match="does not fit its 10 bytes"):
        Shard.open(path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' + "[" * 80 + "]" * 80 + "}",
        '{"a": 1, "a": 2}',
        "{",
        "\xff",
        "{}x",
        '{"a":' + "9" * 5000 + "}",
    ],
)
def test_a_header_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    raw = text.encode("latin-1")
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(PlacerError, match="its header is not valid JSON") as caught:
        Shard.open(path)
    assert caught.value.hint


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(PlacerError, match="does not fit its 0 bytes"):
        Shard.open(tmp_path / "x.safetensors")


def test_only_whole_router_groups_may_move() -> None:
    model = ModelSpec(num_experts=(8,), top_k=2, n_group=4, topk_group=2)
    require_whole_groups(model, [np.asarray([3, 2, 0, 1, 7, 6, 4, 5])])
    with pytest.raises(PlacerError, match="mixes router groups") as caught:
        require_whole_groups(model, [np.asarray([0, 2, 1, 3, 4, 5, 6, 7])])
    assert "placer solve TRACE --preserve-groups" in caught.value.hint
