"""Traces that were spoiled on purpose, and real ones that must not be suspected."""

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from placer.cli.main import app
from placer.errors import PlacerError
from placer.report.links import links_of
from placer.trace import Chunk, Selection, Trace
from placer.trace.doubts import doubtful_follow, doubts
from placer.trace.expert_order import listed_by_id
from placer.trace.imported import import_file
from placer.trace.npz import read_npz
from placer.trace.rewrite import merge_traces, split_trace
from placer.trace.warm_up import warm_up_tokens

SIZES = (16, 16, 16, 16)
TOP_K = 4


def call(*words: object) -> Result:
    """Run a command; errors come through, because only ``main`` turns them to codes."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def imported(folder: Path, name: str = "in", **arrays: np.ndarray) -> Trace:
    """Import ``experts`` ``[T, L, k]`` and what else is given; 30 tokens a sequence."""
    sequence_ids = np.arange(len(arrays["experts"])) // 30
    np.savez(folder / f"{name}.npz", sequence_ids=sequence_ids, **arrays)
    import_file(read_npz, "npz", folder / f"{name}.npz", folder / name)
    return Trace(folder / name)


@pytest.fixture
def experts(make_chunk: Callable[..., Chunk]) -> np.ndarray:
    chunk = make_chunk(num_tokens=600, num_experts=SIZES, top_k=TOP_K)
    return np.stack(chunk.experts, axis=1)


@given(
    runs=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 130)), min_size=1, max_size=6)
)
def test_long_runs_are_found_as_by_counting(runs: list[tuple[int, int]]) -> None:
    """Rows of few choices: only runs tell. The first token of each row stays."""
    rows = [row for row, number in runs for _ in range(number)]
    expected = [False] * len(rows)
    seen, begin = set(), 0
    while begin < len(rows):
        end = begin
        while end < len(rows) and rows[end] == rows[begin]:
            end += 1
        if end - begin >= 64:
            for place in range(begin, end):
                expected[place] = place > begin or rows[begin] in seen
            seen.add(rows[begin])
        begin = end
    found = warm_up_tokens(np.array(rows, np.uint64), np.zeros(len(rows), np.int32), 1)
    assert found.tolist() == expected


@pytest.mark.parametrize("where", ["head", "tail", "short", "alternating", "padding"])
def test_dummy_tokens_are_told_and_the_remedy_removes_them(
    experts: np.ndarray, tmp_path: Path, where: str
) -> None:
    one, two = experts[:1], experts[1:2]
    with_dummies = {
        "head": lambda: np.concatenate([np.repeat(one, 900, 0), experts]),
        "tail": lambda: np.concatenate([experts, np.repeat(one, 70, 0)]),
        "short": lambda: np.concatenate([experts[:98], np.repeat(one, 40, 0)]),
        "alternating": lambda: np.concatenate([np.tile(one, (200, 1, 1)), experts]),
        "padding": lambda: experts,
    }[where]()
    if where == "alternating":
        with_dummies[:200:2] = two
    if where == "padding":  # every eighth row of a batch
        with_dummies = with_dummies.copy()
        with_dummies[::8] = one
    trace = imported(tmp_path, experts=with_dummies)
    (told,) = doubts(trace)
    assert "warm-up" in told
    command = told.split("Remove them: placer ")[1].replace(
        "CLEANED", str(tmp_path / "out")
    )
    call(*shlex.split(command))
    cleaned = Trace(tmp_path / "out")
    assert list(doubts(cleaned)) == []
    # All that is real is left.
    rows = {row.tobytes() for row in np.stack(cleaned.read().experts, axis=1)}
    assert rows == {row.tobytes() for row in with_dummies.astype(np.uint8)}


def test_a_common_first_token_is_no_warm_up(experts: np.ndarray, tmp_path: Path) -> None:
    """Sequences of 10 tokens that begin alike: one row is a tenth of all tokens."""
    alike = experts.copy()
    alike[::10] = experts[0]
    np.savez(tmp_path / "x.npz", experts=alike, sequence_ids=np.arange(600) // 10)
    import_file(read_npz, "npz", tmp_path / "x.npz", tmp_path / "x")
    assert list(doubts(Trace(tmp_path / "x"))) == []


@pytest.mark.parametrize("name", ["gpt-oss-20b", "deepseek-v2-lite-intent"])
def test_real_traces_are_not_suspected(
    archive: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    with np.load(archive(name)) as arrays:
        experts = arrays["experts"][:8000]
    trace = imported(tmp_path, name, experts=experts)
    assert list(doubts(trace)) == []
    assert trace.header.experts_by_weight


def test_rows_by_id_are_found_whatever_comes_last(experts: np.ndarray) -> None:
    ascending = np.sort(experts, axis=2)
    assert listed_by_id(ascending)
    assert not listed_by_id(experts)
    # CUDA's topk: the lightest last, here the expert that was listed last.
    lightest = experts[..., -1:]
    others = np.sort(experts[..., :-1], axis=2)
    assert listed_by_id(np.concatenate([others, lightest], axis=2))
    # Half of the rows, or of the layers: no engine lists so.
    half = np.where(np.arange(600)[:, None, None] % 2, ascending, experts)
    assert not listed_by_id(half)
    one_layer = experts.copy()
    one_layer[:, 0] = ascending[:, 0]
    assert not listed_by_id(one_layer)
    assert not listed_by_id(ascending[:20])  # too few to tell
    assert not listed_by_id(ascending[..., :1])


def test_rows_by_id_are_recorded_and_what_needs_the_order_is_left_out(
    experts: np.ndarray, tmp_path: Path
) -> None:
    trace = imported(tmp_path, experts=np.sort(experts, axis=2))
    assert '"experts_by_weight":false' in (trace.directory / "trace.json").read_text()
    found = links_of(trace)
    assert found.information[0].top1 is None
    assert (
        found.information[0].pairs
        == links_of(imported(tmp_path, "ordered", experts=experts)).information[0].pairs
    )
    assert found.reach == ()
    assert "smallest id" in next(doubtful_follow(trace, "follow"))
    assert list(doubtful_follow(trace, "fixed")) == []
    # What is made of it is no better ordered.
    split_trace(trace, tmp_path / "odd", period="0/2")
    assert not Trace(tmp_path / "odd").header.experts_by_weight
    merge_traces([Trace(tmp_path / "ordered"), trace], tmp_path / "both")
    assert not Trace(tmp_path / "both").header.experts_by_weight


def test_recorded_weights_order_the_experts(experts: np.ndarray, tmp_path: Path) -> None:
    weights = np.sort(np.random.default_rng(0).random(experts.shape), axis=2)[..., ::-1]
    by_id = np.argsort(experts, axis=2)
    np.savez(
        tmp_path / "x.npz",
        experts=np.take_along_axis(experts, by_id, axis=2),
        weights=np.take_along_axis(weights, by_id, axis=2),
        sequence_ids=np.arange(600) // 30,
    )
    told = call("import", "npz", tmp_path / "x.npz", "--out", tmp_path / "x").stderr
    trace = Trace(tmp_path / "x")
    assert (np.stack(trace.read().experts, axis=1) == experts).all()
    assert trace.header.experts_by_weight
    moved = int((by_id != np.arange(TOP_K)).any(axis=2).sum())
    assert f"{moved:,} of {600 * len(SIZES):,} rows" in told


def test_layers_of_zeros_of_a_top_1_model_are_refused(
    experts: np.ndarray, tmp_path: Path
) -> None:
    dense = experts[..., :1].copy()
    dense[:, 0] = 0
    with pytest.raises(PlacerError, match="layer 0 is all zeros") as error:
        imported(tmp_path, experts=dense)
    assert "--model DIR (a folder with its config.json" in error.value.hint
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize("expert", [0, 5])
def test_a_router_that_uses_one_expert_is_told(make_chunk, tmp_path, expert) -> None:
    """As in traces of before such layers were refused, and of bound models."""
    chunk = make_chunk(num_experts=(8, 8), top_k=1, num_tokens=60)
    dense = np.stack([np.full_like(chunk.experts[0], expert), chunk.experts[1]], axis=1)
    trace = imported(tmp_path, experts=dense)
    (told,) = doubts(trace, Selection())
    assert f"every token goes to expert {expert} in MoE layers 0:" in told
    assert ("import the file again with --model" in told) == (expert == 0)


def test_phases_of_an_archive_are_kept(experts: np.ndarray, tmp_path: Path) -> None:
    phase = np.arange(600) % 30 > 10
    trace = imported(tmp_path, experts=experts, phase=phase.astype(np.uint8))
    assert (trace.read().phase == phase).all()
