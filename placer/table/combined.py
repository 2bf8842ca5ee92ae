"""One rate per home, from the token and all its past experts.

The plain rule takes the more confident of two estimates. Here both add up. The target is
the share of a token's pairs that each home could serve. It is predicted from the token's
row of rates, with one weight for all homes, and from the logical experts that the router
chose 1, 2, ... G layers before. The fit is a ridge regression (Hoerl and Kennard 1970) for
each layer, on the tokens of the profile. In training, a token's row leaves out the token
itself, because a new token is not in its row either.

The first layer has no past: it keeps the plain rule, and this one holds zeros.
"""

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from placer.arrays import AnyArray, FloatArray, IntArray
from placer.placement.placement import Placement
from placer.serving.layer_serving import LayerServing
from placer.shuffle import CombinedRule, combined_scores
from placer.table.prices import EvenHomes
from placer.trace import Chunk

# Tokens that the penalty weighs as much as: 10 and 100 do as well.
_PENALTY = 40.0
_MOST_PAST_LAYERS = 8
_MOST_COLUMNS = 1024
# Tokens whose features are held at a time.
_ROWS = 8192


def past_layers(num_experts: tuple[int, ...]) -> int:
    """Return G: at most 8 layers, with a limit on columns that keeps solving fast."""
    return max(1, min(_MOST_PAST_LAYERS, _MOST_COLUMNS // max(num_experts)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CombinedBuilder:
    """Fits the combined rule of a table, layer by layer.

    Attributes
    ----------
    placement
        Experts in slots.
    tokens
        The profile.
    token_ids
        ``[T]`` int64, -1 where unknown.
    shrinkage
        Tokens of the prior in every row of rates.
    even
        How even its homes must be.
    """

    placement: Placement
    tokens: Chunk
    token_ids: IntArray
    shrinkage: float
    even: EvenHomes
    _layers: list[dict[str, AnyArray]] = field(init=False, default_factory=list)

    def add(self, rates: FloatArray, *, exact: bool) -> None:
        """Fit the next layer.

        Parameters
        ----------
        rates
            ``[V, R]``: the layer's rates of every token id.
        exact
            Whether they come from the checkpoint, and not from these tokens.
        """
        layer = len(self._layers)
        num_ranks = self.placement.num_ranks
        depth = past_layers(self.placement.num_experts)
        width = max(self.placement.num_experts)
        found: dict[str, AnyArray] = {
            "token_weight": np.zeros((), dtype=np.float32),
            "unknown_score": np.zeros(num_ranks, dtype=np.float16),
            "combined_bias": np.zeros(num_ranks, dtype=np.float32),
            "expert_score": np.zeros((depth, width, num_ranks), dtype=np.float16),
            "home_price": np.zeros(num_ranks, dtype=np.float32),
        }
        self._layers.append(found)
        if layer == 0:
            return
        rows, served = self._rows_and_served(layer, rates, exact)
        past = [
            np.ascontiguousarray(chosen.T)
            for chosen in self.tokens.experts[max(0, layer - depth) : layer]
        ]
        token_weight, added, bias = _ridge(rows, past, width, served)
        found["token_weight"][...] = token_weight
        found["unknown_score"][:] = served.mean(axis=0)
        found["combined_bias"][:] = bias
        found["expert_score"][: len(past)] = added
        scores = combined_scores(
            rows,
            np.float32(token_weight),
            found["combined_bias"],
            found["expert_score"],
            past,
        )
        found["home_price"][:] = self.even.prices(
            lambda price: (scores - price.astype(np.float32)).argmax(axis=1)
        )

    def _rows_and_served(
        self, layer: int, rates: FloatArray, exact: bool
    ) -> tuple[FloatArray, FloatArray]:
        """Return ``[T, R]``: rates of a token's id, and what each home could serve of it.

        The rates are counted without the token itself.
        """
        serving = LayerServing.of(self.placement, layer)
        experts = np.ascontiguousarray(self.tokens.experts[layer].T)
        served = serving.share_held(experts)
        rows = np.tile(served.mean(axis=0), (len(served), 1))
        known = self.token_ids >= 0
        ids = self.token_ids[known]
        rows[known] = rates[ids]
        if not exact:
            counted = np.bincount(ids)[ids] + self.shrinkage
            # One home after the other: all tokens and homes at once take much memory.
            for rate, share in zip(rows.T, served.T, strict=True):
                rate[known] = (rate[known] * counted - share[known]) / (counted - 1)
        return rows, served

    def rule(self) -> CombinedRule:
        """Return the rule of the layers added."""
        return CombinedRule(
            **{
                one.name: np.stack([layer[one.name] for layer in self._layers])
                for one in dataclasses.fields(CombinedRule)
            }
        )


def _ridge(
    rows: FloatArray, past: list[AnyArray], width: int, served: FloatArray
) -> tuple[float, FloatArray, FloatArray]:
    """Return the weight of the rows, what experts add ``[G, E, R]``, and the bias ``[R]``.

    ``G`` is the number of past layers. They make least what is left of ``served`` squared
    plus the penalty times their own squares, the bias apart: as many equations as there are
    experts give these for the weight, and their error is then a parabola of the weight.
    """
    columns, num_ranks = len(past) * width, served.shape[1]
    # The last columns are what the experts should explain: the rows and what was served.
    squares = np.zeros((columns, columns + 2 * num_ranks))
    own = np.zeros((2 * num_ranks, 2 * num_ranks))
    total = np.zeros(columns)
    mean_explained = np.concatenate([rows.mean(axis=0), served.mean(axis=0)])
    for begin in range(0, len(rows), _ROWS):
        part = slice(begin, begin + _ROWS)
        features = np.zeros((len(rows[part]), columns))
        for back, experts in enumerate(reversed(past)):
            for chosen in experts[:, part]:
                features[np.arange(len(chosen)), back * width + chosen] = 1
        squares[:, :columns] += features.T @ features
        explained = np.hstack([rows[part], served[part]]) - mean_explained
        squares[:, columns:] += features.T @ explained
        own += explained.T @ explained
        total += features.sum(axis=0)
    mean = total / len(rows)
    squares[:, :columns] -= np.outer(total, mean)
    squares[np.diag_indices(columns)] += _PENALTY
    solved = np.linalg.solve(squares[:, :columns], squares[:, columns:])
    left = own - squares[:, columns:].T @ solved
    curvature = np.trace(left[:num_ranks, :num_ranks]) + _PENALTY
    weight = float(np.trace(left[:num_ranks, num_ranks:]) / curvature)
    added = solved[:, num_ranks:] - weight * solved[:, :num_ranks]
    bias = mean_explained[num_ranks:] - weight * mean_explained[:num_ranks] - mean @ added
    return weight, added.reshape(len(past), width, num_ranks), bias
