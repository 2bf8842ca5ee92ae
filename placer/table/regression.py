"""Predicting a token's rates from its embedding: a prior for every id.

Ridge regression from the embedding, scaled to length 1, to the rates of the seen ids. An id
that was seen n times weighs n / (n + s). The strength of the penalty is chosen per layer by
the error left out: of each id when the regression is fitted on all others, which needs one
fit (Allen 1974, PRESS). Wide embeddings are first projected at random, which keeps angles
(Johnson and Lindenstrauss 1984), so that memory and time stay bounded.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from placer.arrays import Float32Array, FloatArray, IntArray
from placer.table.embeddings import Embeddings, require_rows, unit_rows

#: Wider embeddings are projected to this many dimensions.
MOST_DIMENSIONS = 512
# Penalties that are tried, in units of the mean variance of a dimension.
_PENALTIES = np.logspace(-4, 4, 17)
# Rows whose features are computed at a time.
_ROWS = 4096
_ITERATIONS = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingRegression:
    """The part of the regression that all layers share.

    Attributes
    ----------
    features
        ``[V, d]`` float32: features of every id, in the directions in which those of the
        seen ids do not vary together; centred on the seen ids.
    variance
        ``[d]``: weighted variance of the seen ids' features, times their weight.
    known
        ``[S, d]`` float32: the rows of ``features`` of the seen ids.
    weight
        ``[S]`` in 0..1.
    penalty
        ``[P]``: penalties to choose from.
    own
        ``[P, S]``: how much of its own rate each seen id's prediction is made of.
    """

    features: Float32Array
    variance: FloatArray
    known: Float32Array
    weight: FloatArray
    penalty: FloatArray
    own: FloatArray

    @classmethod
    def of(
        cls, embeddings: Embeddings, vocab_size: int, seen: IntArray, weight: FloatArray
    ) -> Self:
        """Read the embedding of all ids and turn it to the seen ids' main directions.

        Raises
        ------
        PlacerError
            If there is no row for an id.
        """
        require_rows(embeddings, vocab_size - 1)
        features = _features(embeddings, vocab_size, seen)
        mean = np.average(features[seen], axis=0, weights=weight).astype(np.float32)
        features -= mean
        scatter = features[seen].T @ (features[seen] * weight[:, None].astype(np.float32))
        variance, directions = np.linalg.eigh(scatter.astype(np.float64))
        turn = directions.astype(np.float32)
        for ids in _parts(np.arange(vocab_size)):
            features[ids] = features[ids] @ turn
        known, variance = features[seen], np.maximum(variance, 0.0)
        # Equal rows vary in no direction: any penalty will do.
        penalty = _PENALTIES * (float(variance.mean()) or 1.0)
        shrunk = (1 / (variance + penalty[:, None])).astype(np.float32)
        return cls(
            features=features,
            variance=variance,
            known=known,
            weight=weight,
            penalty=penalty,
            own=weight * (shrunk @ np.square(known).T) + weight / weight.sum(),
        )

    def rates(self, observed: FloatArray) -> FloatArray:
        """Predict the rates of every id.

        Parameters
        ----------
        observed
            ``[S, R]``: rates of the seen ids.

        Returns
        -------
        ndarray
            ``[V, R]`` in 0..1.
        """
        mean = np.average(observed, axis=0, weights=self.weight)
        weighted = (observed - mean) * self.weight[:, None]
        slope = self.known.T @ weighted.astype(np.float32)
        lowest, best = np.inf, slope
        for penalty, own in zip(self.penalty, self.own, strict=True):
            shrunk = (slope / (self.variance + penalty)[:, None]).astype(np.float32)
            error = observed - mean - self.known @ shrunk
            left_out = error / (1 - own).clip(min=1e-6)[:, None]
            loss = float((self.weight[:, None] * np.square(left_out)).sum())
            if loss < lowest:
                lowest, best = loss, shrunk
        predicted: FloatArray = (self.features @ best + mean).clip(0, 1)
        return predicted


def _features(embeddings: Embeddings, vocab_size: int, seen: IntArray) -> Float32Array:
    """Return ``[V, d]``: unit rows, projected where they are wide."""
    width = embeddings.rows(0, 1).shape[1]
    directions = None
    if width > MOST_DIMENSIONS:
        directions = _main_directions(embeddings, seen, width)
    features = np.empty((vocab_size, min(width, MOST_DIMENSIONS)), dtype=np.float32)
    for ids in _parts(np.arange(vocab_size)):
        rows = unit_rows(embeddings, ids, width)
        features[ids] = rows if directions is None else rows @ directions
    return features


def _main_directions(embeddings: Embeddings, seen: IntArray, width: int) -> Float32Array:
    """Return ``[H, d]``, orthonormal: directions in which the seen rows are long."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((width, MOST_DIMENSIONS), dtype=np.float32)
    for _ in range(_ITERATIONS):
        turned = np.zeros_like(found)
        for ids in _parts(seen):
            rows = unit_rows(embeddings, ids, width)
            turned += rows.T @ (rows @ found)
        found = np.linalg.qr(turned)[0]
    return found


def _parts(ids: IntArray) -> list[IntArray]:
    return [ids[start : start + _ROWS] for start in range(0, len(ids), _ROWS)]
