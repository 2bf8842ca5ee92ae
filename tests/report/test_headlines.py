"""The top screen of every report, computed again from what ``inspect --json`` prints."""

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.report.headline import change, enumerated, over_mean
from placer.report.html import number
from tests.report.conftest import Reports, run

Shown = dict[str, Any]
Tiles = list[tuple[float | None, float]]


def rows_of(shown: Shown, begin: str) -> list[dict[str, Any]]:
    """Return the rows of the only table whose title begins so."""
    (rows,) = (rows for title, rows in shown["tables"].items() if title.startswith(begin))
    return rows


def column(shown: Shown, begin: str, name: str) -> list[Any]:
    return [row[name] for row in rows_of(shown, begin) if row[name] is not None]


def column_names(shown: Shown, begin: str) -> list[str]:
    return list(rows_of(shown, begin)[0])


def of_plan(shown: Shown) -> Tiles:
    rows = {row["placement"]: row for row in rows_of(shown, "placements on")}
    before, after = rows["contiguous"], rows["placer"]
    sent = [name for name in after if "/token" in name]
    facts = shown["facts"]
    ranks = facts["num_ranks"]
    return [
        *((before[name], after[name]) for name in sent),
        (before["imbalance"], after["imbalance"]),
        (facts["num_experts"] / ranks, facts["slots_per_rank"]),
    ]


def of_counts(shown: Shown) -> Tiles:
    busiest = np.mean(column(shown, "load per MoE layer", "busiest/mean"))
    bits = np.mean(column(shown, "mutual information by layer", "bits"))
    return [(None, shown["facts"]["num_tokens"]), (None, busiest), (None, bits)]


def of_table(shown: Shown) -> Tiles:
    facts = shown["facts"]
    return [(facts["chance"], facts["median_token_confidence"])]


def of_checkpoint(shown: Shown) -> Tiles:
    sizes = {row["group"]: row["bytes"] for row in rows_of(shown, "tensors")}
    whole = sum(sizes.values())
    return [(None, whole), (None, (sizes["experts"] + sizes["router"]) / whole)]


def of_record(shown: Shown) -> Tiles:
    shares = column(shown, "renumbered experts per", "share renumbered")
    return [(None, np.mean(shares)), (None, shown["facts"]["num_shards"])]


def of_map(shown: Shown) -> Tiles:
    rows = rows_of(shown, "slots per layer")
    return [(max(row["experts"] for row in rows), max(row["slots"] for row in rows))]


def of_frontier(shown: Shown) -> Tiles:
    rows = {row["placement"]: row for row in rows_of(shown, "plans and baselines")}
    plans = [row for name, row in rows.items() if name.startswith("plan-")]
    base, eplb = rows["contiguous"], rows["eplb"]
    names = ("sent/token", "imbalance")
    better = [row for row in plans if all(row[name] < eplb[name] for name in names)]
    return [
        *((base[name], min(row[name] for row in plans)) for name in names),
        (None, len(better)),
    ]


def of_simulation(shown: Shown) -> Tiles:
    rows = {row["placement"]: row for row in rows_of(shown, "placements under")}
    times = {row["placement"]: row["layer us"] for row in rows_of(shown, "per batch")}
    names = ("contiguous", "placer")
    return [
        tuple(rows[name]["sent/token"] for name in names),
        tuple(rows[name]["imbalance"] for name in names),
        tuple(times[name] for name in names),
    ]


def of_learning(shown: Shown) -> Tiles:
    rows = rows_of(shown, "plans from growing parts")
    last = rows[-1]
    near = next(
        row["tokens"]
        for row in rows
        if row["of contiguous"] <= last["of contiguous"] + 0.01
        and row["imbalance"] <= last["imbalance"] + 0.01
    )
    return [(None, near), (1.0, last["of contiguous"]), (None, last["imbalance"])]


HEADLINES: dict[str, Callable[[Shown], Tiles]] = {
    "trace": of_counts,
    "affinity": of_counts,
    "plan": of_plan,
    "plan-not-held-out": of_plan,
    "plan-on-trace": of_plan,
    "plan-with-replicas": of_plan,
    "plans": of_plan,
    "table": of_table,
    "checkpoint": of_checkpoint,
    "export-record": of_record,
    "map": of_map,
    "frontier": of_frontier,
    "simulation": of_simulation,
    "learning": of_learning,
}


def tiles_on(page: str) -> list[tuple[str | None, str]]:
    """Read the tiles of a page: the number before, if there is one, and the number."""
    found = re.findall(r'<dd class="value">(.*?)</dd>', page)
    tiles = []
    for text in found:
        before = re.search(r'class="before">([^<]+)<', text)
        after = re.search(r"<b>([^<]+)</b>", text)
        assert after is not None
        tiles.append((before and before[1], after[1]))
    return tiles


@pytest.mark.parametrize("name", HEADLINES)
def test_the_headline_is_computed_again_from_json(name: str, reports: Reports) -> None:
    shown = reports.json(name)
    page = reports.page(name).read_text(encoding="utf-8")
    expected = HEADLINES[name](shown)
    assert expected
    assert tiles_on(page) == [
        (None if before is None else number(before), number(after))
        for before, after in expected
    ]
    verdict = re.search(r'<p class="verdict">(.*?)</p>', page)
    assert verdict is not None
    assert unescape(verdict[1]).replace("\xa0", " ") == shown["headline"]["verdict"]


