"""How well experts predict the experts of later layers, and by which structure.

Legend of the shapes: L MoE layers, D domains.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from placer.affinity.controls import CONTROLS, Control, blocks
from placer.affinity.count import count_affinity
from placer.affinity.information import (
    conditional_probability,
    domain_distances,
    miller_madow,
    mutual_information,
    top1_tables,
)
from placer.arrays import FloatArray, IntArray
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.run.progress import Progress, Steps
from placer.trace import EVERYTHING, Chunk, Selection, Trace

# Controls shuffle inside a block of this many tokens, which bounds memory.
_BLOCK_TOKENS = 500_000
DEFAULT_DISTANCES = (1, 2, 3, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Information:
    """Mutual information of one control, in bits, mean over layers.

    Attributes
    ----------
    control
        ``observed``, or which structure was destroyed (``placer.affinity.controls``).
    top1
        Between the top-1 experts of neighbouring layers, plug-in.
    top1_corrected
        The same with the Miller-Madow correction.
    pairs
        Between one of a token's experts, drawn at random, and one in the next layer.
    within
        Between two different experts of a token in one layer. Experts are drawn without
        replacement, so it is above zero even without structure: read the differences.
    """

    control: str
    top1: float | None
    top1_corrected: float | None
    pairs: float
    within: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far links reach: top-1 experts of layers ``distance`` apart, mean over layers.

    Attributes
    ----------
    distance
        In MoE layers.
    top1, top1_corrected
        Mutual information in bits, plug-in and Miller-Madow.
    best_next
        Mean probability that the most likely expert of the later layer is the token's:
        ExFlow's conditional probability (arXiv 2401.08383, section III), each expert of
        the earlier layer weighted by its tokens.
    """

    distance: int
    top1: float
    top1_corrected: float
    best_next: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Links:
    """The report of one trace.

    Attributes
    ----------
    num_tokens
        Tokens counted.
    information
        Observed, then each control, from the mildest to the harshest.
    reach
        One row per layer distance.
    domains
        Names of the domains that have tokens.
    domain_distance
        ``[D, D]`` Jensen-Shannon divergence, in bits, of the top-1 tables of neighbouring
        layers, mean over layers.
    """

    num_tokens: int
    information: tuple[Information, ...]
    reach: tuple[Reach, ...]
    domains: tuple[str, ...]
    domain_distance: FloatArray


def links_of(
    trace: Trace,
    selection: Selection = EVERYTHING,
    *,
    distances: Sequence[int] = DEFAULT_DISTANCES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Links:
    """Measure the links of a trace. ``progress`` gets a line for each step.

    Distances that the model does not have are left out, and all figures of top-1
    experts where the trace does not list experts by weight.

    Raises
    ------
    UsageError
        If the model has a single MoE layer, so that nothing can be linked.
    PlacerError
        If the trace is damaged or no token is selected.
    """
    model = trace.model
    if model.num_layers < 2:
        raise UsageError(
            "the model has only one MoE layer, so there are no links between layers",
            "see the load of its experts: placer inspect TRACE",
        )

    def tokens(control: Control | None = None) -> Iterable[Chunk]:
        if control is None:
            return trace.chunks(selection)
        parts = blocks(trace.chunks(selection), _BLOCK_TOKENS)
        return (control(block, seed + number) for number, block in enumerate(parts))

    by_weight = trace.header.experts_by_weight
    kinds: dict[str, Control | None] = {"observed": None, **CONTROLS}
    near = [d for d in distances if d < model.num_layers]
    near = near if by_weight else []
    steps = Steps(tell=progress, total=1 + len(kinds) + len(near))
    steps.begin("domains")
    names, distance = _domains(trace, selection)
    return Links(
        num_tokens=sum(chunk.num_tokens for chunk in tokens()),
        information=tuple(
            # The control that redraws experts has no router's order left.
            _information(
                name, tokens, kinds[name], model, by_weight and name != "skew-only"
            )
            for name in steps.each(kinds, str)
        ),
        reach=tuple(
            _reach(tokens(), model, apart)
            for apart in steps.each(near, lambda d: f"layers {d} apart")
        ),
        domains=names,
        domain_distance=distance,
    )


def _information(
    name: str,
    tokens: Callable[[Control | None], Iterable[Chunk]],
    control: Control | None,
    model: ModelSpec,
    ordered: bool,
) -> Information:
    counted = count_affinity(tokens(control), model, {})
    top1 = top1_tables(tokens(control), model) if ordered else []
    return Information(
        control=name,
        top1=_mean(map(mutual_information, top1)) if ordered else None,
        top1_corrected=_mean(map(miller_madow, top1)) if ordered else None,
        pairs=_mean(map(mutual_information, counted.transition)),
        within=_mean(map(mutual_information, counted.coactivation)),
    )


def _reach(chunks: Iterable[Chunk], model: ModelSpec, distance: int) -> Reach:
    tables = top1_tables(chunks, model, distance)
    return Reach(
        distance=distance,
        top1=_mean(map(mutual_information, tables)),
        top1_corrected=_mean(map(miller_madow, tables)),
        best_next=_mean(map(_best_next, tables)),
    )


def _best_next(table: IntArray) -> float:
    tokens = table.sum(axis=1)
    return float(np.average(conditional_probability(table).max(axis=1), weights=tokens))


def _domains(trace: Trace, selection: Selection) -> tuple[tuple[str, ...], FloatArray]:
    names, tables = [], []
    by_weight = trace.header.experts_by_weight
    for number, name in enumerate(trace.header.domains if by_weight else ()):
        parts = (
            chunk.select(chunk.domain_ids == number)
            for chunk in trace.chunks(selection)
            if chunk.domain_ids is not None
        )
        counted = top1_tables(parts, trace.model)
        if counted[0].any():
            names.append(name)
            tables.append(counted)
    return tuple(names), domain_distances(tables)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
