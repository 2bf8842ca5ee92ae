"""``placer.run_demo``: every step on a small model, then a plan for a real trace."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from placer.api.files import AnyPath, as_path, note, warn, writing
from placer.api.how import How
from placer.api.plan import Plan
from placer.api.shown import Shape, Shown, TitledTable
from placer.demo.real_trace import ABSENT, NAME, shipped_trace
from placer.demo.road import NUM_RANKS, POLICIES, DemoReport, shipped_model
from placer.demo.road import run_demo as walk
from placer.report.comparison import comparison_table
from placer.report.verdicts import verdict_of_demo
from placer.run.verdict import Verdict
from placer.simulation.sent import Wire


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Demo(Shown):
    """What the demo found: :func:`placer.run_demo` makes one.

    Attributes
    ----------
    out
        The directory.
    contents
        What the rest of placer works with; not part of the stable API.
    real_plan
        The plan for the trace of gpt-oss-20b, or ``None`` where the trace is not there.
    """

    out: Path
    contents: DemoReport
    real_plan: Plan | None = None

    @property
    def verdict(self) -> Verdict:
        """What the plan of the demo model changes."""
        figures = {name: one["fixed"] for name, one in self.contents.figures.items()}
        following = f"placer inspect {quote(self.files['plan'])}"
        if self.real_plan is not None and self.real_plan.verdict.next is not None:
            following = self.real_plan.verdict.next
        return verdict_of_demo(figures, NUM_RANKS, following)

    @property
    def files(self) -> Mapping[str, str]:
        """What was written, by meaning."""
        found = self.contents.files.items()
        return {name: str(self.out / path) for name, path in found}

    @property
    def proof(self) -> str:
        """What was verified of the exported checkpoint."""
        found = self.contents.verification
        return (
            f"Verified: {found.num_tensors} tensors equal bit for bit, "
            f"{found.num_routed_pairs} routed pairs exactly permuted "
            f"({found.num_ties} tokens left out, at or after a tie of two experts), "
            f"largest difference of a logit {found.max_logit_difference:.1g} (allowed "
            f"{found.tolerance:.1g})."
        )

    def tables(self) -> list[TitledTable]:
        """Return what ``placer demo`` shows: figures on held-out text."""
        columns, rows = comparison_table(self.contents.figures, POLICIES, Wire())
        return [(f"Held-out text, {NUM_RANKS} ranks:", columns, rows)]

    def last_tables(self) -> list[TitledTable]:
        """Return the figures of the plan for the real trace, on held-out sequences."""
        if self.real_plan is None:
            return []
        ((title, columns, rows),), _ = self.real_plan.tables()
        ranks = self.real_plan.num_ranks
        return [(f"The real trace of {NAME}, {ranks} ranks, {title}", columns, rows)]

    def last_lines(self) -> list[str]:
        """Return the verdict on the real trace, or why there is none."""
        if self.real_plan is None:
            return [ABSENT]
        found = self.real_plan.verdict
        return [*found.answer, *found.more]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that ``placer demo --json`` prints."""
        plan = self.real_plan
        return {
            "verdict": self.verdict.to_json(),
            "figures": self.contents.figures,
            "verification": self.contents.verification.to_json(),
            "files": dict(self.files),
            "real_trace": plan
            and {"verdict": plan.verdict.to_json(), "metrics": plan.metrics},
        }

    def _shape(self) -> Shape:
        ((title, columns, rows),) = self.tables()
        return Shape(
            title=str(title),
            facts=self.files,
            columns=columns,
            rows=rows,
            lines=[self.proof, *self.last_lines()],
        )


def run_demo(
    out: AnyPath = "placer-demo",
    *,
    model: AnyPath | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Demo:
    """Run every step on a small model, as ``placer demo`` does.

    The last step is a plan for the trace of gpt-oss-20b. It is left out where the trace is
    neither beside the package nor in the current directory: a source tree has it, an
    installed wheel does not.

    Parameters
    ----------
    out
        The directory to write.
    model
        The model; by default the one that comes with placer.
    force
        Whether an earlier demo at ``out`` is replaced.
    progress
        Called with one line for each part of a step.

    Raises
    ------
    PlacerError
        If ``out`` exists, or the model cannot be run.
    VerificationError
        If the exported checkpoint is not the same function.
    """
    place, directory = Path(out), as_path(model) or shipped_model()
    trace = shipped_trace()
    with writing(place, [directory, trace], force=force, kinds=[], directory=True):
        report = walk(directory, place, note, trace=trace, progress=progress)
    if trace is None or report.real_plan is None:
        return Demo(place, report)
    how = How(source=trace)
    plan = Plan(report.real_plan, place / f"plan-{NAME}.json", how=how)
    for text in plan.warnings:
        warn(text)
    return Demo(place, report, plan)
