"""What charts show, against arithmetic by hand."""

import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from placer.affinity import Affinity
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.report.artifact import Artifact
from placer.report.beside import beside_on_counts
from placer.report.chart import Bars, Chart, Lines, Matrix
from placer.report.checkpoint import Checkpoint, TensorGroup
from placer.report.html import page
from placer.report.inspect import summarize
from placer.report.statistics import TraceStatistics
from placer.simulation import PolicyMetrics
from placer.table import Table
from placer.trace import Chunk, Trace, TraceWriter
from tests.plans import unsolved_plan

NAN = float("nan")
NOTHING = {one.name: 0.0 for one in fields(PolicyMetrics)}


def drawn(artifact: Artifact) -> dict[str, Chart]:
    """Return the charts by name: every one says what it shows, its unit and baseline."""
    charts = summarize(artifact).charts
    names = [chart.name for chart in charts]
    assert len(set(names)) == len(names), "names are the anchors of one page"
    for chart in charts:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", chart.name)
        assert chart.title and chart.reading and chart.unit and chart.baseline
        assert chart.panels
    return dict(zip(names, charts, strict=True))


def matrices(chart: Chart) -> list[Any]:
    panels = [panel for _, panel in chart.panels]
    assert all(isinstance(panel, Matrix) for panel in panels)
    return [panel.values for panel in panels if isinstance(panel, Matrix)]


