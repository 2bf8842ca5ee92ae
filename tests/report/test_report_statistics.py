"""Figures of a trace, against arithmetic by hand and brute force."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement import Placement
from placer.placement.placement import rank_load
from placer.report.statistics import TraceStatistics, skew
from placer.trace import Chunk, Trace, TraceWriter


def write(directory: Path, chunks: list[Chunk], domains: tuple[str, ...] = ()) -> Trace:
    model = ModelSpec(num_experts=(4, 4), top_k=2)
    with TraceWriter(directory=directory, model=model, domains=domains) as writer:
        for chunk in chunks:
            writer.append(chunk)
        writer.finish()
    return Trace(directory)


def chunk_of(first: list[list[int]], sequences: list[int], **more: object) -> Chunk:
    """Layer 1 uses the same experts as layer 0, in the opposite order."""
    experts = np.array(first, dtype=np.uint8)
    fields = {
        name: np.array(values, dtype=np.uint8 if name != "token_ids" else np.int32)
        for name, values in more.items()
    }
    return Chunk(
        experts=(experts, experts[:, ::-1].copy()),
        sequence_ids=np.array(sequences, dtype=np.int32),
        positions=np.zeros(len(sequences), dtype=np.int32),
        **fields,
    )


def test_counts_by_hand_over_two_chunks(tmp_path: Path) -> None:
    trace = write(
        tmp_path / "trace",
        [
            chunk_of(
                [[0, 1], [0, 2], [0, 1], [0, 2]],
                [0, 0, 1, 1],
                domain_ids=[0, 0, 1, 1],
                token_ids=[7, -1, 7, 8],
                phase=[0, 0, 0, 1],
            ),
            chunk_of(
                [[1, 0], [0, 2], [0, 1]],
                [5, 5, 6],
                domain_ids=[1, 1, 0],
                token_ids=[9, 9, -1],
                phase=[1, 1, 1],
            ),
        ],
        domains=("code", "prose"),
    )
    found = TraceStatistics.of(trace)
    assert found.load[0].tolist() == [[3, 2, 1, 0], [4, 2, 2, 0]]
    assert found.domain_tokens.tolist() == [3, 4]
    assert found.domain_sequences.tolist() == [2, 2]
    assert found.sequence_lengths.tolist() == [2, 2, 2, 1]
    assert (found.num_known_tokens, found.num_distinct_tokens) == (5, 3)
    assert found.num_decode_tokens == 4
    # (0,1) three times, (0,2) three times, and (1,0), which is another choice.
    assert found.num_repeated_tokens == 4
    # Sequence 1 repeats sequence 0; sequence 6 is the beginning of both, and no repeat.
    assert found.num_repeated_sequences == 1


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.sampled_from([(0, 1), (1, 0), (2, 3)]), min_size=1, max_size=4))
)
def test_repeats_agree_with_brute_force(
    tmp_path_factory: pytest.TempPathFactory, sequences: list[list[tuple[int, int]]]
) -> None:
    sequences = [*sequences, [(0, 1)]]
    rows = [list(pair) for one in sequences for pair in one]
    ids = [number for number, one in enumerate(sequences) for _ in one]
    trace = write(tmp_path_factory.mktemp("repeats") / "trace", [chunk_of(rows, ids)])
    found = TraceStatistics.of(trace)
    assert found.num_repeated_tokens == len(rows) - len(Counter(map(tuple, rows)))
    assert found.num_repeated_sequences == len(sequences) - len(
        Counter(map(tuple, sequences))
    )


def test_unnamed_domain_is_refused(tmp_path: Path) -> None:
    chunk = chunk_of([[0, 1]], [0], domain_ids=[2])
    trace = write(tmp_path / "trace", [chunk], domains=("a", "b"))
    with pytest.raises(PlacerError, match=r"domain_ids holds 2, but trace\.json names 2"):
        TraceStatistics.of(trace)


def test_skew() -> None:
    assert skew(np.array([3, 1, 0, 0])).tolist() == [3.0, 1.0, 0.0, 0.0]
    assert skew(np.zeros(2, dtype=np.int64)).tolist() == [0.0, 0.0]


def test_rank_load_splits_over_copies() -> None:
    placement = Placement(
        physical_to_logical_map=(np.array([0, 1, 0, 2]),),
        num_experts=(3,),
        num_ranks=2,
    )
    assert rank_load(placement, 0, np.array([10, 1, 2])).tolist() == [6.0, 7.0]


def test_statistics_do_not_depend_on_chunks(
    tmp_path: Path, make_chunk: Callable[..., Chunk]
) -> None:
    chunk = make_chunk(num_experts=(4, 4), num_tokens=60, num_sequences=5)
    parts = [chunk.select(chunk.sequence_ids == n) for n in np.unique(chunk.sequence_ids)]
    whole = TraceStatistics.of(write(tmp_path / "whole", [chunk]))
    cut = TraceStatistics.of(write(tmp_path / "cut", parts))
    assert np.array_equal(whole.load, cut.load)
    assert np.array_equal(whole.sequence_lengths, cut.sequence_lengths)
    assert whole.num_repeated_tokens == cut.num_repeated_tokens
    assert whole.num_distinct_tokens == cut.num_distinct_tokens
