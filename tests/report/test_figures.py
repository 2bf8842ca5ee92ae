"""Drawings, read back from the JSON that the page carries, against arithmetic by hand."""

import base64
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.affinity import Affinity
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.report.artifact import Artifact
from placer.report.checkpoint import Checkpoint, TensorGroup
from placer.report.figures import Drawing, draw
from placer.report.html import page
from placer.report.inspect import summarize
from placer.report.statistics import TraceStatistics
from placer.table import Table
from placer.trace import Chunk, Trace, TraceWriter
from tests.plans import unsolved_plan

NAN = float("nan")
# One over 50: the histogram's bins are numbered by the confidence over this.
BIN = 0.02


def shown(drawing: Drawing) -> dict[str, Any]:
    """Return data and layout as the page holds them, with packed arrays unpacked."""

    def unpacked(value: dict[str, Any]) -> Any:
        if "bdata" not in value:
            return value
        flat = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        shape = [int(size) for size in str(value.get("shape", flat.size)).split(",")]
        return flat.reshape(shape).tolist()

    return json.loads(drawing.figure.to_json(), object_hook=unpacked)


def drawn(artifact: Artifact, **options: Any) -> dict[str, dict[str, Any]]:
    """Return what each drawing shows, by its name."""
    drawings = draw(artifact, **options)
    names = [drawing.name for drawing in drawings]
    assert len(set(names)) == len(names), "names are the anchors of one page"
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names)
    assert all(drawing.title and drawing.caption for drawing in drawings)
    return {drawing.name: shown(drawing) for drawing in drawings}


def assert_drawn(found: Any, expected: Any) -> None:
    """Compare values, of which those that are not there are no numbers."""
    np.testing.assert_allclose(np.array(found, dtype=float), expected, rtol=1e-6)


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
        token_expert=None,
        sequence_expert=None,
        provenance={},
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


def copies(**policies: float) -> dict[str, dict[str, float]]:
    return {name: {"remote_rank_copies_per_token": n} for name, n in policies.items()}


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
    (heatmap,) = found["load"]["data"]
    # Means 2 and 2; layer 1 has no experts 2 and 3.
    assert_drawn(heatmap["z"], [[3, 0.5, 0.5, 0], [0.5, 1.5, NAN, NAN]])
    assert (heatmap["zmin"], heatmap["zmax"]) == (0, 3)
    assert heatmap["colorbar"]["title"]["text"] == "load / mean"
    layout = found["load"]["layout"]
    assert layout["xaxis"]["title"]["text"] == "logical expert"
    assert layout["yaxis"]["title"]["text"] == "MoE layer"
    assert layout["yaxis"]["autorange"] == "reversed", "the first layer is on top"
    assert "sliders" not in layout