def lines(chart: Chart) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each line of the only panel."""
    ((_, panel),) = chart.panels
    assert isinstance(panel, Lines)
    return {one.label: list(zip(one.x, one.y, strict=True)) for one in panel.lines}


def bars(chart: Chart) -> list[dict[str, float]]:
    panels = [panel for _, panel in chart.panels]
    assert all(isinstance(panel, Bars) for panel in panels)
    return [
        {bar.label: bar.value for bar in panel.bars}
        for panel in panels
        if isinstance(panel, Bars)
    ]


def affinity_of(
    load: Sequence[Sequence[int]],
    transition: Sequence[Any] = (),
    coactivation: Sequence[Any] = (),
) -> Affinity:
    """Counts as they are given; loads alone where there is no coactivation."""
    return Affinity(
        model=ModelSpec(num_experts=tuple(map(len, load)), top_k=1),
        num_tokens=max(map(sum, load)),
        load=tuple(np.array(one, dtype=np.int64) for one in load),
        transition=tuple(np.array(one, dtype=np.int64) for one in transition),
        coactivation=tuple(np.array(one, dtype=np.int64) for one in coactivation),
    )


def trace_of(directory: Path, domains: tuple[str, ...]) -> TraceStatistics:
    """Four tokens that use 2 of 3 experts: two of the first domain, two of the second."""
    chunk = Chunk(
        experts=(
            np.array([[0, 1], [0, 1], [0, 2], [1, 2]], dtype=np.uint8),
            np.array([[0, 1], [0, 2], [1, 2], [0, 1]], dtype=np.uint8),
        ),
        sequence_ids=np.array([0, 0, 1, 1], dtype=np.int32),
        positions=np.array([0, 1, 0, 1], dtype=np.int32),
        domain_ids=np.array([0, 0, 1, 1], dtype=np.uint8) if len(domains) > 1 else None,
    )
    model = ModelSpec(num_experts=(3, 3), top_k=2)
    with TraceWriter(directory=directory, model=model, domains=domains) as writer:
        writer.append(chunk)
        writer.finish()
    return TraceStatistics.of(Trace(directory))


def plan_of(rows: Sequence[Sequence[int]], num_ranks: int, **metrics: Any) -> Plan:
    """A plan of experts in slots, with what was measured on it."""
    sizes = tuple(len(set(row)) for row in rows)
    plan = unsolved_plan(
        ModelSpec(num_experts=sizes, top_k=1),
        Placement(
            physical_to_logical_map=tuple(np.array(row) for row in rows),
            num_experts=sizes,
            num_ranks=num_ranks,
        ),
    )
    plan.metrics.update(metrics)
    return plan


def figures(copies: float, imbalance: float = 1.5) -> dict[str, dict[str, float]]:
    return {
        "fixed": NOTHING
        | {
            "remote_rank_copies_per_token": copies,
            "load_imbalance_mean": imbalance,
        }
    }


def table_of(lookback: int, num_ranks: int, history: Any) -> Table:
    """Three layers and four token ids: id 3 repeats id 0; ids 1 and 2 differ in rank.

    The confidence of ids 0, 1 and 2 is 0, 1/4, 1/4, then 3/4 each, then 1, 1/4, 1/4.
    """
    token_rank = np.zeros((3, 4), np.uint8)
    token_rank[:, 2] = min(1, num_ranks - 1)
    return Table(
        model=ModelSpec(num_experts=(4, 4, 4), top_k=1),
        num_ranks=num_ranks,
        num_nodes=1,
        lookback=lookback,
        token_rank=token_rank,
        token_confidence=np.array(
            [[0, 0.25, 0.25, 0], [0.75] * 4, [1, 0.25, 0.25, 1]], np.float16
        ),
        history_rank=np.zeros((3, num_ranks**lookback), np.uint8),
        history_confidence=np.array(history, np.float16),
        request_score=np.zeros((4, num_ranks), np.float16),
        expert_rank=np.zeros((3, 4), np.uint8),
    )


def sizes_of(**num_bytes: int) -> Checkpoint:
    return Checkpoint(
        model=ModelSpec(num_experts=(2,), top_k=1),
        groups={
            name: TensorGroup(num_tensors=1, dtypes=("F32",), num_bytes=size)
            for name, size in num_bytes.items()
        },
        num_shards=1,
        record=None,
        left_out=(),
    )


def test_load_is_drawn_over_the_mean_of_its_layer() -> None:
    found = drawn(affinity_of([[6, 1, 1, 0], [1, 3]]))
    assert list(found) == ["load"], "loads do not show pairs"
    # Means 2 and 2; layer 1 has no experts 2 and 3.
    (values,) = matrices(found["load"])
    np.testing.assert_allclose(values, [[3, 0.5, 0.5, 0], [0.5, 1.5, NAN, NAN]])


def test_domains_are_drawn_beside_all_tokens(tmp_path: Path) -> None:
    load = drawn(trace_of(tmp_path / "trace", ("code", "prose", "silent")))["load"]
    assert [title for title, _ in load.panels] == [
        "all tokens",
        "domain code",
        "domain prose",
        "domain silent",
    ]
    for values, expected in zip(
        matrices(load),
        [
            # 3, 3 and 2 pairs over their mean of 8/3.
            [[9 / 8, 9 / 8, 3 / 4], [9 / 8, 9 / 8, 3 / 4]],
            # 2, 2, 0 and 2, 1, 1 pairs over 4/3.
            [[3 / 2, 3 / 2, 0], [3 / 2, 3 / 4, 3 / 4]],
            # 1, 1, 2 and 1, 2, 1 pairs over 4/3.
            [[3 / 4, 3 / 4, 3 / 2], [3 / 4, 3 / 2, 3 / 4]],
            # A domain of no token.
            np.zeros((2, 3)),
        ],
        strict=True,
    ):
        np.testing.assert_allclose(values, expected)


@pytest.mark.parametrize("domains", [(), ("code",)])
def test_a_trace_of_one_domain_has_one_panel(
    domains: tuple[str, ...], tmp_path: Path
) -> None:
    load = drawn(trace_of(tmp_path / "trace", domains))["load"]
    assert [title for title, _ in load.panels] == [""]


def test_the_links_of_a_trace_as_lift_by_hand(tmp_path: Path) -> None:
    found = drawn(trace_of(tmp_path / "trace", ()))
    assert list(found) == ["load", "information", "flow", "together"]
    # Pairs: expert 0 leaves for 0 1, 0 2 and 1 2; expert 1 for 0 1, 0 2 and 0 1; expert 2
    # for 1 2 and 0 1. Rows 6, 6, 4 and columns 6, 6, 4 of 16.
    pairs = np.array([[2, 2, 2], [3, 2, 1], [1, 2, 1]])
    chance = np.outer([6, 6, 4], [6, 6, 4]) / 16
    (flow,) = matrices(found["flow"])
    np.testing.assert_allclose(flow, pairs / chance)
    together = matrices(found["together"])
    # Experts 0 1 are used together twice, 0 2 and 1 2 once. Expert 0 is used with 3 others;
    # drawn by load (3 and 2 of 5), 9/5 of them would be expert 1, 6/5 expert 2. Expert 2 is
    # used with 2 others, 3 of 6 each.
    expected = [
        [NAN, 2 / (9 / 5), 1 / (6 / 5)],
        [2 / (9 / 5), NAN, 1 / (6 / 5)],
        [1, 1, NAN],
    ]
    for values in together:
        np.testing.assert_allclose(values, expected)


def test_links_between_layers_of_unequal_size() -> None:
    found = drawn(
        affinity_of(
            [[4, 4], [4, 4, 0], [6, 2]],
            transition=[[[4, 0, 0], [0, 4, 0]], [[3, 1], [3, 1], [0, 0]]],
            coactivation=[
                [[0, 2], [2, 0]],
                [[0, 1, 0], [1, 0, 0], [0, 0, 0]],
                [[0, 2], [2, 0]],
            ],
        )
    )
    first, second = matrices(found["flow"])
    # Each expert is followed by half of the others by chance; expert 2 has no pair at all.
    np.testing.assert_allclose(first, [[2, 0, NAN], [0, 2, NAN]])
    np.testing.assert_allclose(second, [[1, 1], [1, 1], [NAN, NAN]])
    assert [title for title, _ in found["flow"].panels] == [
        "layer 0 to 1 (1.000 bits)",
        "layer 1 to 2 (0.000 bits)",
    ]
    # An expert that names the next one of two says one bit, one that does not says none.
    # By chance: one row and one column more than one, over 2 ln 2 times 8 pairs.
    chance = pytest.approx(1 / (2 * np.log(2) * 8))
    assert lines(found["information"]) == {
        "to the next layer": [(0, pytest.approx(1)), (1, pytest.approx(0))],
        "chance": [(0, chance), (1, chance)],
    }
    # Two experts of a layer that are always used together: as often as the load says.
    np.testing.assert_allclose(matrices(found["together"])[0], [[NAN, 1], [1, NAN]])


def test_one_layer_has_no_next_layer() -> None:
    found = drawn(affinity_of([[2, 2]], coactivation=[[[0, 1], [1, 0]]]))
    assert list(found) == ["load", "together"]


@pytest.mark.filterwarnings("error")
def test_counts_of_nothing_are_drawn() -> None:
    found = drawn(
        affinity_of(
            [[0, 0], [0, 0]],
            transition=[np.zeros((2, 2))],
            coactivation=[np.zeros((2, 2)), np.zeros((2, 2))],
        )
    )
    (load,) = matrices(found["load"])
    np.testing.assert_allclose(load, np.zeros((2, 2)))
    for name in ("flow", "together"):
        assert all(np.isnan(values).all() for values in matrices(found[name]))


@pytest.mark.parametrize(("experts", "shown"), [(32, 3), (256, 2), (512, 1)])
def test_the_most_linked_layers_are_shown_that_fit_the_page(
    experts: int, shown: int
) -> None:
    none = np.ones((experts, experts), dtype=np.int64)
    diagonal = none + 1000 * np.eye(experts, dtype=np.int64)
    found = drawn(affinity_of([[1] * experts] * 4, [none, diagonal, none], [none] * 4))
    titles = [title.partition(" (")[0] for title, _ in found["flow"].panels]
    expected = {3: ["layer 0 to 1", "layer 1 to 2", "layer 2 to 3"]}
    expected |= {2: ["layer 0 to 1", "layer 1 to 2"], 1: ["layer 1 to 2"]}
    assert titles == expected[shown]
    values = matrices(found["flow"])[titles.index("layer 1 to 2")]
    assert values.shape == (experts, experts), "each expert has a row of its own"
    # Every row and column has one pair for each expert, and 1,000 more.
    whole = experts * (experts + 1000)
    assert values[5, 5] == pytest.approx(1001 * whole / (experts + 1000) ** 2)


def test_replicas_are_counted_per_expert() -> None:
    found = drawn(plan_of([[2, 0, 1, 0], [1, 0]], num_ranks=2))
    assert list(found) == ["replicas"], "nothing was measured, no load was given"
    (values,) = matrices(found["replicas"])
    np.testing.assert_allclose(values, [[2, 1, 1], [1, 1, NAN]])
    assert found["replicas"].table is not None
    assert found["replicas"].table.rows[0] == (0, 1, 0, "0 1")
    assert drawn(plan_of([[1, 0]], num_ranks=2)) == {}


def test_rank_load_by_hand() -> None:
    plan = plan_of([[2, 0, 1, 0], [1, 0, 2, 0]], num_ranks=2)
    counts = affinity_of([[4, 1, 3], [4, 2, 2]])
    found = drawn(beside_on_counts(plan, {}, counts))
    before, after = matrices(found["rank-load"])
    # Rank 0 serves expert 2 and half of expert 0, 3 + 2 pairs of 8; rank 1 the rest.
    np.testing.assert_allclose(after, [[5 / 4, 3 / 4], [1, 1]])
    assert before.shape == (2, 2)
    assert lines(found["busiest-rank"])["this plan"] == [(0, 5 / 4), (1, 1)]


def test_a_plan_is_compared_on_what_was_held_out() -> None:
    plan = plan_of(
        [[1, 0]],
        num_ranks=2,
        profile=figures(0.125),
        heldout=figures(0.25, 1.25),
        baselines={
            "contiguous": figures(1.0),
            "balanced": figures(0.5),
            "eplb": figures(0.75, 1.125),
        },
    )
    sent, busiest = bars(drawn(plan)["comparison"])
    assert list(sent.items()) == [
        ("contiguous", 1.0),
        ("EPLB, equal slots", 0.75),
        ("balanced (greedy)", 0.5),
        ("this plan", 0.25),
    ]
    assert busiest["EPLB, equal slots"] == 1.125
    assert busiest["this plan"] == 1.25


@pytest.mark.parametrize(
    ("engine", "value", "words"),
    [
        ("sglang-deepep", 3.0, "copies sent between nodes"),
        ("trtllm-onesided", 2.0, "copies sent per token"),
        ("sglang-none", None, "every placement sends the same"),
        ("sglang-deepep-ll", None, "every placement sends the same"),
    ],
)
def test_a_plan_is_compared_by_what_its_engine_sends(
    engine: str, value: float | None, words: str
) -> None:
    measured = NOTHING | {
        "remote_pairs_per_token": 1.0,
        "remote_rank_copies_per_token": 2.0,
        "remote_node_copies_per_token": 3.0,
        "load_imbalance_mean": 4.0,
    }
    plan = plan_of(
        [[1, 0]], num_ranks=2, profile={"fixed": measured}, heldout={"fixed": measured}
    )
    placement = replace(plan.placement, num_nodes=2)
    provenance = {**plan.provenance, "engine": engine}
    plan = replace(plan, placement=placement, provenance=provenance)
    chart = drawn(plan)["comparison"]
    *sent, busiest = bars(chart)
    assert busiest == {"this plan": 4.0}
    assert sent == ([] if value is None else [{"this plan": value}])
    told = [title for title, _ in chart.panels]
    told.append(summarize(plan).headline.verdict)
    assert any(words in text for text in told)


def test_a_plan_is_compared_on_its_profile_where_nothing_was_held_out() -> None:
    plan = plan_of([[1, 0]], num_ranks=2, profile=figures(0.0), heldout=None)
    sent, _ = bars(drawn(plan)["comparison"])
    assert sent == {"this plan": 0.0}
    (first, *_) = summarize(plan).headline.misleading
    assert first.startswith("Not held out")


def test_the_gap_of_each_layer_is_drawn_where_it_is_known() -> None:
    plan = plan_of([[1, 0], [0, 1]], num_ranks=2)
    assert "proof" not in drawn(plan)
    bounded = msgspec.structs.replace(plan.solver, objective=1.0, bound=0.75, gap=0.25)
    told = [one.title for one in summarize(replace(plan, solver=bounded)).sections]
    assert any("placer prove PLAN TRACE --details" in title for title in told)
    solver = msgspec.structs.replace(bounded, layer_gaps=(0.0, 0.25))
    known = replace(plan, solver=solver)
    chart = drawn(known)["proof"]
    assert lines(chart) == {"this plan": [(0.0, 0.0), (1.0, 25.0)]}
    assert "1 of 2 layers are proved optimal" in chart.reading
    told = [one.title for one in summarize(known).sections]
    assert not any("placer prove" in title for title in told)


def test_placements_have_the_same_colour_in_every_report() -> None:
    for names in (["contiguous"], ["eplb", "contiguous"], ["random", "exflow", "eplb"]):
        plan = plan_of(
            [[1, 0]],
            num_ranks=2,
            profile=figures(1.0),
            baselines={name: figures(2.0) for name in names},
        )
        ((_, panel), _) = drawn(plan)["comparison"].panels
        assert isinstance(panel, Bars)
        kinds = {bar.label: bar.kind for bar in panel.bars}
        assert kinds["this plan"] == "placer"
        assert kinds.get("EPLB, equal slots", "eplb") == "eplb"
        assert kinds.get("contiguous", "contiguous") == "contiguous"
        assert kinds.get("exflow", "other") == "other"


def test_confidence_by_hand() -> None:
    # Layer 0 has no history; what the file holds there must not count.
    history = [[0.875] * 4, [0.5, 0.5, 1, 1], [0.25] * 4]
    found = drawn(table_of(1, 4, history))
    shares = lines(found["confidence"])
    for name, expected in (
        # Ids 0, 1 and 2 in three layers; 0.5 begins its bin, and 1 ends the last.
        ("token (T)", {0: 1 / 9, 5: 4 / 9, 15: 3 / 9, 19: 1 / 9}),
        ("history (A)", {5: 4 / 8, 10: 2 / 8, 19: 2 / 8}),
    ):
        xs, ys = zip(*shares[name], strict=True)
        np.testing.assert_allclose(xs, [(number + 0.5) / 20 for number in range(20)])
        np.testing.assert_allclose(ys, [expected.get(number, 0) for number in range(20)])
    # With id 3 the medians would be 0.125, 0.75 and 0.625.
    assert lines(found["confidence-by-layer"]) == {
        "token (T)": [(0, 0.25), (1, 0.75), (2, 0.25)],
        "history (A)": [(1, 0.75), (2, 0.25)],
    }
    ((_, panel),) = found["confidence-by-layer"].panels
    assert isinstance(panel, Lines)
    assert panel.rule == (0.25, "chance, 1/R")


def test_a_table_without_lookback_has_one_history_per_layer() -> None:
    found = drawn(table_of(0, 2, [[0.5], [0.25], [0.5]]))
    histories = lines(found["confidence-by-layer"])["history (A)"]
    assert histories == [(0, 0.5), (1, 0.25), (2, 0.5)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lookback", [3, 4])
def test_no_layer_has_history_where_lookback_is_as_long_as_the_model(
    lookback: int,
) -> None:
    found = drawn(table_of(lookback, 2, np.full((3, 2**lookback), 0.5)))
    shares = lines(found["confidence"])
    assert sum(y for _, y in shares["token (T)"]) == pytest.approx(1)
    assert all(y == 0 for _, y in shares["history (A)"])
    assert list(lines(found["confidence-by-layer"])) == ["token (T)"]


def test_bytes_of_a_checkpoint_in_megabytes() -> None:
    found = drawn(sizes_of(experts=1_234_560_000, router=260_000, other=0))
    ((_, panel),) = found["bytes"].panels
    assert isinstance(panel, Bars)
    assert [(bar.label, bar.value, bar.text) for bar in panel.bars] == [
        ("experts", pytest.approx(1234.56), "1,234.6 MB"),
        ("router", pytest.approx(0.26), "0.3 MB"),
        ("other", 0, "0.0 MB"),
    ]


@pytest.mark.parametrize(
    "build",
    [
        lambda folder: trace_of(folder, ("code", "prose")),
        lambda _: affinity_of([[2, 1], [0, 0, 3]]),
        lambda _: plan_of([[2, 0, 1, 0]], 2, profile=figures(1.0)),
        lambda _: table_of(1, 2, np.full((3, 2), 0.5)),
        lambda _: sizes_of(experts=3, router=2, other=1),
    ],
    ids=["trace", "affinity", "plan", "table", "checkpoint"],
)
def test_the_same_things_are_drawn_to_the_same_bytes(
    build: Callable[[Path], Artifact], tmp_path: Path
) -> None:
    once, again = (
        page("name", summarize(artifact))
        for artifact in (build(tmp_path / "one"), build(tmp_path / "two"))
    )
    assert once == again


def test_names_stay_text_on_the_page() -> None:
    hostile = "</script><script>alert(1)</script>"
    plan = plan_of(
        [[1, 0]],
        num_ranks=2,
        profile=figures(1.0),
        baselines={hostile: figures(2.0)},
    )
    text = page(hostile, summarize(plan))
    assert text.count("alert(1)") >= 3, "title, heading and bar"
    assert "<script" not in text
