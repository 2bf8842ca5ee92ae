"""Parts, unions and samples hold exactly the tokens that they should."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.affinity.from_traces import affinity_of_traces
from placer.errors import PlacerError, UsageError
from placer.model import ModelSpec
from placer.trace import EVERYTHING, Chunk, Fold, Selection, Trace, TraceWriter
from placer.trace.rewrite import merge_traces, sample_trace, split_trace, validate_trace

MODEL = ModelSpec(num_experts=(8, 8, 8), top_k=2)


def write(directory: Path, chunk: Chunk, domains: tuple[str, ...]) -> Trace:
    """Write two chunks, whose sequences alternate between the domains."""
    ids = (chunk.sequence_ids % len(domains)).astype(np.uint8)
    chunk = replace(chunk, domain_ids=ids)
    with TraceWriter(directory=directory, model=MODEL, domains=domains) as writer:
        writer.append(chunk.select(chunk.sequence_ids < 3))
        writer.append(chunk.select(chunk.sequence_ids >= 3))
        writer.finish()
    return Trace(directory)


def rows(chunk: Chunk) -> list[tuple]:
    return list(
        zip(chunk.token_ids.tolist(), *(ids.tolist() for ids in chunk.experts), strict=True)
    )


def test_split_by_fold_and_domain(make_chunk: Callable[..., Chunk], tmp_path: Path) -> None:
    chunk = make_chunk()
    trace = write(tmp_path / "t", chunk, ("a", "b"))
    for out, options, kept in (
        ("even", {"selection": Selection(Fold(0, 2))}, chunk.sequence_ids % 2 == 0),
        ("b", {"domain": "b"}, chunk.sequence_ids % 2 == 1),
        (
            "both",
            {"selection": Selection(Fold(0, 3)), "domain": "a"},
            (chunk.sequence_ids % 3 == 0) & (chunk.sequence_ids % 2 == 0),
        ),
    ):
        split_trace(trace, tmp_path / out, **options)
        part = Trace(tmp_path / out).read()
        assert rows(part) == rows(chunk.select(kept))
        assert part.sequence_ids.tolist() == chunk.sequence_ids[kept].tolist()
    with pytest.raises(UsageError, match="no domain 'c'") as caught:
        split_trace(trace, tmp_path / "x", domain="c")
    assert "a, b" in caught.value.hint
    with pytest.raises(UsageError, match="nothing to split by"):
        split_trace(trace, tmp_path / "x")
    with pytest.raises(PlacerError, match="no token"):
        split_trace(trace, tmp_path / "x", selection=Selection(Fold(98, 99)))
    assert not (tmp_path / "x").exists()


def test_split_by_period_cuts_time_between_sequences(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    chunk = make_chunk(num_sequences=40)
    trace = write(tmp_path / "t", chunk, ("a",))
    found = []
    for number in range(4):
        out = tmp_path / f"period-{number}"
        split_trace(trace, out, period=f"{number}/4")
        part = Trace(out).read()
        assert abs(part.num_tokens - 100) <= np.bincount(chunk.sequence_ids).max()
        found.append(part)
    assert [row for part in found for row in rows(part)] == rows(chunk)
    for earlier, later in itertools.pairwise(found):
        assert earlier.sequence_ids[-1] < later.sequence_ids[0]


@pytest.mark.parametrize("text", ["2/2", "1", "a/b", "-1/2", "0/0", "²/3", "0/9999999999"])
def test_a_wrong_period_is_refused(
    make_trace: Callable[..., Trace], tmp_path: Path, text: str
) -> None:
    with pytest.raises(UsageError, match="a period is K/N") as caught:
        split_trace(make_trace(), tmp_path / "x", period=text)
    assert "--period 0/2" in caught.value.hint
    assert not (tmp_path / "x").exists()


def test_ids_that_a_merge_would_wrap_around_are_refused(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    """The last id that fits is 2^31 - 1: that of sequence 1 after ids up to 2^31 - 3."""
    small = make_chunk(num_tokens=10, num_sequences=2)
    ids = np.full(10, 2**31 - 3, np.int32)
    traces = [
        write(tmp_path / "high", replace(small, sequence_ids=ids), ("a",)),
        write(tmp_path / "small", small, ("a",)),
        write(tmp_path / "more", make_chunk(num_tokens=9, num_sequences=1), ("a",)),
    ]
    merge_traces(traces[:2], tmp_path / "m")
    assert Trace(tmp_path / "m").read().sequence_ids[-1] == 2**31 - 1
    with pytest.raises(PlacerError, match="go up to 2147483648, beyond int32"):
        merge_traces(traces, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_merge_keeps_all_tokens_and_renumbers(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    one, two = make_chunk(seed=1), make_chunk(seed=2, num_tokens=300)
    traces = [
        write(tmp_path / "one", one, ("a", "b")),
        write(tmp_path / "two", two, ("b", "c")),
    ]
    header = merge_traces(traces, tmp_path / "m")
    merged = Trace(tmp_path / "m").read()
    assert header.domains == ("a", "b", "c")
    assert rows(merged) == rows(one) + rows(two)
    offset = int(one.sequence_ids.max()) + 1
    expected = [*one.sequence_ids, *(two.sequence_ids + offset)]
    assert merged.sequence_ids.tolist() == expected
    assert header.provenance["traces"][1]["sequence_offset"] == offset
    names = np.asarray(header.domains)[merged.domain_ids]
    assert names.tolist() == [
        *np.asarray(["a", "b"])[one.sequence_ids % 2],
        *np.asarray(["b", "c"])[two.sequence_ids % 2],
    ]
    counted = affinity_of_traces([Trace(tmp_path / "m")], EVERYTHING).without_sequences()
    both = affinity_of_traces(traces, EVERYTHING)
    for name, counts in both.tensors().items():
        assert np.array_equal(counted.tensors()[name], counts), name
    with pytest.raises(UsageError, match="given twice"):
        merge_traces([traces[0], traces[0]], tmp_path / "x")


def test_merge_leaves_out_what_not_all_traces_hold(
    make_chunk: Callable[..., Chunk], make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    labelled = write(tmp_path / "one", make_chunk(), ("a",))
    merge_traces([labelled, make_trace(seed=3)], tmp_path / "m")
    merged = Trace(tmp_path / "m").read()
    assert merged.domain_ids is None
    assert merged.token_ids is not None


def test_a_sample_is_of_the_seed(make_chunk: Callable[..., Chunk], tmp_path: Path) -> None:
    trace = write(tmp_path / "t", make_chunk(), ("a",))
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        sample_trace(trace, tmp_path / name, 3, seed)
    drawn = {n: Trace(tmp_path / n).read() for n in ("one", "two", "three")}
    assert rows(drawn["one"]) == rows(drawn["two"])
    assert len(np.unique(drawn["one"].sequence_ids)) == 3
    assert rows(drawn["one"]) != rows(drawn["three"])
    with pytest.raises(UsageError, match="9 sequences requested"):
        sample_trace(trace, tmp_path / "x", 9, 0)


def test_validate_names_the_damaged_chunk(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    chunk = make_chunk()
    trace = write(tmp_path / "t", chunk, ("a",))
    assert validate_trace(trace).num_tokens == 400
    path = tmp_path / "t" / "chunk-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(PlacerError, match=r"chunk-00001\.safetensors is damaged"):
        validate_trace(Trace(tmp_path / "t"))
    with TraceWriter(directory=tmp_path / "v", model=MODEL) as writer:
        writer.append(chunk.select(chunk.sequence_ids == 2))
        writer.append(replace(chunk.select(chunk.sequence_ids == 3), token_ids=None))
        writer.finish()
    with pytest.raises(
        PlacerError, match=r"chunk-00001\.safetensors and .* different tensors: token_ids"
    ):
        validate_trace(Trace(tmp_path / "v"))
    with TraceWriter(directory=tmp_path / "u", model=MODEL) as writer:
        for part in (
            chunk.sequence_ids == 2,
            chunk.sequence_ids == 3,
            chunk.sequence_ids == 2,
        ):
            writer.append(chunk.select(part))
        writer.finish()
    with pytest.raises(PlacerError, match=r"sequence 2 of .* is in an earlier chunk too"):
        validate_trace(Trace(tmp_path / "u"))