def test_domains_are_a_choice_on_one_colour_scale(tmp_path: Path) -> None:
    statistics = trace_of(tmp_path / "trace", ("code", "prose", "silent"))
    load = drawn(statistics)["load"]
    assert [heatmap["visible"] for heatmap in load["data"]] == [True, False, False, False]
    for heatmap, expected in zip(
        load["data"],
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
        assert_drawn(heatmap["z"], expected)
        assert (heatmap["zmin"], heatmap["zmax"]) == (0, 1.5)
    (slider,) = load["layout"]["sliders"]
    assert [step["label"] for step in slider["steps"]] == [
        "all tokens",
        "domain code",
        "domain prose",
        "domain silent",
    ]
    for number, step in enumerate(slider["steps"]):
        assert step["method"] == "update"
        (changed,) = step["args"]
        assert changed == {"visible": [n == number for n in range(4)]}


@pytest.mark.parametrize("domains", [(), ("code",)])
def test_a_trace_of_one_domain_has_nothing_to_choose(
    domains: tuple[str, ...], tmp_path: Path
) -> None:
    load = drawn(trace_of(tmp_path / "trace", domains))["load"]
    assert len(load["data"]) == 1
    assert "sliders" not in load["layout"]


def test_the_links_of_a_trace_by_hand(tmp_path: Path) -> None:
    found = drawn(trace_of(tmp_path / "trace", ()))
    assert list(found) == ["load", "transition", "information", "coactivation"]
    (transition,) = found["transition"]["data"]
    # Expert 0 of layer 0 leaves for 0 1, 0 2 and 1 2; expert 1 for 0 1, 0 2 and 0 1;
    # expert 2 for 1 2 and 0 1.
    assert_drawn(
        transition["z"],
        [[1 / 3, 1 / 3, 1 / 3], [3 / 6, 2 / 6, 1 / 6], [1 / 4, 2 / 4, 1 / 4]],
    )
    first, second = found["coactivation"]["data"]
    # Experts 0 1 are used together twice, 0 2 and 1 2 once, in the second layer the same.
    shares = [[0, 2 / 3, 1 / 3], [2 / 3, 0, 1 / 3], [1 / 2, 1 / 2, 0]]
    assert_drawn(first["z"], shares)
    assert_drawn(second["z"], shares)
    (slider,) = found["coactivation"]["layout"]["sliders"]
    assert [step["label"] for step in slider["steps"]] == ["layer 0", "layer 1"]


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
    first, second = found["transition"]["data"]
    assert_drawn(first["z"], [[1, 0, 0], [0, 1, 0]])
    # No token leaves expert 2: its row says nothing, and is no division by zero.
    assert_drawn(second["z"], [[3 / 4, 1 / 4], [3 / 4, 1 / 4], [0, 0]])
    (slider,) = found["transition"]["layout"]["sliders"]
    assert [step["label"] for step in slider["steps"]] == ["layer 0 to 1", "layer 1 to 2"]
    (bars,) = found["information"]["data"]
    assert bars["x"] == ["0 to 1", "1 to 2"]
    # An expert that names the next one of two says one bit, one that does not says none.
    assert_drawn(bars["y"], [1, 0])
    assert found["information"]["layout"]["xaxis"]["type"] == "category"
    for heatmap, expected in zip(
        found["coactivation"]["data"],
        [
            [[0, 1 / 2], [1 / 2, 0]],
            [[0, 1 / 4, 0], [1 / 4, 0, 0], [0, 0, 0]],
            # Of the 6 tokens of expert 0 two also use expert 1, which has no others.
            [[0, 1 / 3], [1, 0]],
        ],
        strict=True,
    ):
        assert_drawn(heatmap["z"], expected)
        assert heatmap["zmax"] == 1, "one scale for all layers"


def test_one_layer_has_no_next_layer() -> None:
    found = drawn(affinity_of([[2, 2]], coactivation=[[[0, 1], [1, 0]]]))
    assert list(found) == ["load", "coactivation"]
    (heatmap,) = found["coactivation"]["data"]
    assert_drawn(heatmap["z"], [[0, 0.5], [0.5, 0]])
    assert "sliders" not in found["coactivation"]["layout"]


@pytest.mark.filterwarnings("error")
def test_counts_of_nothing_are_drawn_as_zeros() -> None:
    found = drawn(
        affinity_of(
            [[0, 0], [0, 0]],
            transition=[np.zeros((2, 2))],
            coactivation=[np.zeros((2, 2)), np.zeros((2, 2))],
        )
    )
    for name in ("load", "transition", "coactivation"):
        for heatmap in found[name]["data"]:
            assert_drawn(heatmap["z"], np.zeros((2, 2)))
            assert (heatmap["zmin"], heatmap["zmax"]) == (0, 1), "a scale needs a width"
    assert found["information"]["data"][0]["y"] == [0]


def test_placement_shows_the_first_rank_and_names_all() -> None:
    # Expert 0 of layer 0 has replicas on ranks 0 and 1; layer 1 has one expert less.
    found = drawn(plan_of([[2, 0, 1, 0], [1, 0]], num_ranks=2))
    assert list(found) == ["placement"], "nothing was measured, no load was given"
    (heatmap,) = found["placement"]["data"]
    assert_drawn(heatmap["z"], [[0, 1, 0], [1, 0, NAN]])
    assert heatmap["text"] == [["0, 1", "1", "0"], ["1", "0", ""]]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 16, 40])
def test_every_rank_has_a_colour_of_its_own(num_ranks: int) -> None:
    found = drawn(plan_of([list(range(num_ranks))[::-1]], num_ranks=num_ranks))
    (heatmap,) = found["placement"]["data"]
    (ranks,) = heatmap["z"]
    assert ranks == list(range(num_ranks))[::-1]
    scale = heatmap["colorscale"]
    assert (scale[0][0], scale[-1][0]) == (0, 1)
    colours = []
    for rank in ranks:
        place = (rank - heatmap["zmin"]) / (heatmap["zmax"] - heatmap["zmin"])
        begin, colour = [step for step in scale if step[0] < place][-1]
        end, end_colour = next(step for step in scale if step[0] > place)
        assert colour == end_colour, "a step is one colour, not a slope"
        assert place == pytest.approx((begin + end) / 2), "a rank is the middle of its step"
        colours.append(colour)
    assert len(set(colours)) == num_ranks


