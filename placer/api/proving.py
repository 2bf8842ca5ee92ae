"""How far a plan is from the best placement, and the check of its proof."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from placer.api.arguments import ProveArguments, require_known, selected
from placer.api.files import as_path, warn, writing
from placer.api.plan import Plan
from placer.api.shown import Shape, Shown
from placer.api.trace import Trace
from placer.errors import require_left_out
from placer.run.session import Session
from placer.run.verdict import Verdict


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Proved(Shown):
    """What is proved of a plan: :meth:`placer.Plan.prove` makes one.

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

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``placer prove --json``."""
        return {"verdict": self.verdict.to_json()} | dict(self.facts)

    def _shape(self) -> Shape:
        lines = [f"warning: {one}" for one in self.warnings]
        return Shape(title=self.verdict.answer[0], facts={}, lines=lines)


def prove(
    plan: Plan,
    trace: Trace,
    *,
    progress: Callable[[str], None] | None = None,
    **options: Unpack[ProveArguments],
) -> Proved:
    """Bound a plan on the tokens of a trace: :meth:`placer.Plan.prove`."""
    require_known(options, ProveArguments)
    called, force = plan.path or Path("PLAN"), options.get("force", False)
    out, certificate = as_path(options.get("out")), as_path(options.get("certificate"))
    with ExitStack() as stack:
        file = stack.enter_context(plan.as_file())
        inputs = [plan.path, trace.path, as_path(options.get("check"))]
        for path, kinds in ((out, ["plan"]), (certificate, list[str]())):
            if path is not None:
                stack.enter_context(writing(path, inputs, force=force, kinds=kinds))
                inputs.append(path)
        if options.get("check") is not None:
            return _checked(file.path, called, trace, options)
        found = _proved(file.path, called, trace, out, certificate, progress, options)
        found = replace(found, warnings=tuple(map(file.words, found.warnings)))
    for text in found.warnings:
        warn(text)
    return found


def _proved(
    plan: Path,
    called: Path,
    trace: Trace,
    out: Path | None,
    certificate: Path | None,
    progress: Callable[[str], None] | None,
    options: ProveArguments,
) -> Proved:
    """Prove the plan of a file, which is ``called`` so in messages."""
    from placer.planning.certificate_file import write_certificate
    from placer.planning.proving import better_plan, prove_plan
    from placer.report.proof import layer_rows, verdict_of_proof

    read, chosen, limit = trace.contents, selected(options), options.get("time_limit")
    session = Session.begun(time_limit=limit, began=time.monotonic(), progress=progress)
    found = prove_plan(plan, read, chosen, options.get("max_imbalance"), session)
    if out is not None:
        better_plan(found, plan, read, chosen, session).write(out)
    if certificate is not None:
        write_certificate(found, plan, read, chosen, certificate)
    return Proved(
        verdict=verdict_of_proof(found, called, trace.path, chosen, out),
        layers=tuple(layer_rows(found)),
        facts=found.to_json(),
        warnings=found.warnings,
    )


def _checked(plan: Path, called: Path, trace: Trace, options: ProveArguments) -> Proved:
    """Prove again, without the solver, what a certificate says of a plan."""
    from placer.planning.certificate_check import check_certificate
    from placer.planning.certificate_file import read_certificate
    from placer.report.proof import verdict_of_check

    phase = options.get("phase", "all")
    given = {
        "--out": options.get("out"),
        "--certificate": options.get("certificate"),
        "--max-imbalance": options.get("max_imbalance"),
        "--time-limit": options.get("time_limit"),
        "--fold": options.get("fold"),
        "--not-fold": options.get("not_fold"),
        "--phase": None if phase == "all" else phase,
    }
    require_left_out(given, "a proof without --check: a certificate names its own")
    certificate = Path(options["check"] or "")
    found = check_certificate(read_certificate(certificate), plan, trace.contents)
    return Proved(verdict=verdict_of_check(found, called, certificate), facts=asdict(found))
