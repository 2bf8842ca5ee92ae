"""How far a plan is from the best placement, and the check of its proof."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from placer.api.shown import Shape, Shown
from placer.errors import require_left_out
from placer.run.session import Session
from placer.run.verdict import Verdict
from placer.trace import Selection, Trace


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Proved(Shown):
    """What is proved of a plan.

    Attributes
    ----------
    verdict
        How far the plan is from the best placement.
    layers
        For each MoE layer: its number, copies per token of the plan's best placement found,
        the bound, the gap, and how it is proved.
    facts
        The JSON object of ``placer prove --json``, without the verdict.
    warnings
        What limits the answer.
    """

    verdict: Verdict
    layers: tuple[tuple[object, ...], ...] = ()
    facts: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def _shape(self) -> Shape:
        lines = [f"warning: {one}" for one in self.warnings]
        return Shape(title=self.verdict.answer[0], facts={}, lines=lines)


def prove(
    plan: Path,
    trace: Path,
    *,
    max_imbalance: float | None = None,
    out: Path | None = None,
    certificate: Path | None = None,
    check: Path | None = None,
    time_limit: float | None = None,
    fold: str | None = None,
    not_fold: str | None = None,
    phase: str = "all",
    progress: Callable[[str], None] | None = None,
) -> Proved:
    """Bound a plan on the tokens of a trace; write a better plan and the certificate.

    Parameters
    ----------
    plan, trace
        The plan, and the trace that judges it.
    max_imbalance
        The load cap; the plan's own by default.
    out
        Where to write the best placement found, as a plan.
    certificate
        Where to write what proves the bound.
    check
        A certificate: only what it says is proved, without the solver.
    time_limit
        Seconds; any stop leaves a valid bound.
    fold, not_fold, phase
        The tokens that judge it, as in :meth:`placer.Trace.affinity`.
    progress
        Called with one line for each step.

    Raises
    ------
    PlacerError
        If a file is damaged, or the plan has redundant experts.
    UsageError
        If plan and trace are of different models, or options do not fit ``check``.
    VerificationError
        If the certificate does not hold.
    """
    if check is not None:
        given = {
            "--out": out,
            "--certificate": certificate,
            "--max-imbalance": max_imbalance,
            "--time-limit": time_limit,
            "--fold": fold,
            "--not-fold": not_fold,
            "--phase": None if phase == "all" else phase,
        }
        require_left_out(given, "a proof without --check: a certificate names its own")
        return _checked(plan, trace, check)
    from placer.planning.certificate_file import write_certificate
    from placer.planning.proving import better_plan, prove_plan
    from placer.report.proof import layer_rows, verdict_of_proof

    read, chosen = Trace(trace), Selection.parse(fold, not_fold, phase)
    began = time.monotonic()
    session = Session.begun(time_limit=time_limit, began=began, progress=progress)
    found = prove_plan(plan, read, chosen, max_imbalance, session)
    if out is not None:
        better_plan(found, plan, read, chosen, session).write(out)
    if certificate is not None:
        write_certificate(found, plan, read, chosen, certificate)
    return Proved(
        verdict=verdict_of_proof(found, plan, trace, chosen, out),
        layers=tuple(layer_rows(found)),
        facts=found.to_json(),
        warnings=found.warnings,
    )


def _checked(plan: Path, trace: Path, certificate: Path) -> Proved:
    """Prove again, without the solver, what a certificate says of a plan."""
    from placer.planning.certificate_check import check_certificate
    from placer.planning.certificate_file import read_certificate
    from placer.report.proof import verdict_of_check

    found = check_certificate(read_certificate(certificate), plan, Trace(trace))
    return Proved(verdict=verdict_of_check(found, plan, certificate), facts=asdict(found))