def test_rank_load_by_hand() -> None:
    plan = plan_of([[2, 0, 1, 0], [1, 0]], num_ranks=2)
    load = [np.array([4, 1, 3]), np.array([2, 2])]
    found = drawn(plan, load=load)["rank-load"]
    (heatmap,) = found["data"]
    # Rank 0 serves expert 2 and half of expert 0, 3 + 2 pairs of 8; rank 1 the rest.
    assert_drawn(heatmap["z"], [[5 / 4, 3 / 4], [1, 1]])
    assert_drawn([heatmap["zmin"], heatmap["zmax"]], [3 / 4, 5 / 4])
    assert found["layout"]["xaxis"]["title"]["text"] == "rank"
    (drawing,) = (one for one in draw(plan, load) if one.name == "rank-load")
    assert "load cap on its profile: 1.1" in drawing.caption, "the plan's own cap"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("rows", "num_ranks", "load", "expected", "reach"),
    [
        ([[1, 0]], 1, [5, 0], [[1]], 0.01),
        ([[1, 0]], 2, [3, 3], [[1, 1]], 0.01),
        ([[1, 0]], 2, [0, 0], [[0, 0]], 1),
        ([[0, 1, 2, 3]], 4, [8, 0, 0, 0], [[4, 0, 0, 0]], 3),
    ],
    ids=["one rank", "even", "no load", "all on one rank"],
)
def test_the_colours_of_rank_load_lie_evenly_around_one(
    rows: list[list[int]],
    num_ranks: int,
    load: list[int],
    expected: list[list[float]],
    reach: float,
) -> None:
    found = drawn(plan_of(rows, num_ranks), load=[np.array(load)])
    (heatmap,) = found["rank-load"]["data"]
    assert_drawn(heatmap["z"], expected)
    assert_drawn([heatmap["zmin"], heatmap["zmax"]], [1 - reach, 1 + reach])


def test_a_plan_is_compared_on_what_was_held_out() -> None:
    plan = plan_of(
        [[1, 0]],
        num_ranks=2,
        profile=copies(fixed=0.125),
        heldout=copies(fixed=0.25, token=0.5, oracle=0.1),
        baselines={"contiguous": copies(fixed=1.0, token=1.504, oracle=0.9)},
    )
    comparison = drawn(plan)["comparison"]
    shown_bars = [(one["name"], one["x"], one["y"]) for one in comparison["data"]]
    assert shown_bars == [
        ("contiguous", ["fixed", "token"], [1.0, 1.504]),
        ("placer", ["fixed", "token"], [0.25, 0.5]),
    ]
    assert [one["text"] for one in comparison["data"]] == [
        ["1.00", "1.50"],
        ["0.25", "0.50"],
    ]
    assert comparison["layout"]["barmode"] == "group", "beside each other, not summed"
    assert comparison["layout"]["yaxis"]["rangemode"] == "tozero"


@pytest.mark.parametrize(
    ("engine", "value", "words"),
    [
        ("sglang-deepep", 3.0, "copies sent between nodes"),
        ("trtllm-onesided", 2.0, "copies sent per token"),
        ("sglang-none", 4.0, "busiest rank's load"),
        ("sglang-deepep-ll", 4.0, "busiest rank's load"),
    ],
)
def test_a_plan_is_compared_by_what_its_engine_sends(
    engine: str, value: float, words: str
) -> None:
    figures = {
        "remote_pairs_per_token": 1.0,
        "remote_rank_copies_per_token": 2.0,
        "remote_node_copies_per_token": 3.0,
        "load_imbalance_mean": 4.0,
    }
    plan = plan_of([[1, 0]], num_ranks=2, heldout={"fixed": figures})
    placement = replace(plan.placement, num_nodes=2)
    provenance = {**plan.provenance, "engine": engine}
    plan = replace(plan, placement=placement, provenance=provenance)
    comparison = drawn(plan)["comparison"]
    assert [one["y"] for one in comparison["data"]] == [[value]]
    assert words in comparison["layout"]["yaxis"]["title"]["text"]


def test_a_plan_is_compared_on_its_profile_where_nothing_was_held_out() -> None:
    plan = plan_of([[1, 0]], num_ranks=2, profile=copies(fixed=0.0), heldout=None)
    (bars,) = drawn(plan)["comparison"]["data"]
    assert (bars["name"], bars["y"], bars["text"]) == ("placer", [0], ["0.00"])


def test_more_baselines_than_colours() -> None:
    names = [f"baseline-{number}" for number in range(9)]
    plan = plan_of(
        [[1, 0]],
        num_ranks=2,
        profile=copies(fixed=1.0),
        baselines={name: copies(fixed=2.0) for name in names},
    )
    bars = drawn(plan)["comparison"]["data"]
    assert [one["name"] for one in bars] == [*names, "placer"]
    colours = [one["marker"]["color"] for one in bars]
    assert len(set(colours[:7])) == 7
    assert colours[7:] == colours[:3]


