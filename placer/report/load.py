"""The load of ranks, from a trace or an affinity.

Legend of the shapes: L MoE layers, E logical experts of a layer, R ranks.
"""

from pathlib import Path

from placer.affinity import Affinity
from placer.arrays import IntArray
from placer.errors import UsageError
from placer.model import require_same_model
from placer.placement import Plan
from placer.report.artifact import Artifact, open_artifact
from placer.report.statistics import TraceStatistics


def load_for(plan: Artifact, plan_path: Path, path: Path) -> tuple[IntArray, ...]:
    """Return L arrays ``[E]``: the pairs per expert that a trace or affinity counts.

    Raises
    ------
    UsageError
        If ``plan`` is not a plan, or ``path`` neither a trace nor an affinity.
    PlacerError
        If they are of different models.
    """
    counted = open_artifact(path)
    if not isinstance(plan, Plan) or not isinstance(counted, TraceStatistics | Affinity):
        raise UsageError(
            f"--load {path} cannot be used with {plan_path}: it needs a plan, and a trace "
            "or an affinity file",
            "placer inspect PLAN --load TRACE",
        )
    if isinstance(counted, Affinity):
        require_same_model(plan.model, str(plan_path), counted.model, str(path))
        return counted.load
    require_same_model(plan.model, str(plan_path), counted.trace.model, str(path))
    return tuple(load.sum(axis=0) for load in counted.load)
