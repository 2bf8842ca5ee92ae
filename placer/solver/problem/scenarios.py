"""Possible future loads: the profile's load, and resampled ones.

Legend of the shapes: S scenarios, E logical experts, T tokens, G groups of tokens.
"""

from typing import Literal, get_args

import numpy as np

from placer.arrays import FloatArray, IntArray
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
    group, times = _groups(tokens, robust, seed, num_resamples)
    num_tokens = np.bincount(group, minlength=times.shape[1])
    scale = tokens.num_tokens / (times @ num_tokens)
    scenarios = []
    for ids, size in zip(tokens.experts, num_experts, strict=True):
        pair = group[:, None] * size + ids
        counts = np.bincount(pair.ravel(), minlength=times.shape[1] * size)
        pairs = times @ counts.reshape(-1, size)
        scenarios.append(pairs * scale[:, None])
    return tuple(scenarios)


def _groups(
    tokens: Chunk, robust: Robust, seed: int, num_resamples: int
) -> tuple[IntArray, IntArray]:
    """Return the group ``[T]`` of each token, and how often each scenario has each group.

    The second is ``[S, G]`` int64, of G groups; its first row is all tokens once.
    """
    if robust == "none":
        return np.zeros(tokens.num_tokens, dtype=np.int64), np.ones((1, 1), dtype=np.int64)
    if robust == "bootstrap":
        rng = np.random.default_rng([seed, num_resamples])
        ids, group = np.unique(tokens.sequence_ids, return_inverse=True)
        even = np.full(len(ids), 1 / len(ids))
        times = rng.multinomial(len(ids), even, size=num_resamples)
    elif robust != "domains":
        raise UsageError(
            f"--robust {robust} is not known", "choose none, bootstrap or domains"
        )
    elif tokens.domain_ids is None:
        raise UsageError(
            "the trace has no domains, which --robust domains needs",
            "choose --robust bootstrap, or record with --domain NAME=PATH",
        )
    else:
        ids, group = np.unique(tokens.domain_ids, return_inverse=True)
        times = np.eye(len(ids), dtype=np.int64)
    return group, np.vstack([np.ones((1, len(ids)), dtype=np.int64), times])
