"""The placements of others beside solved plans, on real traces; prints tables of the docs.

Profile on one fold of the sequences, judge on the other; both directions. Seconds are those
of the process, reading and counting the profile included. Results are kept as those of
``bench_solve.py`` are, and its plans are not solved again.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from instances import (
    HOME_IMBALANCE,
    IMBALANCE,
    PART_IDS,
    PARTS,
    SHAPE_IDS,
    SHAPES,
    TRACES,
    Figures,
    Measuring,
    baseline,
    copies_name,
    paired,
    seeds,
    shares,
)
from placements import Case

from placer.baseline import BASELINES
from placer.errors import UsageError
from placer.intervals import CopiesRatio

#: A baseline is under the cap of a plan if no layer has more than this above the plan's.
CAP_TOLERANCE = 1e-6
#: What is said of a plan that is not under the cap of 1.10 with one replica of each expert.
FREEDOM = {"capped": "", "uncapped": ", no cap", "redundant": ", redundant"}
COLUMNS = [
    "baseline",
    "`fixed`",
    "`follow`",
    "imbalance",
    "home",
    "plan for `fixed` / baseline",
    "plan for `follow` / baseline",
    "s",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """What is known of one profile: baselines by name, and the plans beside them."""

    others: dict[str, Figures]
    plans: list[Figures]

    def seeds(self, variant: str, policy: str) -> list[Figures]:
        """Return the plans of one kind."""
        wanted = {"variant": variant, "policy": policy}
        return [one for one in self.plans if wanted.items() <= one.items()]

    def rival(self, name: str, policy: str) -> Figures | None:
        """Return the plan of the first seed that has the freedom of a baseline.

        The capped one where the baseline is under the cap, that with redundant experts
        where it has them, else one without a cap.
        """
        if None in self.others[name]["imbalance_on_profile"]:
            return next(iter(self.seeds("redundant", policy)), None)
        capped = self.seeds("capped", policy)[0]
        if under_cap(self.others[name], capped):
            return capped
        return next(iter(self.seeds("uncapped", policy)), None)


Tables = dict[tuple[str, tuple[int, int]], list[Instance]]


@pytest.fixture(scope="module")
def tables() -> Iterator[Tables]:
    """Both folds of every trace and topology, printed when all are there."""
    found: Tables = {}
    yield found
    for (trace, shape), folds in found.items():
        lines = "\n".join(table(folds))
        print(f"\n\n{trace}, {shape[0]} x {shape[1]} ranks\n\n{lines}")
    print("\n\n" + "\n".join(summary(found)))


def baseline_cases(trace: str, shape: Any, part: int) -> list[Case]:
    """Return every baseline of an instance, and the plans that stand beside them."""
    others = [baseline(trace, shape, part, name) for name in BASELINES]
    variants = ["capped"]
    if shape == (1, 8):
        variants += ["uncapped", "redundant"]
    plans = [
        seeds(trace, shape, policy, part, variant)
        for variant in variants
        for policy in ("fixed", "follow")
    ]
    return [*others, *(plan for one in plans for plan in one)]


@pytest.mark.measures(cases=baseline_cases)
@pytest.mark.parametrize("part", PARTS, ids=PART_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("trace", TRACES)
def test_baselines(
    trace: str, shape: tuple[int, int], part: int, measuring: Measuring, tables: Tables
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
    tables.setdefault((trace, shape), []).append(Instance(others=others, plans=plans))
    worse = [
        f"{plan['policy']} {plan['seed']} is worse than {name}"
        for plan in plans
        for name, other in others.items()
        if under_cap(other, plan)
        and other[plan["policy"]]["price_on_profile"]
        < plan[plan["policy"]]["price_on_profile"]
    ]
    assert not worse


def under_cap(other: Figures, plan: Figures) -> bool:
    """Return whether no layer of a baseline is fuller than the plan's layers may be.

    Replicas are compared with replicas: there the baseline has nothing but balance in mind.
    """
    theirs, ours = other["imbalance_on_profile"], plan["imbalance_on_profile"]
    if None in theirs or None in ours:
        return None in theirs and None in ours
    if plan["variant"] == "uncapped":
        return True
    return all(
        its <= max(1.1, own) + CAP_TOLERANCE for its, own in zip(theirs, ours, strict=True)
    )


def table(folds: Sequence[Instance]) -> Iterator[str]:
    """Yield the rows: every baseline, then the plans' medians over their seeds.

    Both folds are in a cell. Beside a baseline stands its :meth:`Instance.rival`.
    """
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    names = [name for name in folds[0].others if all(name in one.others for one in folds)]
    for name in names:
        cells = both(judged([one.others[name]], one.others["contiguous"]) for one in folds)
        for policy in ("fixed", "follow"):
            cells.append("; ".join(ratio_cell(one, name, policy) for one in folds))
        seconds = statistics.mean(one.others[name]["cpu_seconds"] for one in folds)
        yield f"| {name} | {' | '.join(cells)} | {seconds:.1f} |"
    for variant in FREEDOM:
        for policy in ("fixed", "follow"):
            own = [one.seeds(variant, policy) for one in folds]
            if all(own):
                cells = both(
                    judged(plans, one.others["contiguous"])
                    for plans, one in zip(own, folds, strict=True)
                )
                seconds = statistics.median(
                    plan["cpu_seconds"] for plans in own for plan in plans
                )
                title = f"**placer** `{policy}`, {variant}"
                yield f"| {title} | {' | '.join(cells)} | | | {seconds:.1f} |"


def both(folds: Iterable[Iterator[str]]) -> list[str]:
    """Return the cells of several folds, each with all folds in it."""
    return [" / ".join(cells) for cells in zip(*folds, strict=True)]


def judged(found: Sequence[Figures], base: Figures) -> Iterator[str]:
    """Yield copies as shares of the contiguous placement's, imbalance, home imbalance."""
    for policy in ("fixed", "follow"):
        copies = shares(found, base, policy, copies_name(base))
        yield f"{statistics.median(copies):.3f}"
    for policy, name in (("fixed", IMBALANCE), ("follow", HOME_IMBALANCE)):
        yield f"{statistics.median(one[policy]['heldout'][name] for one in found):.3f}"


