"""Loads of tomorrow: the profile's load, and what it could have been.

Legend of the shapes: S scenarios, E logical experts, T tokens.
"""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from placer.arrays import FloatArray
from placer.errors import UsageError
from placer.solver.params import SolverParams
from placer.trace import Chunk

Robust = Literal["none", "bootstrap", "domains"]
ROBUST: tuple[Robust, ...] = get_args(Robust)


def load_scenarios(
    tokens: Chunk,
    num_experts: tuple[int, ...],
    robust: Robust,
    seed: int,
    num_resamples: int = SolverParams().num_resamples,
) -> tuple[FloatArray, ...]:
    """Return L arrays ``[S, E]``: pairs per expert; the first row is the profile's own.

    ``bootstrap`` draws as many sequences as there are, with replacement,
    ``num_resamples`` times: they differ as one more day of the same traffic may.
    ``domains`` has one scenario per domain, as if all traffic were of it. Every scenario
    is scaled to the profile's number of tokens.

    Raises
    ------
    UsageError
        If ``domains`` is asked of tokens without domains, or the name is unknown.
    """
    weights = _token_weights(tokens, robust, seed, num_resamples)
    scenarios = []
    for ids, size in zip(tokens.experts, num_experts, strict=True):
        rows = [
            np.bincount(ids.ravel(), np.repeat(weight, ids.shape[1]), minlength=size)
            for weight in weights
        ]
        scenarios.append(np.stack(rows).astype(np.float64))
    return tuple(scenarios)


def _token_weights(
    tokens: Chunk, robust: Robust, seed: int, num_resamples: int
) -> list[FloatArray]:
    own = np.ones(tokens.num_tokens)
    if robust == "none":
        return [own]
    if robust == "bootstrap":
        rng = np.random.default_rng([seed, num_resamples])
        ids, index = np.unique(tokens.sequence_ids, return_inverse=True)
        even = np.full(len(ids), 1 / len(ids))
        drawn = [rng.multinomial(len(ids), even)[index] for _ in range(num_resamples)]
        return [own, *(_scaled(weight) for weight in drawn)]
    if robust != "domains":
        raise UsageError(
            f"--robust {robust} is not known", "choose none, bootstrap or domains"
        )
    if tokens.domain_ids is None:
        raise UsageError(
            "the trace has no domains, which --robust domains needs",
            "choose --robust bootstrap, or record with --domain NAME=PATH",
        )
    present = np.unique(tokens.domain_ids)
    return [own, *(_scaled(tokens.domain_ids == domain) for domain in present)]


def _scaled(weight: npt.NDArray[np.generic]) -> FloatArray:
    as_float = weight.astype(np.float64)
    scaled: FloatArray = as_float * (len(as_float) / as_float.sum())
    return scaled