@pytest.mark.parametrize("name", ["plan", "plan-on-trace", "plans"])
def test_the_verdict_of_a_plan_is_its_figures_in_words(name: str, reports: Reports) -> None:
    shown = reports.json(name)
    rows = {row["placement"]: row for row in rows_of(shown, "placements on")}
    sent = {one: row["copies/token"] for one, row in rows.items()}
    verdict = shown["headline"]["verdict"]
    less = f"{abs(sent['placer'] / sent['contiguous'] - 1):.1%}".replace("%", " %")
    assert f"sends {less} less than the contiguous placement" in verdict
    share = 100 * (rows["placer"]["imbalance"] - 1)
    assert f"busiest rank has {share:.1f} % more load than the mean" in verdict
    assert "held-out sequences" in verdict


def test_figures_on_a_trace_are_those_of_simulate(reports: Reports) -> None:
    """The page counts by layer on its own; ``simulate`` is the oracle."""
    plan, trace = reports.inspected["plan-with-replicas"]
    judged = json.loads(run("simulate", plan, trace, "--not-fold", "0/2", "--json"))
    shown = reports.json("plan-with-replicas")
    figures = judged["baselines"] | {"placer": judged["policies"]}
    rows = rows_of(shown, "placements on")
    assert {row["placement"] for row in rows} == set(figures)
    for row in rows:
        of = figures[row["placement"]]["fixed"]
        assert row["node copies/token"] == pytest.approx(
            of["remote_node_copies_per_token"], abs=1e-5
        )
        assert row["imbalance"] == pytest.approx(of["load_imbalance_mean"], abs=1e-5)
    local = column(shown, "locality by layer", "placer")
    assert np.mean(local) == pytest.approx(
        judged["policies"]["fixed"]["local_activation_rate"], abs=1e-5
    )


def test_what_misleads_stands_in_a_banner(reports: Reports) -> None:
    seen = reports.json("plan-not-held-out")["headline"]["misleading"]
    assert any(text.startswith("Not held out") for text in seen)
    page = reports.page("plan-not-held-out").read_text(encoding="utf-8")
    assert page.count('class="banner"') == len(seen)
    assert reports.json("plan-on-trace")["headline"]["misleading"] == []


def test_experts_to_load_are_those_that_differ(reports: Reports) -> None:
    rows = rows_of(reports.json("plans"), "placements on")
    (moved,) = (row["experts to load"] for row in rows if row["placement"] == "token.json")
    plan, other = (
        json.loads(Path(path).read_text(encoding="utf-8"))["physical_to_logical_map"]
        for path in reports.inspected["plans"][:2]
    )
    differ = 0
    for ours, theirs in zip(plan, other, strict=True):
        for rank in range(4):
            slots = slice(rank * 2, rank * 2 + 2)
            differ += len(set(ours[slots]) - set(theirs[slots]))
    assert moved == differ


def test_the_verdict_compares_with_other_plans(reports: Reports) -> None:
    shown = reports.json("plans")
    rows = {row["placement"]: row for row in rows_of(shown, "placements on")}
    verdict = shown["headline"]["verdict"]
    other = rows["token.json"]
    assert (
        change(rows["placer"]["copies/token"], other["copies/token"]) + " token.json"
        in verdict
    )
    assert f"token.json {over_mean(other['imbalance'])})" in verdict
    told = (
        f"To change from token.json to it, ranks load {other['experts to load']} experts."
    )
    assert told in verdict
    assert "token.json" in column_names(shown, "locality by layer")


@pytest.mark.parametrize(
    ("parts", "words"),
    [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")],
)
def test_an_enumeration(parts: list[str], words: str) -> None:
    assert enumerated(parts) == words


def test_few_tokens_are_said_to_look_linked(tmp_path: Path) -> None:
    """Layers without any link, 64 experts, 200 tokens."""
    rng = np.random.default_rng(0)
    experts = np.stack(
        [rng.permuted(np.tile(np.arange(64), (200, 1)), axis=1)[:, :4] for _ in range(2)],
        axis=1,
    )
    np.savez(
        tmp_path / "few.npz", experts=experts, sequence_ids=np.repeat(np.arange(20), 10)
    )
    run("import", "npz", tmp_path / "few.npz", "--out", tmp_path / "few")
    shown = json.loads(run("inspect", tmp_path / "few", "--json"))
    (row,) = rows_of(shown, "mutual information by layer")
    # A link that is not there: what is counted is what chance gives, within a tenth.
    assert row["bits"] == pytest.approx(row["by chance"], rel=0.1)
    (doubt,) = shown["headline"]["misleading"]
    assert f"would show {row['by chance']:.3f} bits" in doubt


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (0.75, 1.0, "25.0 % less than"),
        (1.5, 1.0, "50.0 % more than"),
        (1.0001, 1.0, "as much as"),
        (0.0, 0.0, "as much as"),
        (1.0, 0.0, "more than"),
    ],
)
def test_changes_in_words(ours: float, theirs: float, words: str) -> None:
    assert change(ours, theirs) == words


def test_the_busiest_rank_in_words() -> None:
    assert over_mean(1.125) == "12.5 %"
    assert over_mean(1.0) == "0.0 %"
