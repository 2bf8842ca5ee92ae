"""The phases that engines are run for, and tokens or batches of another phase."""

from collections.abc import Iterable, Sequence

import numpy as np

from placer.errors import UsageError
from placer.serving.homes import BatchShape, batch_shapes
from placer.target.engine import PHASES, Engine, Phase
from placer.trace import Selection, Trace


def answered(engine: Engine | None, shapes: Sequence[BatchShape]) -> tuple[BatchShape, ...]:
    """Return the batches that an engine is run for; without an engine, all."""
    if engine is None:
        return tuple(shapes)
    return tuple(one for one in shapes if one.batching in engine.phases)


def no_batch_for(engines: Sequence[Engine], shapes: Sequence[BatchShape]) -> UsageError:
    """Return the error that none of the engines is run for any of the batches."""
    drawn = sorted({one.batching for one in shapes})
    phases = sorted({phase for engine in engines for phase in engine.phases})
    told = batch_shapes([one.tokens_per_rank for one in shapes]) != tuple(shapes)
    return UsageError(
        f"--engine {', '.join(one.name for one in engines)} is run for "
        f"{' and '.join(phases)}, but the requested batches are for {' and '.join(drawn)}",
        f"give --batching {phases[0]}"
        + (f" instead of --batching {drawn[0]}" if told else ""),
    )


def phase_warning(trace: Trace, selection: Selection, served: Iterable[str]) -> str | None:
    """Say that batches of one phase are made of tokens of the other, where they are.

    Parameters
    ----------
    trace, selection
        The tokens.
    served
        The phases that figures or a plan are for.
    """
    phase = _phase_of(trace, selection)
    others = [one for one in PHASES if one in set(served) and one != phase]
    if phase is None or not others:
        return None
    given = f"--phase {phase}" if selection.phase else str(trace.directory)
    return (
        f"{others[0]} is judged by {phase} tokens, which may use other experts: {given} "
        f"has no {others[0]} tokens"
    )


def _phase_of(trace: Trace, selection: Selection) -> Phase | None:
    """Return the phase of all tokens selected; ``None``: both, or it is not recorded."""
    if selection.phase is not None:
        return selection.phase
    found: set[int] = set()
    for chunk in trace.chunks(selection):
        if chunk.phase is None:
            return None
        found.update(np.unique(chunk.phase).tolist())
    return PHASES[found.pop()] if len(found) == 1 else None


def sizes_warning(
    engines: Sequence[Engine | None], shapes: Sequence[BatchShape]
) -> str | None:
    """Say which batches no engine is run for, unless none were asked for by their size."""
    kept = {shape for one in engines for shape in answered(one, shapes)}
    left = [shape for shape in shapes if shape not in kept]
    if not left or tuple(shapes) == batch_shapes():
        return None
    sizes = ",".join(str(one.tokens_per_rank) for one in left)
    names = ", ".join(one.name for one in engines if one is not None)
    return (
        f"--tokens-per-rank {sizes} is left out: these are {left[0].batching} batches, "
        f"and {names} is not run for {left[0].batching}"
    )
