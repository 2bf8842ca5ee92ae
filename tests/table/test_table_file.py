"""The table file: the same bytes every time, and nothing hostile gets in."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from placer.errors import PlacerError
from placer.placement.reference import contiguous
from placer.table import Table, build_table


@pytest.fixture
def table(make_chunk):
    return build_table(
        contiguous((8, 8, 8), 4),
        make_chunk(),
        vocab_size=60,
        lookback=2,
        with_token_score=True,
    )


def header_of(path):
    with safe_open(path, "np") as opened:
        return json.loads(opened.metadata()["placer"])


def rewrite(path, *, tensors=None, header=None, drop=()):
    """Write the file again with other tensors or header fields."""
    named = {n: v for n, v in (load_file(path) | (tensors or {})).items() if n not in drop}
    text = json.dumps(header_of(path) | (header or {}))
    save_file(named, path, metadata={"placer": text})


def test_round_trip_keeps_every_value_and_byte(table, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    table.write(one)
    again = Table.read(one)
    again.write(two)
    assert one.read_bytes() == two.read_bytes()
    for field in dataclasses.fields(Table):
        assert np.array_equal(getattr(table, field.name), getattr(again, field.name))


def test_the_same_tokens_give_the_same_bytes(make_chunk, tmp_path):
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in paths:
        build_table(contiguous((8, 8, 8), 4), make_chunk(), vocab_size=50).write(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_numpy_alone_reads_the_tensors_of_the_format(table, tmp_path):
    path = tmp_path / "table.safetensors"
    table.write(path)
    tensors = load_file(path)
    assert {name: (v.shape, v.dtype.name) for name, v in tensors.items()} == {
        "token_rank": ((3, 60), "uint8"),
        "token_confidence": ((3, 60), "float16"),
        "history_rank": ((3, 16), "uint8"),
        "history_confidence": ((3, 16), "float16"),
        "lookback": ((), "int32"),
        "request_score": ((60, 4), "float16"),
        "expert_rank": ((3, 8), "uint8"),
        "token_score": ((3, 60, 4), "float16"),
    }
    with safe_open(path, "np") as opened:
        assert list(opened.metadata()) == ["placer"]


def test_a_truncated_file_is_refused(table, tmp_path):
    path = tmp_path / "table.safetensors"
    table.write(path)
    data = path.read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(PlacerError, match="cannot be read") as error:
            Table.read(path)
        assert f"placer tables PLAN TRACE --out {path}" in error.value.hint


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PlacerError, match="does not exist"):
        Table.read(tmp_path / "absent.safetensors")


TOO_HIGH = np.full((3, 60), 4, dtype=np.uint8)
HOSTILE_TENSORS = {
    "unknown tensors: extra": {"extra": np.zeros(1)},
    "token_rank holds rank 4": {"token_rank": TOO_HIGH},
    "history_rank holds rank 9": {"history_rank": np.full((3, 16), 9, dtype=np.uint8)},
    "expert_rank holds rank 4": {"expert_rank": np.full((3, 8), 4, dtype=np.uint8)},
    "token_rank is I64": {"token_rank": TOO_HIGH.astype(np.int64)},
    "token_confidence is F32": {"token_confidence": TOO_HIGH.astype(np.float32)},
    "token_confidence holds a value outside": {
        "token_confidence": np.full((3, 60), 1.5, dtype=np.float16)
    },
    "history_confidence holds a value outside": {
        "history_confidence": np.full((3, 16), np.nan, dtype=np.float16)
    },
    "request_score holds a value outside": {
        "request_score": np.full((60, 4), np.inf, dtype=np.float16)
    },
    "token_score holds a value outside": {
        "token_score": np.full((3, 60, 4), -1, dtype=np.float16)
    },
    "history_rank has shape": {"history_rank": np.zeros((3, 15), dtype=np.uint8)},
    "token_confidence has shape": {"token_confidence": np.zeros((3, 61), np.float16)},
    "token_rank has shape": {"token_rank": np.array(0, dtype=np.uint8)},
    "lookback is 3": {"lookback": np.array(3, dtype=np.int32)},
    r"lookback is \[2\]": {"lookback": np.array([2], dtype=np.int32)},
}


@pytest.mark.parametrize("message", HOSTILE_TENSORS)
def test_hostile_tensors_are_refused(table, tmp_path, message):
    path = tmp_path / "table.safetensors"
    table.write(path)
    rewrite(path, tensors=HOSTILE_TENSORS[message])
    with pytest.raises(PlacerError, match=message) as error:
        Table.read(path)
    assert str(path) in error.value.message
    assert "placer tables" in error.value.hint


HOSTILE_HEADERS = {
    "is an affinity file, not a table": {"kind": "affinity"},
    "written by a newer placer": {"schema_version": 3},
    "it has the unknown field surprise": {"surprise": 1},
    'id_space is "physical", allowed are logical': {"id_space": "physical"},
    'num_ranks is "4", expected a whole number': {"num_ranks": "4"},
    "num_ranks is true": {"num_ranks": True},
    "num_ranks is 0": {"num_ranks": 0},
    "lookback is 1000000": {"lookback": 1_000_000},
    "lookback is 2, the header says 1": {"lookback": 1},
    r"model is \[\], expected an object": {"model": []},
    "num_experts": {"model": {"top_k": 2}},
    "provenance is": {"provenance": "here"},
}


@pytest.mark.parametrize("message", HOSTILE_HEADERS)
def test_hostile_headers_are_refused(table, tmp_path, message):
    path = tmp_path / "table.safetensors"
    table.write(path)
    rewrite(path, header=HOSTILE_HEADERS[message])
    with pytest.raises(PlacerError, match=message) as error:
        Table.read(path)
    assert str(path) in error.value.message
    assert error.value.hint


def test_missing_tensors_are_refused_but_for_the_optional_one(table, tmp_path):
    path = tmp_path / "table.safetensors"
    dataclasses.replace(table, token_score=None, combined=None).write(path)
    assert Table.read(path).token_score is None
    rewrite(path, drop=("history_rank", "lookback"))
    with pytest.raises(PlacerError, match="missing tensors: history_rank, lookback"):
        Table.read(path)


def test_other_safetensors_are_no_table(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(PlacerError, match="not a token-shuffle table") as error:
        Table.read(path)
    assert "placer tables PLAN TRACE --out TABLE" in error.value.hint


def test_a_failed_write_leaves_nothing(table, tmp_path):
    path = tmp_path / "table.safetensors"
    broken = dataclasses.replace(table, provenance={"unwritable": object()})
    with pytest.raises(TypeError):
        broken.write(path)
    assert list(tmp_path.iterdir()) == []
