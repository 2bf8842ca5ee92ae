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
    from placer.api.affinity import Affinity, merge_affinities
    from placer.api.arguments import (
        AdviseArguments,
        AffinityArguments,
        ExportArguments,
        ProveArguments,
        ReplayArguments,
        SelectArguments,
        SimulateArguments,
        SizeArguments,
        SolveArguments,
        TableArguments,
    )
    from placer.api.calibrating import Calibrated, calibrate
    from placer.api.checking import Checked
    from placer.api.demo import Demo, run_demo
    from placer.api.exporting import Exported, restore
    from placer.api.importing import import_file
    from placer.api.inspecting import Inspected, inspect
    from placer.api.known import names
    from placer.api.measuring import Learning, Links, links
    from placer.api.opening import open
    from placer.api.plan import Plan
    from placer.api.proving import Proved
    from placer.api.recording import record
    from placer.api.replaying import Replayed
    from placer.api.shown import Result
    from placer.api.simulation import Simulation, compare
    from placer.api.solving import Frontier, solve, solve_frontier
    from placer.api.table import Table
    from placer.api.trace import Trace, count_affinity, merge_traces
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
    "AffinityArguments": "api.arguments",
    "Calibrated": "api.calibrating",
    "Checked": "api.checking",
    "Checkpoint": "report.checkpoint",
    "Demo": "api.demo",
    "ExportArguments": "api.arguments",
    "Exported": "api.exporting",
    "Frontier": "api.solving",
    "Inspected": "api.inspecting",
    "Learning": "api.measuring",
    "Links": "api.measuring",
    "NoSolutionError": "errors",
    "NotProvedError": "errors",
    "PlacerError": "errors",
    "PlacerWarning": "errors",
    "Plan": "api.plan",
    "ProveArguments": "api.arguments",
    "Proved": "api.proving",
    "ReplayArguments": "api.arguments",
    "Replayed": "api.replaying",
    "Result": "api.shown",
    "SelectArguments": "api.arguments",
    "SimulateArguments": "api.arguments",
    "Simulation": "api.simulation",
    "SizeArguments": "api.arguments",
    "SolveArguments": "api.arguments",
    "Table": "api.table",
    "TableArguments": "api.arguments",
    "Trace": "api.trace",
    "UsageError": "errors",
    "Verdict": "run.verdict",
    "VerificationError": "errors",
    "Verified": "api.verifying",
    "advise": "api.advising",
    "calibrate": "api.calibrating",
    "compare": "api.simulation",
    "count_affinity": "api.trace",
    "import_file": "api.importing",
    "inspect": "api.inspecting",
    "links": "api.measuring",
    "merge_affinities": "api.affinity",
    "merge_traces": "api.trace",
    "names": "api.known",
    "open": "api.opening",
    "record": "api.recording",
    "restore": "api.exporting",
    "run_demo": "api.demo",
    "solve": "api.solving",
    "solve_frontier": "api.solving",
}

__all__ = [
    "Advice",
    "AdviseArguments",
    "Affinity",
    "AffinityArguments",
    "Calibrated",
    "Checked",
    "Checkpoint",
    "Demo",
    "ExportArguments",
    "Exported",
    "Frontier",
    "Inspected",
    "Learning",
    "Links",
    "NoSolutionError",
    "NotProvedError",
    "PlacerError",
    "PlacerWarning",
    "Plan",
    "ProveArguments",
    "Proved",
    "ReplayArguments",
    "Replayed",
    "Result",
    "SelectArguments",
    "SimulateArguments",
    "Simulation",
    "SizeArguments",
    "SolveArguments",
    "Table",
    "TableArguments",
    "Trace",
    "UsageError",
    "Verdict",
    "VerificationError",
    "Verified",
    "advise",
    "calibrate",
    "compare",
    "count_affinity",
    "import_file",
    "inspect",
    "links",
    "merge_affinities",
    "merge_traces",
    "names",
    "open",
    "record",
    "restore",
    "run_demo",
    "solve",
    "solve_frontier",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'placer' has no attribute {name!r}")
    value = getattr(import_module(f"placer.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