def ratio_cell(instance: Instance, name: str, policy: str) -> str:
    """Return the held-out ratio of copies with its interval."""
    own = instance.rival(name, policy)
    ratio = None if own is None else paired(own, instance.others[name], policy)
    if own is None or ratio is None:
        return "-"
    return said(ratio) + FREEDOM[own["variant"]]


def said(ratio: CopiesRatio) -> str:
    interval = "" if ratio.low is None else f" ({ratio.low:.3f} to {ratio.high:.3f})"
    return f"{ratio.ratio:.3f}{interval}"


def summary(found: Tables) -> Iterator[str]:
    """Yield a row for each trace and topology: the baseline that is nearest to a plan.

    Of the baselines under the plan's cap, of those without one, and of those with
    redundant experts the one beside which the plan sends the most; the worse fold.
    """
    names = ["trace", "ranks", "policy", *(f"nearest, {one}" for one in FREEDOM)]
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    for (trace, shape), folds in found.items():
        for policy in ("fixed", "follow"):
            nearest: dict[str, tuple[float, str]] = {}
            for one in folds:
                for name, other in one.others.items():
                    own = one.rival(name, policy)
                    ratio = None if own is None else paired(own, other, policy)
                    if own is None or ratio is None:
                        continue
                    cell = (ratio.ratio, f"{name}: {said(ratio)}")
                    kind = own["variant"]
                    nearest[kind] = max(nearest.get(kind, cell), cell)
            cells = [nearest.get(kind, (0, ""))[1] for kind in FREEDOM]
            ranks = f"{shape[0]} x {shape[1]}"
            yield f"| {trace} | {ranks} | `{policy}` | {' | '.join(cells)} |"