def test_confidence_by_hand() -> None:
    # Layer 0 has no history; what the file holds there must not count.
    history = [[0.875] * 4, [0.5, 0.5, 1, 1], [0.25] * 4]
    found = drawn(table_of(1, 4, history))
    assert list(found) == ["confidence", "confidence-by-layer"]
    tokens, histories = found["confidence"]["data"]
    assert (tokens["name"], histories["name"]) == ("token (T)", "history (A)")
    for bars, expected in (
        # Ids 0, 1 and 2 in three layers; 0.5 begins its bin, and 1 ends the last.
        (tokens, {0: 1 / 9, 12: 4 / 9, 37: 3 / 9, 49: 1 / 9}),
        (histories, {12: 4 / 8, 25: 2 / 8, 49: 2 / 8}),
    ):
        assert_drawn(bars["x"], [(number + 0.5) * BIN for number in range(50)])
        assert_drawn(bars["y"], [expected.get(number, 0) for number in range(50)])
    (chance,) = found["confidence"]["layout"]["shapes"]
    assert (chance["x0"], chance["x1"]) == (0.25, 0.25)
    assert found["confidence"]["layout"]["barmode"] == "overlay"

    tokens, histories = found["confidence-by-layer"]["data"]
    # With id 3 the medians would be 0.125, 0.75 and 0.625.
    assert tokens["x"] == [0, 1, 2]
    assert_drawn(tokens["y"], [0.25, 0.75, 0.25])
    assert histories["x"] == [1, 2]
    assert_drawn(histories["y"], [0.75, 0.25])
    (chance,) = found["confidence-by-layer"]["layout"]["shapes"]
    assert (chance["y0"], chance["y1"]) == (0.25, 0.25)


def test_a_table_without_lookback_has_one_history_per_layer() -> None:
    found = drawn(table_of(0, 2, [[0.5], [0.25], [0.5]]))
    _, histories = found["confidence-by-layer"]["data"]
    assert histories["x"] == [0, 1, 2]
    assert_drawn(histories["y"], [0.5, 0.25, 0.5])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lookback", [3, 4])
def test_no_layer_has_history_where_lookback_is_as_long_as_the_model(
    lookback: int,
) -> None:
    found = drawn(table_of(lookback, 2, np.full((3, 2**lookback), 0.5)))
    tokens, histories = found["confidence"]["data"]
    assert sum(tokens["y"]) == pytest.approx(1)
    assert_drawn(histories["y"], np.zeros(50))
    _, histories = found["confidence-by-layer"]["data"]
    assert (histories["x"], histories["y"]) == ([], [])


def test_one_rank_serves_everything_by_chance() -> None:
    found = drawn(table_of(1, 1, np.ones((3, 1))))
    (chance,) = found["confidence"]["layout"]["shapes"]
    assert (chance["x0"], chance["x1"]) == (1, 1)
    _, histories = found["confidence"]["data"]
    assert histories["y"][49] == 1


def test_bytes_of_a_checkpoint_in_megabytes() -> None:
    found = drawn(sizes_of(experts=1_234_560_000, router=260_000, other=0))
    (bars,) = found["bytes"]["data"]
    assert bars["orientation"] == "h"
    assert bars["y"] == ["experts", "router", "other"]
    assert_drawn(bars["x"], [1234.56, 0.26, 0])
    assert bars["text"] == ["1,234.6 MB", "0.3 MB", "0.0 MB"]
    assert found["bytes"]["layout"]["yaxis"]["autorange"] == "reversed"


@pytest.mark.parametrize(
    "build",
    [
        lambda folder: trace_of(folder, ("code", "prose")),
        lambda _: affinity_of([[2, 1], [0, 0, 3]]),
        lambda _: plan_of([[2, 0, 1, 0]], 2, profile=copies(fixed=1.0)),
        lambda _: table_of(1, 2, np.full((3, 2), 0.5)),
        lambda _: sizes_of(experts=3, router=2, other=1),
    ],
    ids=["trace", "affinity", "plan", "table", "checkpoint"],
)
def test_the_same_things_are_drawn_to_the_same_bytes(
    build: Callable[[Path], Artifact], tmp_path: Path
) -> None:
    once, again = (
        [(one.name, one.title, one.caption, one.figure.to_json()) for one in draw(artifact)]
        for artifact in (build(tmp_path / "one"), build(tmp_path / "two"))
    )
    assert once == again


def test_names_stay_text_on_the_page() -> None:
    hostile = "</script><script>alert(1)</script>"
    plan = plan_of(
        [[1, 0]],
        num_ranks=2,
        profile=copies(fixed=1.0),
        baselines={hostile: copies(fixed=2.0)},
    )
    bars, _ = drawn(plan)["comparison"]["data"]
    assert bars["name"] == hostile
    # The tables of the page are not what is proved here.
    text = page("plan.json", summarize(plan_of([[1, 0]], 2)), draw(plan))
    assert "alert(1)" in text
    assert hostile not in text
    assert "<script>alert" not in text


def test_drawing_without_plotly_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(PlacerError, match="needs plotly") as refused:
        draw(sizes_of(experts=1, router=1, other=1))
    assert refused.value.hint == "pip install 'placer[html]'"
