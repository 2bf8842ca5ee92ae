"""What a plan was solved on, to tell held-out sequences from those it has seen."""

from typing import Any

import numpy as np
import numpy.typing as npt

from placer.plan import Plan
from placer.trace import Fold, Trace


def solved_on(plan: Plan, trace: Trace) -> bool:
    """Return whether the plan was solved on this trace, or does not say on which."""
    recorded = plan.provenance.get("trace_sha256")
    return recorded is None or recorded == trace.sha256


def profile_fold(plan: Plan, trace: Trace) -> Fold | None:
    """Return the fold of ``trace`` that the plan was solved on, if it records one."""
    text = plan.provenance.get("fold")
    if isinstance(text, str) and solved_on(plan, trace):
        return Fold.from_text(text)
    return None


def num_seen_sequences(
    plan: Plan, trace: Trace, sequence_ids: npt.NDArray[np.int32]
) -> int:
    """Return how many of these sequences of ``trace`` the plan was solved on."""
    if not solved_on(plan, trace):
        return 0
    present = np.unique(sequence_ids)
    fold = profile_fold(plan, trace)
    return len(present) if fold is None else int(fold.keep(present).sum())


def expert_load(trace: Trace, fold: Fold | None) -> list[npt.NDArray[Any]]:
    """Return L arrays ``[E]`` int64: pairs per expert in the sequences of ``fold``."""
    load = [np.zeros(size, dtype=np.int64) for size in trace.model.num_experts]
    for chunk in trace.chunks(fold):
        for counts, ids in zip(load, chunk.experts, strict=True):
            counts += np.bincount(ids.ravel(), minlength=len(counts))
    return load
