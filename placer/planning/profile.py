"""The profiles of plans and tables, to separate held-out sequences from seen ones."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.model import ModelSpec
from placer.placement import Plan
from placer.run.files import sha256_file
from placer.table.table import Table
from placer.trace import Selection, Trace


def made_from(made: Plan | Table, trace: Trace) -> bool:
    """Return whether this trace was the profile, or part of it, or none is recorded."""
    recorded = _recorded(made)
    if isinstance(recorded, list):
        return trace.sha256 in recorded
    return recorded is None or recorded == trace.sha256


def is_of_unknown_tokens(made: Plan | Table) -> bool:
    """Return whether no trace is recorded: an engine's loads and maps name none."""
    return _recorded(made) is None


def _recorded(made: Plan | Table) -> Any:
    if isinstance(made, Table):
        return made.trace_sha256
    # Of counts there may be several.
    return made.provenance.get("trace_sha256") or made.provenance.get("traces_sha256")


def profile_of(made: Plan | Table, trace: Trace) -> Selection | None:
    """Return the tokens of ``trace`` that a plan or table is made from, if it is."""
    return Selection.from_json(made.provenance) if made_from(made, trace) else None


def layer_ids_of(plan: Plan, other: ModelSpec) -> tuple[int, ...] | None:
    """Return ``[L]``: the model's own layer numbers, which SGLang draws replicas by.

    They are the plan's; where it does not say, those of ``other``, the same model in what
    the plan is judged on. ``None`` where neither says.
    """
    return plan.model.layer_ids or other.layer_ids


def other_phase(plan: Plan, judged: Selection) -> str | None:
    """Return a warning if a plan is judged on another phase than it was solved for."""
    phase = Selection.from_json(plan.provenance).phase
    if phase in (None, judged.phase):
        return None
    return (
        f"the plan was solved for {phase} tokens, but {judged.phase or 'all'} tokens are "
        f"judged: give --phase {phase}"
    )


def profile_itself(plan: Plan, source: Path, judged: Selection) -> str | None:
    """Return a warning if a plan is checked on what it was solved on.

    Parameters
    ----------
    plan
        The plan.
    source
        The trace or affinity file that it is judged on.
    judged
        The tokens of a trace that are judged.
    """
    if source.is_file():
        is_profile = plan.provenance.get("affinity_sha256") == sha256_file(source)
    else:
        fold = Selection.from_json(plan.provenance).fold
        is_profile = (
            not is_of_unknown_tokens(plan)
            and made_from(plan, Trace(source))
            and fold in (None, judged.fold)
        )
        if not is_profile and (merged := _merged_from(plan, Trace(source))):
            return (
                f"{source} holds, among others, {merged} that the plan was solved on. They "
                "hide drift: give only today's traffic"
            )
    if not is_profile:
        return None
    return (
        f"{source} is what the plan was solved on, so it cannot show drift: give today's "
        "traffic"
    )


def _merged_from(plan: Plan, trace: Trace) -> str | None:
    """Return what a merged trace holds of a plan's profile, in words."""
    parts = trace.header.provenance.get("traces")
    recorded = _recorded(plan)
    wanted = recorded if isinstance(recorded, list) else [recorded]
    if not isinstance(parts, list) or not any(
        isinstance(one, dict) and one.get("sha256") in wanted for one in parts
    ):
        return None
    fold = Selection.from_json(plan.provenance).fold
    return "the trace" if fold is None else "the sequences"


def num_seen_sequences(
    made: Plan | Table, trace: Trace, sequence_ids: npt.NDArray[np.int32]
) -> int:
    """Return how many of these sequences of ``trace`` a plan or table is made from."""
    profile = profile_of(made, trace)
    if profile is None:
        return 0
    present, fold = np.unique(sequence_ids), profile.fold
    return len(present) if fold is None else int(fold.keep(present).sum())
