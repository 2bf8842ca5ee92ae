"""Correcting confidences: by rates on sequences that the rows were not counted on.

The more confident of two estimates is more often the one that is too high. So a table
predicts somewhat more than its homes serve. To correct this, tables of each half of the
profile's sequences are tried on the other half. One straight line, the same for all rows
and layers, is fitted from predicted to real rates (linear recalibration: Cox 1958). One
rising line for T and A changes no choice, except for differences that float16 rounds away.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from placer.arrays import AnyArray, FloatArray
from placer.intervals import FEWEST_SEQUENCES
from placer.placement.placement import Placement
from placer.serving.homes import fixed_homes
from placer.serving.layer_serving import LayerServing
from placer.serving.replica_choice import serving_layers
from placer.shuffle import CombinedRule
from placer.table.homes import TableHomes
from placer.table.table import Table
from placer.target.engine import ReplicaChoice
from placer.trace import Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A line from promised to expected rates: ``offset + slope * promised``.

    ``combined`` is that of the combined rule, where the table has one.
    """

    slope: float
    offset: float
    combined: "Calibration | None" = None

    def of(self, rates: AnyArray) -> AnyArray:
        """Return corrected rates, float16 in 0..1."""
        line = self.offset + self.slope * rates.astype(np.float32)
        return line.clip(0, 1).astype(np.float16)


def fit_calibration(
    placement: Placement,
    tokens: Chunk,
    build: Callable[[Chunk], Table],
    replica_choice: ReplicaChoice | None = None,
    layer_ids: tuple[int, ...] | None = None,
) -> Calibration | None:
    """Fit the line on the two halves of a profile.

    Parameters
    ----------
    placement
        Experts in slots.
    tokens
        The profile.
    build
        Builds the table of a part of the profile.
    replica_choice, layer_ids
        As ``build_table`` takes them.

    Returns
    -------
    Calibration or None
        ``None`` where there are fewer than :data:`FEWEST_SEQUENCES` sequences, a half has
        no known token, or service does not rise with the promise.
    """
    sequences = np.unique(tokens.sequence_ids)
    if len(sequences) < FEWEST_SEQUENCES:
        return None
    even = np.isin(tokens.sequence_ids, sequences[::2])
    if tokens.token_ids is None or not all(
        (tokens.token_ids[half] >= 0).any() for half in (even, ~even)
    ):
        return None
    sums = np.zeros((2, 5))
    for half in (even, ~even):
        layers = serving_layers(placement, replica_choice, layer_ids)
        sums += _sums(layers, tokens.select(~half), build(tokens.select(half)))
    plain, combined = (_line(*rule) for rule in sums)
    return None if plain is None else dataclasses.replace(plain, combined=combined)


def _line(
    count: float, promised: float, served: float, squares: float, products: float
) -> Calibration | None:
    spread = count * squares - promised**2
    if spread <= 0:
        return None
    slope = float((count * products - promised * served) / spread)
    offset = float((served - slope * promised) / count)
    return Calibration(slope=slope, offset=offset) if slope > 0 else None


def calibrated(
    table: Table, calibration: Calibration, exact_layers: tuple[int, ...]
) -> Table:
    """Correct the confidences and token scores of a table, except for its exact layers."""

    def corrected(rates: AnyArray) -> AnyArray:
        found = calibration.of(rates)
        found[list(exact_layers)] = rates[list(exact_layers)]
        return found

    score = table.token_score
    return dataclasses.replace(
        table,
        token_confidence=corrected(table.token_confidence),
        history_confidence=corrected(table.history_confidence),
        token_score=None if score is None else corrected(score),
        combined=None
        if table.combined is None
        else _corrected_rule(table.combined, calibration, exact_layers),
    )


def _corrected_rule(
    rule: CombinedRule, calibration: Calibration, exact_layers: tuple[int, ...]
) -> CombinedRule:
    """Undo in the rule what corrects the token scores, and correct what it promises."""
    own = calibration.combined or Calibration(slope=1.0, offset=0.0)
    weight = rule.token_weight / calibration.slope
    bias = rule.combined_bias - calibration.offset * weight[:, None]
    found = {
        "token_weight": own.slope * weight,
        "unknown_score": calibration.of(rule.unknown_score),
        "combined_bias": own.offset + own.slope * bias,
        "expert_score": own.slope * rule.expert_score.astype(np.float32),
        "home_price": own.slope * rule.home_price,
    }
    for name, values in found.items():
        before = getattr(rule, name)
        found[name] = values.astype(before.dtype)
        found[name][list(exact_layers)] = before[list(exact_layers)]
    return CombinedRule(**found)


def _sums(layers: Iterator[LayerServing], tokens: Chunk, table: Table) -> FloatArray:
    """Return, over tokens and layers, the count and the sums of x, y, x x and x y.

    x is what a row promised, y what its home served: ``[2, 5]``, by the plain rule and,
    past the first layer, by the combined one, where there is one.
    """
    fixed = fixed_homes(tokens.sequence_ids, table.num_ranks)
    homes = TableHomes(table, tokens.token_ids, fixed)
    total = np.zeros((2, 5))
    for layer, (chosen, serving) in enumerate(zip(tokens.experts, layers, strict=True)):
        experts = np.ascontiguousarray(chosen.T)
        choices = [homes.plain(layer)]
        if table.combined is not None and layer > 0:
            choices.append(homes.best(layer))
        homes.served(serving.ranks(experts, choices[0].home), experts)
        for rule, choice in enumerate(choices):
            known = choice.confidence >= 0 if rule == 0 else slice(None)
            x = choice.confidence[known].astype(np.float64)
            y = serving.holds[experts, choice.home].mean(axis=0)[known]
            total[rule] += [len(x), x.sum(), y.sum(), np.square(x).sum(), (x * y).sum()]
    return total
