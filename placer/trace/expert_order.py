"""The order in which a foreign record lists the experts of a token."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from placer.arrays import AnyArray

if TYPE_CHECKING:
    from placer.trace.imported import ImportedTokens

# In rows by weight two experts ascend in half of them, and few tokens show nothing.
_FEWEST_TOKENS = 64
_NEARLY_ALL = 0.99


def ordered_by_weight(tokens: "ImportedTokens") -> tuple["ImportedTokens", int]:
    """List the experts of every token and layer by descending weight, where it is recorded.

    Equal weights keep their order.

    Returns
    -------
    ImportedTokens, int
        The tokens, and how many rows (of a token and a layer) were listed in another order.
    """
    weights = tokens.weights
    if weights is None:
        return tokens, 0
    number = int((weights[..., 1:] > weights[..., :-1]).any(axis=2).sum())
    if not number:
        return tokens, 0
    order = np.argsort(-weights, axis=2, kind="stable")
    experts, weights = (
        np.take_along_axis(values, order, axis=2) for values in (tokens.experts, weights)
    )
    return replace(tokens, experts=experts, weights=weights), number


def listed_by_id(experts: AnyArray) -> bool:
    """Return whether rows list their experts by id, as ``topk(sorted=False)`` does.

    That is so where the ids of nearly all rows ascend, in most layers; in rows by weight
    they do in one of k! rows. The last expert of a row is not looked at, where there are
    more than two: on CUDA, topk lists the lightest one last, wherever its id belongs
    (``gatherTopK`` of PyTorch's TensorTopK.cu).

    Parameters
    ----------
    experts
        ``[T, L, k]`` ids.
    """
    num_tokens, _, top_k = experts.shape
    if num_tokens < _FEWEST_TOKENS or top_k == 1:
        return False
    told = experts[..., : max(2, top_k - 1)]
    ascending = (told[..., 1:] > told[..., :-1]).all(axis=2).mean(axis=0)
    return bool(np.median(ascending) >= _NEARLY_ALL)
