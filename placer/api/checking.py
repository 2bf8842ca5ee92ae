"""Whether a plan still holds on today's traffic."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from placer.api.affinity import Affinity
from placer.api.arguments import SelectArguments, require_known, selected
from placer.api.files import UsedFile, warn
from placer.api.plan import Plan
from placer.api.shown import Result, TitledTable
from placer.api.trace import Trace
from placer.errors import DriftError, require_left_out
from placer.planning.drift import Drift, DriftReport, check_on_loads, check_plan
from placer.planning.profile import layer_ids_of, other_phase, profile_itself
from placer.report.verdicts import verdict_of_check
from placer.serving.replica_choice import unknown_dense_layers
from placer.trace import Selection

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Checked(Result):
    """Figures of a plan, then and now: :meth:`placer.Plan.check` makes one.

    Attributes
    ----------
    figures
        What was compared.
    plan
        The file of the plan, for errors.
    """

    figures: tuple[Drift, ...]
    plan: Path

    @property
    def drifted(self) -> bool:
        """Whether a figure got worse than chance and tolerance explain."""
        return any(one.drifted for one in self.figures)

    def require_held(self) -> None:
        """Refuse a plan from which traffic has drifted.

        Raises
        ------
        DriftError
            With the command that improves it.
        """
        if self.drifted:
            raise DriftError(
                f"traffic has drifted from {self.plan}",
                f"improve it with few moves: {self.verdict.next}",
            )

    def tables(self) -> list[TitledTable]:
        """Return what ``placer check`` shows."""
        columns = ("figure", "then", "now", "standard error", "allowed", "")
        rows = [
            (
                one.name,
                one.then,
                one.now,
                one.error,
                one.then + one.allowed,
                "drifted" if one.drifted else "holds",
            )
            for one in self.figures
        ]
        return [(None, columns, rows)]

    def to_frame(self) -> "DataFrame":
        """Return one row for each figure.

        Columns: those of :class:`placer.planning.drift.Drift`, and ``drifted``.
        """
        from pandas import DataFrame

        return DataFrame([one.to_json() for one in self.figures])


def check(
    plan: Plan,
    source: Trace | Affinity,
    *,
    tolerance: float = 0.02,
    **select: Unpack[SelectArguments],
) -> Checked:
    """Compare a plan with today's traffic: :meth:`placer.Plan.check`."""
    require_known(select, SelectArguments)
    path, chosen = plan.path or Path("PLAN"), selected(select)
    with source.as_file() as file:
        report, judged, limit = _report(plan, path, source, file, tolerance, select)
        solved, model = plan.contents, source.model
        layers = layer_ids_of(solved, model)
        dense = unknown_dense_layers(solved.placement, solved.recorded_choice, layers)
        for text in (dense, limit, profile_itself(solved, file.path, chosen)):
            if text is not None:
                warn(file.words(text))
        verdict = verdict_of_check(report, solved, path, file.path, judged, chosen)
    following = None if verdict.next is None else file.words(verdict.next)
    return Checked(
        title="check",
        verdict=replace(verdict, next=following),
        facts={
            "drifted": report.drifted,
            "figures": [one.to_json() for one in report.figures],
            "num_tokens": report.num_tokens,
            "num_sequences": report.num_sequences,
        },
        figures=report.figures,
        plan=path,
    )


def _report(
    plan: Plan,
    path: Path,
    source: Trace | Affinity,
    file: UsedFile,
    tolerance: float,
    select: SelectArguments,
) -> tuple[DriftReport, str, str | None]:
    """Return the report, what was judged in words, and what limits it."""
    chosen, solved, name = selected(select), plan.contents, str(path)
    if isinstance(source, Trace):
        report = check_plan(solved, source.contents, chosen, tolerance, name)
        return report, f"{report.num_tokens:,} tokens", _limit(plan, path, chosen)
    phase = select.get("phase", "all")
    require_left_out(
        {
            "--fold": select.get("fold"),
            "--not-fold": select.get("not_fold"),
            "--phase": None if phase == "all" else phase,
        },
        "a trace: counts have no tokens to select",
    )
    counts = source.contents
    pairs = int(max(load.sum() for load in counts.load))
    return (
        check_on_loads(solved, counts, str(file.path), tolerance, name),
        f"{pairs:,} pairs of a token and an expert per layer",
        "counts do not show traffic: only balance is judged",
    )


def _limit(plan: Plan, path: Path, chosen: Selection) -> str | None:
    if plan.contents.solver.status != "imported":
        return other_phase(plan.contents, chosen)
    return (
        f"{path} was imported, so it records no figures: the later half of the "
        "sequences is compared with the earlier half"
    )
