"""What is removed is what a brute-force search finds twice, however the trace is cut."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.trace import Chunk, Fold, Selection, Trace, TraceWriter
from placer.trace.dedup import Repetition, dedup_trace
from placer.trace.imported import import_file
from placer.trace.npz import read_npz

MODEL = ModelSpec(num_experts=(3, 3), top_k=1)
Sequences = list[list[tuple[int, int]]]


def write(
    directory: Path,
    sequences: Sequences,
    *,
    per_chunk: int = 100,
    with_ids: bool = True,
    first_position: int = 0,
) -> Trace:
    """Write sequences of (token id, expert); both layers route alike."""
    with TraceWriter(directory=directory, model=MODEL) as writer:
        for begin in range(0, len(sequences), per_chunk):
            part = sequences[begin : begin + per_chunk]
            tokens = np.asarray([pair for one in part for pair in one])
            lengths = [len(one) for one in part]
            ids = tokens[:, 1:].astype(np.uint8)
            writer.append(
                Chunk(
                    experts=(ids, ids),
                    token_ids=tokens[:, 0].astype(np.int32) if with_ids else None,
                    sequence_ids=np.repeat(
                        np.arange(begin, begin + len(part)), lengths
                    ).astype(np.int32),
                    positions=np.concatenate(
                        [np.arange(n) + first_position for n in lengths]
                    ).astype(np.int32),
                )
            )
        writer.finish()
    return Trace(directory)


def kept(directory: Path) -> list[tuple[int, int]]:
    """Return (sequence, position) of the tokens that are left."""
    chunk = Trace(directory).read()
    return list(zip(chunk.sequence_ids.tolist(), chunk.positions.tolist(), strict=True))


def brute_force(
    sequences: Sequences, kinds: tuple[str, ...], fold: Fold | None
) -> tuple[list[tuple[int, int]], Repetition]:
    """Find repeated tokens with nested loops over plain lists."""

    def in_fold(sequence: int) -> bool:
        return fold is not None and bool(fold.keep(np.asarray([sequence]))[0])

    left, prefixes, rows, removed, looked_at = [], 0, 0, 0, 0
    for s, sequence in enumerate(sequences):
        for p, (_, expert) in enumerate(sequence):
            if in_fold(s):
                left.append((s, p))
                continue
            looked_at += 1
            prefix = [v for v, _ in sequence[: p + 1]]
            others = (
                [n for n in range(len(sequences)) if in_fold(n)]
                if fold is not None
                else list(range(s))
            )
            is_prefix = min(prefix) >= 0 and any(
                [v for v, _ in sequences[n][: p + 1]] == prefix for n in others
            )
            earlier = [e for n in others for _, e in sequences[n]]
            if fold is None:
                earlier += [e for _, e in sequence[:p]]
            is_row = expert in earlier
            prefixes += is_prefix
            rows += is_row
            if (is_prefix and "prefixes" in kinds) or (is_row and "rows" in kinds):
                removed += 1
            else:
                left.append((s, p))
    return left, Repetition(
        num_tokens=looked_at,
        num_prefix_tokens=prefixes,
        num_repeated_rows=rows,
        num_warm_up_tokens=0,
        num_removed=removed,
    )


token = st.tuples(st.integers(-1, 2), st.integers(0, 2))


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=6),
    kinds=st.sampled_from([("prefixes",), ("rows",), ("prefixes", "rows")]),
    fold=st.sampled_from([None, Fold(0, 2), Fold(0, 3, inverted=True)]),
    per_chunk=st.integers(1, 6),
)
def test_equals_brute_force_however_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    sequences: Sequences,
    kinds: tuple,
    fold: Fold | None,
    per_chunk: int,
) -> None:
    folder = tmp_path_factory.mktemp("dedup")
    trace = write(folder / "in", sequences, per_chunk=per_chunk)
    left, expected = brute_force(sequences, kinds, fold)
    if not left:
        with pytest.raises(PlacerError, match="nothing to write"):
            dedup_trace(trace, folder / "out", kinds=kinds, fold=fold)
        return
    header, found = dedup_trace(trace, folder / "out", kinds=kinds, fold=fold)
    assert found == expected
    assert kept(folder / "out") == left
    assert header.num_tokens == len(left)


def test_without_token_ids_rows_tell_prefixes(tmp_path: Path) -> None:
    trace = write(
        tmp_path / "in", [[(0, 0), (0, 1)], [(0, 0), (0, 2)], [(0, 1)]], with_ids=False
    )
    _, found = dedup_trace(trace, tmp_path / "out", kinds=("prefixes",))
    assert found.num_prefix_tokens == 1
    assert kept(tmp_path / "out") == [(0, 0), (0, 1), (1, 1), (2, 0)]


def test_rows_are_equal_in_any_order_of_their_experts(tmp_path: Path) -> None:
    ids = np.asarray([[0, 1], [1, 0], [0, 2]], np.uint8)
    with TraceWriter(
        directory=tmp_path / "in", model=ModelSpec(num_experts=(3,), top_k=2)
    ) as writer:
        writer.append(
            Chunk(
                experts=(ids,),
                sequence_ids=np.zeros(3, np.int32),
                positions=np.arange(3, dtype=np.int32),
            )
        )
        writer.finish()
    _, found = dedup_trace(Trace(tmp_path / "in"), tmp_path / "out")
    assert found.num_repeated_rows == 1
    assert kept(tmp_path / "out") == [(0, 0), (0, 2)]


def test_a_sequence_without_its_start_has_no_prefix(tmp_path: Path) -> None:
    trace = write(tmp_path / "in", [[(0, 0)], [(0, 1)]], first_position=7)
    _, found = dedup_trace(trace, tmp_path / "out", kinds=("prefixes",))
    assert found.num_prefix_tokens == 0
    assert kept(tmp_path / "out") == [(0, 7), (1, 7)]


def test_a_sequence_without_its_start_is_no_prefix_of_others_in_its_chunk(
    tmp_path: Path,
) -> None:
    """Tokens 5, 6 at positions 7, 8; then at 0, 1; then at 0, 1 and, after a gap, 2."""
    positions = [[7, 8], [0, 1], [0, 1, 3], [0, 1, 2], [0, 1, 3]]
    words = [[5, 6], [5, 6], [5, 6, 4], [5, 6, 4], [5, 6, 4]]
    with TraceWriter(directory=tmp_path / "in", model=MODEL) as writer:
        lengths = [len(one) for one in words]
        ids = np.zeros((sum(lengths), 1), np.uint8)
        writer.append(
            Chunk(
                experts=(ids, ids),
                token_ids=np.concatenate(words).astype(np.int32),
                sequence_ids=np.repeat(np.arange(5), lengths).astype(np.int32),
                positions=np.concatenate(positions).astype(np.int32),
            )
        )
        writer.finish()
    dedup_trace(Trace(tmp_path / "in"), tmp_path / "out", kinds=("prefixes",))
    first = [(0, 7), (0, 8), (1, 0), (1, 1)]
    assert kept(tmp_path / "out") == [*first, (2, 3), (3, 2), (4, 3)]


def test_same_input_same_bytes_and_provenance(tmp_path: Path) -> None:
    trace = write(tmp_path / "in", [[(0, 0), (1, 1)], [(0, 0), (2, 2)]])
    for name in ("one", "two"):
        dedup_trace(trace, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (
            tmp_path / "two" / name
        ).read_bytes()
    made = Trace(tmp_path / "one").header.provenance
    assert made["source"] == "dedup"
    assert made["trace_sha256"] == trace.sha256


def test_a_quarter_of_the_held_out_rows_repeat_a_profile_row(
    archive: Callable[[str], Path], tmp_path: Path
) -> None:
    """Known of deepseek-v2-lite-intent: 25 % of the odd sequences' rows."""
    source = archive("deepseek-v2-lite-intent")
    import_file(read_npz, "npz", source, tmp_path / "in")
    trace = Trace(tmp_path / "in")
    _, found = dedup_trace(trace, tmp_path / "out", fold=Fold(0, 2))
    assert found.row_share == pytest.approx(0.25, abs=0.01)
    cleaned = Trace(tmp_path / "out")
    _, again = dedup_trace(cleaned, tmp_path / "again", fold=Fold(0, 2))
    assert again.num_repeated_rows == 0
    even = Fold(0, 2)
    assert (
        cleaned.read(Selection(even)).num_tokens == trace.read(Selection(even)).num_tokens
    )
