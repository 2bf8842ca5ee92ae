"""placer decides where the experts of a Mixture-of-Experts model live.

Examples
--------
>>> import placer
>>> trace = placer.open("traces/demo/traces/final")
>>> plan = placer.solve(trace, gpus_per_node=4, fold="0/2", num_sweeps=0, proof="none")
>>> plan.simulate(trace, not_fold="0/2").sent_ratio("eplb").ratio < 1
True

``docs/api.md`` lists all names. Importing placer is quick: what a name needs is imported
when it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from placer.version import __version__ as __version__

if TYPE_CHECKING:
    from placer.api.advising import Advice, advise
    from placer.api.affinity import Affinity
    from placer.api.arguments import (
        AdviseArguments,
        ExportArguments,
        SimulateArguments,
        SizeArguments,
        SolveArguments,
    )
    from placer.api.exporting import Exported
    from placer.api.known import names
    from placer.api.opening import open
    from placer.api.plan import Plan
    from placer.api.simulation import Simulation, compare
    from placer.api.solving import solve
    from placer.api.table import Table
    from placer.api.trace import Trace
    from placer.api.verifying import Verified
    from placer.errors import (
        NoSolutionError,
        NotProvedError,
        PlacerError,
        PlacerWarning,
        UsageError,
        VerificationError,
    )
    from placer.report.checkpoint import Checkpoint
    from placer.run.verdict import Verdict

# The module of each name.
_MODULES = {
    "Advice": "api.advising",
    "AdviseArguments": "api.arguments",
    "Affinity": "api.affinity",
    "Checkpoint": "report.checkpoint",
    "ExportArguments": "api.arguments",
    "Exported": "api.exporting",
    "NoSolutionError": "errors",
    "NotProvedError": "errors",
    "Plan": "api.plan",
    "PlacerError": "errors",
    "PlacerWarning": "errors",
    "SimulateArguments": "api.arguments",
    "Simulation": "api.simulation",
    "SizeArguments": "api.arguments",
    "SolveArguments": "api.arguments",
    "Table": "api.table",
    "Trace": "api.trace",
    "UsageError": "errors",
    "Verdict": "run.verdict",
    "VerificationError": "errors",
    "Verified": "api.verifying",
    "advise": "api.advising",
    "compare": "api.simulation",
    "names": "api.known",
    "open": "api.opening",
    "solve": "api.solving",
}

__all__ = [
    "Advice",
    "AdviseArguments",
    "Affinity",
    "Checkpoint",
    "ExportArguments",
    "Exported",
    "NoSolutionError",
    "NotProvedError",
    "Plan",
    "PlacerError",
    "PlacerWarning",
    "SimulateArguments",
    "Simulation",
    "SizeArguments",
    "SolveArguments",
    "Table",
    "Trace",
    "UsageError",
    "Verdict",
    "VerificationError",
    "Verified",
    "advise",
    "compare",
    "names",
    "open",
    "solve",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'placer' has no attribute {name!r}")
    value = getattr(import_module(f"placer.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
