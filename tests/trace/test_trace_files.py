"""Traces round-trip, survive a kill, and are refused when damaged."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from placer.errors import PlacerError, UsageError
from placer.model import ModelSpec
from placer.run.files import sha256_file
from placer.run.writing import claimed
from placer.trace import Chunk, Fold, Selection, Trace, TraceWriter

MODEL = ModelSpec(num_experts=(8, 8, 8), top_k=2)


def same(one: Chunk, two: Chunk) -> bool:
    left, right = one.tensors(), two.tensors()
    return left.keys() == right.keys() and all(
        np.array_equal(left[name], right[name]) and left[name].dtype == right[name].dtype
        for name in left
    )


def test_round_trip_is_exact(make_chunk: Callable[..., Chunk], tmp_path: Path) -> None:
    chunk = make_chunk()
    with TraceWriter(directory=tmp_path / "t", model=MODEL, domains=("a",)) as writer:
        writer.append(chunk.select(chunk.sequence_ids < 4))
        writer.append(chunk.select(chunk.sequence_ids >= 4))
        writer.finish()
    trace = Trace(tmp_path / "t")
    assert same(trace.read(), chunk)
    assert trace.header.num_tokens == 400
    assert trace.header.num_sequences == len(np.unique(chunk.sequence_ids))
    assert trace.header.domains == ("a",)
    assert trace.model == MODEL


def test_same_tokens_same_bytes(make_trace: Callable[..., Trace]) -> None:
    one, two = make_trace("one"), make_trace("two")
    for name in ("trace.json", "chunk-00000.safetensors"):
        assert (one.directory / name).read_bytes() == (two.directory / name).read_bytes()


@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    parts=st.integers(2, 5),
    data=st.data(),
)
def test_a_fold_and_its_complement_part_the_sequences(
    ids: list[int], parts: int, data: st.DataObject
) -> None:
    fold = Fold(data.draw(st.integers(0, parts - 1)), parts)
    array = np.asarray(ids, np.int32)
    kept = fold.keep(array)
    assert kept.tolist() == [n % parts == fold.part for n in ids]
    assert (fold.complement().keep(array) == ~kept).all()
    assert Fold.from_text(str(fold)) == fold
    assert Fold.from_text(str(fold.complement())) == fold.complement()


@pytest.mark.parametrize(
    "text", ["", "1", "2/2", "1/1", "-1/2", "a/b", "0/2/3", "²/3", "0/2147483648"]
)
def test_what_is_no_fold_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"a fold (is|has)") as caught:
        Fold.parse(text)
    assert "--fold 0/2" in caught.value.hint


def test_an_empty_fold_is_refused(make_trace: Callable[..., Trace]) -> None:
    with pytest.raises(PlacerError, match="no token is left"):
        make_trace(num_sequences=2).read(Selection(Fold(7, 9)))


def test_a_damaged_chunk_is_named(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace()
    path = trace.directory / "chunk-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(PlacerError, match=r"chunk-00000\.safetensors is damaged: SHA-256"):
        trace.read()
    path.unlink()
    with pytest.raises(PlacerError, match="does not exist"):
        trace.read()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("sequence_ids"), "sequence_ids is missing"),
        (lambda t: t.update(extra=np.zeros(3)), "unknown tensors: extra"),
        (
            lambda t: t.update(positions=np.zeros(400)),
            "positions is float64, expected int32",
        ),
        (lambda t: t["experts.1"].__setitem__((5, 0), 9), "expert id 9 is outside 0..7"),
        (lambda t: t["experts.2"].__setitem__(7, 0), "token 7 lists an expert twice"),
        (lambda t: t["sequence_ids"].__setitem__(0, 99), "sequence_ids decrease"),
        (
            lambda t: t.update({"experts.0": t["experts.0"].astype(np.int64)}),
            "experts.0 is int64, expected uint8 or int16",
        ),
        (
            lambda t: t.update({"weights.0": np.zeros((400, 2), np.float16)}),
            "weights.1 must be float16",
        ),
        (
            lambda t: t.update({"experts.0": t["experts.0"][:9]}),
            r"experts.0 has shape \[9, 2\], expected \[400, 2\]",
        ),
        (lambda t: t.update({"experts.0": np.zeros((), np.uint8)}), r"expected \[T\] and"),
        (lambda t: t.update(sequence_ids=np.zeros((), np.int32)), r"expected \[T\] and"),
        (
            lambda t: t.update(
                {f"weights.{n}": np.zeros((400, 2 + n), np.float16) for n in range(3)}
            ),
            r"weights.1 has shape \[400, 3\], expected \[400, 2\]",
        ),
        (
            # Their int32 difference wraps around to 1.
            lambda t: t["sequence_ids"].__setitem__(slice(1, 3), [2**31 - 1, -(2**31)]),
            "sequence_ids decrease",
        ),
        (lambda t: t["sequence_ids"].__setitem__(0, -1), "sequence_ids holds -1"),
        (lambda t: t["positions"].__setitem__(3, -5), "positions holds -5"),
        (lambda t: t["token_ids"].__setitem__(3, -2), "token_ids holds -2"),
        (lambda t: t.update(phase=np.full(400, 2, np.uint8)), "phase holds 2"),
        (
            lambda t: t.update(domain_ids=np.zeros(400, np.uint8)),
            "domain_ids holds 0, but trace.json names 0 domains",
        ),
    ],
)
def test_a_chunk_that_breaks_the_format_is_refused(
    make_trace: Callable[..., Trace], change: Callable[[dict], object], match: str
) -> None:
    """The hash is made to fit, so only the content can give it away."""
    trace = make_trace()
    path = trace.directory / "chunk-00000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    header = json.loads((trace.directory / "trace.json").read_text())
    header["chunks"][0]["sha256"] = sha256_file(path)
    (trace.directory / "trace.json").write_text(json.dumps(header))
    with pytest.raises(PlacerError, match=match):
        Trace(trace.directory).read()


CHUNK = {"file": "c", "num_tokens": 400, "num_sequences": 8, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema_version": 3}, "written by a newer placer: it has schema_version 3"),
        ({"surprise": 1}, "it has the unknown field surprise"),
        ({"id_space": "physical"}, 'id_space is "physical", allowed are logical'),
        ({"chunks": [{"file": "x"}]}, r"chunks\[0\] lacks num_tokens"),
        (
            {"chunks": [CHUNK | {"num_tokens": "400"}]},
            r'chunks\[0\]\.num_tokens is "400", expected a whole number',
        ),
        ({"chunks": [CHUNK | {"num_sequences": -1}]}, r"chunks\[0\]\.num_sequences is -1"),
        ({"chunks": [CHUNK | {"file": 7}]}, r"chunks\[0\]\.file is 7, expected a text"),
        ({"chunks": []}, "its chunks hold no token"),
        ({"num_tokens": 9}, "num_tokens is 9, but its chunks add up to 400"),
        ({"domains": ["a", "a"]}, "these are 2, 1 of them different"),
        ({"domains": [str(n) for n in range(257)]}, "at most 256 domains"),
        ({"domains": [1]}, r"domains\[0\] is 1, expected a text"),
    ],
)
def test_a_header_that_breaks_the_format_is_refused(
    make_trace: Callable[..., Trace], change: dict[str, object], match: str
) -> None:
    path = make_trace().directory / "trace.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PlacerError, match=match):
        Trace(path.parent)


def test_a_dtype_that_numpy_lacks_is_refused(make_trace: Callable[..., Trace]) -> None:
    """A bfloat16 tensor of one element, in a file written byte by byte."""
    trace = make_trace()
    path = trace.directory / "chunk-00000.safetensors"
    entry = {"experts.0": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}
    text = json.dumps(entry).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    header = json.loads((trace.directory / "trace.json").read_text())
    header["chunks"][0]["sha256"] = sha256_file(path)
    (trace.directory / "trace.json").write_text(json.dumps(header))
    with pytest.raises(PlacerError, match=r"chunk-00000\.safetensors"):
        Trace(trace.directory).read()


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_not_written(
    make_chunk: Callable[..., Chunk], tmp_path: Path, weight: float
) -> None:
    weights = [np.full((400, 2), 0.5, np.float16) for _ in range(3)]
    weights[1][17, 1] = weight
    with (
        pytest.raises(PlacerError, match="MoE layer 1: a router weight is NaN or beyond"),
        TraceWriter(directory=tmp_path / "t", model=MODEL) as writer,
    ):
        writer.append(replace(make_chunk(), weights=tuple(weights)))
    assert list(tmp_path.iterdir()) == []


def test_no_trace_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(PlacerError, match="does not exist") as caught:
        Trace(tmp_path / "nowhere")
    assert caught.value.hint.startswith("write one: placer record")


def test_a_failure_leaves_nothing(make_chunk: Callable[..., Chunk], tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        TraceWriter(directory=tmp_path / "t", model=MODEL) as writer,
    ):
        writer.append(make_chunk())
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_sequence_that_goes_on_in_the_next_chunk_is_refused(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    chunk = make_chunk()
    with TraceWriter(directory=tmp_path / "t", model=MODEL) as writer:
        writer.append(chunk.select(np.arange(37)))
        writer.append(chunk.select(np.arange(37, 400)))
        writer.finish()
    with pytest.raises(PlacerError, match="a chunk holds whole sequences"):
        Trace(tmp_path / "t").read()


def test_chunks_may_come_in_any_order_of_their_sequences(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    chunk = make_chunk()
    odd = chunk.sequence_ids % 2 == 1
    with TraceWriter(directory=tmp_path / "t", model=MODEL) as writer:
        writer.append(chunk.select(odd))
        writer.append(chunk.select(~odd & (chunk.sequence_ids > 2)))
        writer.append(chunk.select(~odd & (chunk.sequence_ids <= 2)))
        writer.finish()
    assert same(Trace(tmp_path / "t").read(), chunk)


def test_a_sequence_that_a_later_chunk_takes_up_again_is_refused(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    chunk = make_chunk()
    with TraceWriter(directory=tmp_path / "t", model=MODEL) as writer:
        for sequence in (1, 2, 1):
            writer.append(chunk.select(chunk.sequence_ids == sequence))
        writer.finish()
    with pytest.raises(PlacerError, match="sequence 1 is in two chunks"):
        Trace(tmp_path / "t").read()


def test_files_may_be_read_by_others(make_trace: Callable[..., Trace]) -> None:
    for path in make_trace().directory.iterdir():
        assert path.stat().st_mode & 0o444 == 0o444 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_existing_trace_is_not_overwritten(make_trace: Callable[..., Trace]) -> None:
    directory = make_trace().directory
    with (
        pytest.raises(PlacerError, match="already exists"),
        TraceWriter(directory=directory, model=MODEL),
    ):
        pass


def test_a_writer_that_is_not_finished_leaves_nothing(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    with (
        pytest.raises(PlacerError, match="no token was recorded"),
        TraceWriter(directory=tmp_path / "t", model=MODEL) as writer,
    ):
        writer.finish()
    with TraceWriter(directory=tmp_path / "t", model=MODEL) as writer:
        writer.append(make_chunk())
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_writer_refuses_other_options_and_drops_damage(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    options = {"directory": tmp_path / "t", "model": MODEL, "resumable": True}
    with TraceWriter(**options) as writer:
        writer.append(make_chunk())
    assert not (tmp_path / "t").exists()
    with (
        pytest.raises(PlacerError, match="begun with other input or other options"),
        TraceWriter(**options, domains=("other",)),
    ):
        pass
    with TraceWriter(**options) as writer:
        assert writer.num_tokens == 400
    path = tmp_path / "t.placer-partial" / "chunk-00000.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    with TraceWriter(**options) as writer:
        assert writer.num_tokens == 0
    with (
        claimed(tmp_path / "t", directory=True, force=True),
        TraceWriter(**options, domains=("other",)) as writer,
    ):
        assert writer.num_tokens == 0
        writer.append(make_chunk())
        writer.finish()
    assert Trace(tmp_path / "t").header.domains == ("other",)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("change", [{"vocab_size": 51}, {"layer_ids": [0, 1, 3]}])
def test_a_model_that_is_not_that_of_its_fingerprint_is_refused(
    make_chunk: Callable[..., Chunk], tmp_path: Path, change: dict[str, object]
) -> None:
    facts = {"model_type": "qwen3_moe", "layer_ids": (0, 1, 2), "hidden_size": 4}
    model = ModelSpec(num_experts=(8, 8, 8), top_k=2, vocab_size=50, **facts)
    model = msgspec.structs.replace(model, fingerprint=model.bound_fingerprint())
    with TraceWriter(directory=tmp_path / "trace", model=model) as writer:
        writer.append(make_chunk())
        writer.finish()
    Trace(tmp_path / "trace")
    path = tmp_path / "trace" / "trace.json"
    value = json.loads(path.read_text())
    value["model"] |= change
    path.write_text(json.dumps(value))
    with pytest.raises(PlacerError, match="fingerprint"):
        Trace(path.parent)
