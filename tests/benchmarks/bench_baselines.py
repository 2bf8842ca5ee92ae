"""The placements of others beside solved plans, on real traces; prints tables of the docs.

Profile on one fold of the sequences, judge on the other; both directions. Seconds are those
of the process, reading and counting the profile included. Results are kept as those of
``bench_solve.py`` are, and its plans are not solved again.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from instances import (
    HOME_IMBALANCE,
    IMBALANCE,
    PART_IDS,
    PARTS,
    RANK_COPIES,
    SHAPE_IDS,
    SHAPES,
    TRACES,
    Figures,
    Measuring,
    baseline,
    paired,
    seeds,
    shares,
)
from placements import Case

from placer.baseline import BASELINES
from placer.errors import UsageError

#: A baseline is under the cap of a plan if no layer has more than this above the plan's.
CAP_TOLERANCE = 1e-6
COLUMNS = [
    "baseline",
    "`fixed`",
    "`follow`",
    "imbalance",
    "home",
    "**placer** `fixed` / baseline",
    "**placer** `follow` / baseline",
    "s",
]


@pytest.fixture(scope="module")
def lines() -> Iterator[dict[str, list[str]]]:
    """The rows of each table by its title, printed when all are there."""
    found: dict[str, list[str]] = {}
    yield found
    for title, rows in found.items():
        print(f"\n\n### {title}\n\n" + "\n".join(rows))


def baseline_cases(trace: str, shape: Any, part: int) -> list[Case]:
    """Return every baseline of an instance, and the plans that stand beside them."""
    others = [baseline(trace, shape, part, name) for name in BASELINES]
    variants = ["capped", "uncapped"] if shape == (1, 8) else ["capped"]
    plans = [
        seeds(trace, shape, policy, part, variant)
        for variant in variants
        for policy in ("fixed", "follow")
    ]
    return [*others, *(plan for one in plans for plan in one)]


@pytest.mark.parametrize("part", PARTS, ids=PART_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("trace", TRACES)
def test_baselines(
    trace: str,
    shape: tuple[int, int],
    part: int,
    measuring: Measuring,
    lines: dict[str, list[str]],
) -> None:
    """No baseline under a plan's cap causes a lower price on the profile."""
    others: dict[str, Figures] = {}
    plans: list[Figures] = []
    for case in baseline_cases(trace, shape, part):
        try:
            found = measuring(case).result()
        except UsageError as error:
            print(f"\n{case.file_name}: {error.message}")  # not installed, or no replicas
            continue
        if "name" in found:
            others[found["name"]] = found
        else:
            plans.append(found)
    title = f"{trace}, {shape[0]} x {shape[1]}, profile {part}/2"
    lines[title] = list(table(others, plans))
    worse = [
        f"{plan['policy']} {plan['seed']} is worse than {name}"
        for plan in plans
        for name, other in others.items()
        if under_cap(other, plan)
        and other[plan["policy"]]["price_on_profile"]
        < plan[plan["policy"]]["price_on_profile"]
    ]
    assert not worse


test_baselines.cases = baseline_cases  # type: ignore[attr-defined]


def under_cap(other: Figures, plan: Figures) -> bool:
    """Return whether no layer of a baseline is fuller than the plan's layers may be."""
    theirs, ours = other["imbalance_on_profile"], plan["imbalance_on_profile"]
    if None in theirs:
        return False
    if plan["variant"] == "uncapped":
        return True
    return all(
        its <= max(1.1, own) + CAP_TOLERANCE for its, own in zip(theirs, ours, strict=True)
    )


def table(others: dict[str, Figures], plans: Sequence[Figures]) -> Iterator[str]:
    """Yield the rows: every baseline, then the plans' medians over their seeds.

    Beside each baseline stand the held-out copies of the plan that has its freedom: the
    capped one where the baseline is under the cap, else the one without a cap.
    """
    base = others["contiguous"]
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for name, other in others.items():
        beside = [ratio_cell(other, plans, policy) for policy in ("fixed", "follow")]
        cells = [name, *judged([other], base), *beside, f"{other['cpu_seconds']:.1f}"]
        yield f"| {' | '.join(cells)} |"
    for variant in ("capped", "uncapped"):
        for policy in ("fixed", "follow"):
            own = [
                one for one in plans if (one["variant"], one["policy"]) == (variant, policy)
            ]
            if own:
                seconds = statistics.median(one["cpu_seconds"] for one in own)
                title = f"**placer** `{policy}`, {variant}"
                cells = [title, *judged(own, base), "", "", f"{seconds:.1f}"]
                yield f"| {' | '.join(cells)} |"


def judged(found: Sequence[Figures], base: Figures) -> Iterator[str]:
    """Yield copies as shares of the contiguous placement's, imbalance, home imbalance."""
    for policy in ("fixed", "follow"):
        yield f"{statistics.median(shares(found, base, policy, RANK_COPIES)):.3f}"
    for policy, name in (("fixed", IMBALANCE), ("follow", HOME_IMBALANCE)):
        yield f"{statistics.median(one[policy]['heldout'][name] for one in found):.3f}"


def ratio_cell(other: Figures, plans: Sequence[Figures], policy: str) -> str:
    """Return the held-out ratio of copies with its interval, of the plan's first seed."""
    first = [one for one in plans if one["policy"] == policy and one["seed"] == 0]
    capped = next(one for one in first if one["variant"] == "capped")
    free = next((one for one in first if one["variant"] == "uncapped"), None)
    own = capped if free is None or under_cap(other, capped) else free
    ratio = paired(own, other, policy)
    if ratio is None:
        return ""
    said = f"{ratio.ratio:.3f}"
    if ratio.low is not None:
        said += f" ({ratio.low:.3f} to {ratio.high:.3f})"
    return said if own is capped else f"{said}, no cap"
