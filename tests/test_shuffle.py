"""The file that a runtime takes along: alone, and with the answers of placer itself."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import placer.shuffle
from placer.placement.reference import contiguous
from placer.planning.tables import TableOptions, make_table
from placer.run.writing import write_tensors
from placer.shuffle import RANK_HEADER, CombinedRule, RequestRouter, ShuffleTable
from placer.table.lookup import LayerTable, known_ids
from placer.table.table import Table
from placer.trace import Trace

SCORE = np.array([[3, 2, 1], [0, 0, 9]], dtype=np.float16)


@pytest.fixture
def table(
    make_trace: Callable[..., Trace], write_plan: Callable[..., Path], tmp_path: Path
) -> Path:
    trace = make_trace()
    plan = write_plan(trace.model, contiguous(trace.model.num_experts, 4))
    make_table(plan, trace, fold=None, options=TableOptions()).table.write(
        tmp_path / "table"
    )
    return tmp_path / "table"


def test_homes_are_those_that_placer_looks_up(table: Path) -> None:
    own, theirs = Table.read(table), ShuffleTable.read(table)
    rng = np.random.default_rng(0)
    ids = rng.integers(-5, 70, size=300)
    fallback = rng.integers(4, size=300)
    history = [rng.integers(4, size=300) for _ in range(3)]
    assert {own.lookback, len(history)} != {0}
    for layer in range(3):
        past = history[:layer]
        known = known_ids(ids, 300, own.vocab_size)
        expected = LayerTable.of(own, layer).homes(known, past, fallback)
        found = theirs.homes(layer, ids, past, fallback)
        assert found[0].tolist() == expected[0].tolist()
        assert found[1].tolist() == expected[1].tolist()


def small_table(num_ranks: int, confidences: list[float]) -> ShuffleTable:
    """One layer: id v has rank v, every history the last rank."""
    ranks = np.arange(len(confidences), dtype=np.uint16)[None]
    return ShuffleTable(
        num_ranks=num_ranks,
        lookback=1,
        token_rank=ranks,
        token_confidence=np.array([confidences], dtype=np.float16),
        history_rank=np.full((1, num_ranks), num_ranks - 1, dtype=np.uint16),
        history_confidence=np.full((1, num_ranks), 0.5, dtype=np.float16),
        request_score=np.zeros((len(confidences), num_ranks), dtype=np.float16),
        expert_rank=np.zeros((1, 1), dtype=np.uint16),
    )


@pytest.mark.parametrize("num_ranks", [7, 300, 65_536])
def test_the_surer_of_token_and_history_wins_and_a_tie_goes_to_the_token(
    num_ranks: int,
) -> None:
    table = small_table(num_ranks, [0.0, 0.4998, 0.5, 0.5005, 1.0])
    ids, last = np.array([0, 1, 2, 3, 4, 5, -1]), num_ranks - 1
    home, sure = table.homes(0, ids, [np.full(7, last)], np.full(7, 2))
    assert home.tolist() == [last, last, 2, 3, 4, last, last]
    assert sure[[0, 2, 4, 5]].tolist() == [0.5, 0.5, 1.0, 0.5]
    home, sure = table.homes(0, ids, [], np.full(7, 6))
    assert home.tolist() == [0, 1, 2, 3, 4, 6, 6]
    assert sure[[0, 4, 5, 6]].tolist() == [0.0, 1.0, -1.0, -1.0]


@pytest.mark.parametrize("wrong", [-0.5, 1.5, float("nan"), float("inf")])
def test_what_is_no_confidence_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        small_table(7, [0.5, wrong])


@pytest.mark.parametrize("wrong", [-0.5, 1.5, float("nan"), float("inf")])
def test_what_is_no_rate_is_refused(wrong: float) -> None:
    plain = small_table(7, [0.5])
    scores = np.full((1, 1, 7), wrong, dtype=np.float16)
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        dataclasses.replace(plain, token_score=scores)


def drawn_rule(num_experts: int, num_ranks: int, depth: int = 2) -> CombinedRule:
    """A rule of three layers whose numbers are not round."""
    rng = np.random.default_rng(num_experts)

    def drawn(*shape: int) -> np.ndarray:
        return rng.normal(scale=0.1, size=shape).astype(np.float32)

    return CombinedRule(
        token_weight=drawn(3),
        unknown_score=rng.random((3, num_ranks)).astype(np.float16),
        combined_bias=drawn(3, num_ranks),
        expert_score=drawn(3, depth, num_experts, num_ranks).astype(np.float16),
        home_price=drawn(3, num_ranks),
    )


@settings(deadline=None, max_examples=40)
@given(
    num_experts=st.sampled_from([1, 3, 16, 256, 300]),
    top_k=st.integers(1, 5),
    num_ranks=st.sampled_from([1, 4, 9, 300]),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int32, np.int64]),
    seed=st.integers(0, 99),
)
def test_combined_scores_are_sums_whatever_the_batch(
    num_experts: int, top_k: int, num_ranks: int, dtype: type, seed: int
) -> None:
    """Against float64; many tokens and one alone give the same bits."""
    rng = np.random.default_rng(seed)
    rule = drawn_rule(num_experts, num_ranks)
    token_score = rng.random((20, num_ranks)).astype(np.float16)
    ids = rng.integers(-3, 25, size=300)
    highest = min(num_experts, 256) if dtype is np.uint8 else num_experts
    past = [rng.integers(highest, size=(300, top_k)).astype(dtype).T for _ in range(2)]
    found = rule.scores(2, token_score, ids, past)
    known = (ids >= 0) & (ids < 20)
    rows = np.where(
        known[:, None], token_score[np.where(known, ids, 0)], rule.unknown_score[2]
    )
    expected = rows.astype(np.float64) * rule.token_weight[2] + rule.combined_bias[2]
    for back, experts in enumerate(reversed(past)):
        for chosen in experts:
            expected += rule.expert_score[2, back, chosen]
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5
    alone = rule.scores(2, token_score, ids[7:8], [np.array(one[:, 7:8]) for one in past])
    assert alone.tobytes() == found[7:8].tobytes()
    worth = found - rule.home_price[2]
    homes, sure = rule.homes(2, found)
    assert homes.tolist() == [row.index(max(row)) for row in worth.tolist()]
    assert sure.tolist() == [row[home] for row, home in zip(found, homes, strict=True)]
    free = dataclasses.replace(rule, home_price=np.zeros_like(rule.home_price))
    tied = found.round(1)
    assert free.homes(2, tied)[0].tolist() == [row.index(max(row)) for row in tied.tolist()]


def test_every_rate_of_float16_is_read_exactly() -> None:
    every = np.arange(0x3C01, dtype=np.uint16).view(np.float16)
    rule = dataclasses.replace(
        drawn_rule(2, 1),
        token_weight=np.ones(3, dtype=np.float32),
        combined_bias=np.zeros((3, 1), dtype=np.float32),
    )
    found = rule.scores(1, every[:, None], np.arange(len(every)), [])
    assert found[:, 0].tolist() == every.tolist()


@pytest.mark.parametrize("wrong", [-1, 8])
@pytest.mark.parametrize("num_tokens", [1, 2000])
def test_experts_that_do_not_exist_are_refused(wrong: int, num_tokens: int) -> None:
    past: list[np.ndarray] = [np.full((2, num_tokens), wrong)]
    with pytest.raises(IndexError, match=r"outside 0\.\.7"):
        drawn_rule(8, 4).scores(
            1, np.zeros((5, 4), np.float16), np.zeros(num_tokens, np.int64), past
        )


def test_majority_ranks_by_counting(table: Path) -> None:
    """Top-5 of 8 experts on 4 ranks: many ties, which go to the rank named first."""
    found = ShuffleTable.read(table)
    rng = np.random.default_rng(0)
    experts = np.array([rng.permutation(8)[:5] for _ in range(200)])
    ranks = found.majority_ranks(1, experts).tolist()
    for rank, chosen in zip(ranks, (experts // 2).tolist(), strict=True):
        most = max(chosen.count(one) for one in chosen)
        assert rank == next(one for one in chosen if chosen.count(one) == most)


def test_the_file_works_where_there_is_no_placer(table: Path, tmp_path: Path) -> None:
    shutil.copy(placer.shuffle.__file__, tmp_path / "vendored.py")
    code = (
        "import sys; sys.modules['placer'] = None; sys.modules['torch'] = None\n"
        "import vendored\n"
        f"table = vendored.ShuffleTable.read({str(table)!r})\n"
        "router = vendored.RequestRouter(table.request_score)\n"
        "print(router.headers('a', [1, 2, 3]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert RANK_HEADER in done.stdout


def test_another_file_is_refused(tmp_path: Path) -> None:
    header = {"kind": "affinity", "schema_version": 1}
    write_tensors(tmp_path / "a", {"load.0": np.zeros(2, np.int64)}, header)
    with pytest.raises(ValueError, match="is affinity of schema_version 1"):
        ShuffleTable.read(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match=r"is not a table .*: placer tables PLAN TRACE"):
        ShuffleTable.read(tmp_path / "b")


def test_a_request_goes_where_its_prompt_points_and_stays() -> None:
    router = RequestRouter(SCORE, max_imbalance=3.0)
    assert router.route("a", [0, 0]) == 0
    assert router.route("b", [1]) == 2
    assert router.route("a", [1] * 50) == 0, "sticky, whatever is asked later"
    assert router.load == [2, 0, 1]
    router.finish("a")
    router.finish("never seen")
    assert router.load == [0, 0, 1]
    assert router.route("a", [1]) == 2, "finished, so free to go elsewhere"


def test_the_cap_sends_the_next_request_elsewhere() -> None:
    router = RequestRouter(SCORE, max_imbalance=1.0)
    assert [router.route(n, [0]) for n in range(4)] == [0, 1, 2, 0]


def test_only_the_prefix_is_looked_at_and_unknown_ids_count_nothing() -> None:
    router = RequestRouter(SCORE, prefix=2, max_imbalance=3.0)
    assert router.route("a", [0, 0, 1, 1, 1, 1]) == 0
    assert router.route("b", [99, -1, 1]) == 1, "no score: the least loaded"
    assert router.headers("c", [1]) == {"X-Data-Parallel-Rank": "2"}


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    cap=st.floats(1.0, 2.0),
    seed=st.integers(0, 9),
)
def test_no_rank_is_over_the_cap_by_more_than_one_request(
    lengths: list[int], cap: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    router = RequestRouter(rng.random((8, 4)).astype(np.float16), max_imbalance=cap)
    for number, length in enumerate(lengths):
        router.route(number, rng.integers(8, size=length).tolist())
        most = cap * sum(router.load) / 4
        assert max(router.load) <= most + max(lengths)
    for number in range(len(lengths)):
        router.finish(number)
    assert router.load == [0, 0, 0, 0]


def test_senseless_limits_are_refused() -> None:
    for limits in ({"max_imbalance": 0.9}, {"prefix": 0}):
        with pytest.raises(ValueError, match="must be at least 1 and prefix positive"):
            RequestRouter(SCORE, **limits)
