"""Controls: the same tokens with one kind of structure destroyed, the rest kept.

From the mildest to the harshest, each keeps less of the real routing:

===================  ==============================  =====================
control              kept                            destroyed
===================  ==============================  =====================
``within-sequence``  load, co-activation, topic      links of a token
``across-tokens``    load, co-activation             links and topic
``skew-only``        load, experts per token         co-activation too
===================  ==============================  =====================

What a figure loses from one row to the next is due to that structure. ``skew-only``
mixes the order of a token's experts too, so read its figures over all pairs, not top-1;
router weights would mean nothing there and are left out.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from placer.arrays import AnyArray
from placer.trace.chunk import Chunk

Control = Callable[[Chunk, int], Chunk]

# On gpt-oss-20b the information between and within layers is at its floor after 5 rounds.
_TRADE_ROUNDS = 16


def shuffled_within_sequences(chunk: Chunk, seed: int) -> Chunk:
    """Reorder each layer's tokens inside their sequence, every layer on its own."""
    rng = np.random.default_rng(seed)

    def order() -> AnyArray:
        # Sequence ids do not decrease, so each sequence keeps its place.
        return np.lexsort((rng.random(chunk.num_tokens), chunk.sequence_ids))

    return _reordered(chunk, order)


def shuffled_across_tokens(chunk: Chunk, seed: int) -> Chunk:
    """Reorder each layer's tokens over the whole chunk, every layer on its own."""
    rng = np.random.default_rng(seed)
    return _reordered(chunk, lambda: rng.permutation(chunk.num_tokens))


def without_coactivation(chunk: Chunk, seed: int) -> Chunk:
    """Redraw which token uses which expert; loads and experts per token stay.

    The bipartite graph of tokens and experts is randomised by trades: two tokens pool the
    experts that only one of them uses and draw again ("curveball", Strona et al., Nature
    Communications 5, 2014). A round pairs all tokens at random.
    """
    rng = np.random.default_rng(seed)
    experts = tuple(_traded(ids, rng) for ids in chunk.experts)
    return replace(chunk, experts=experts, weights=None)


CONTROLS: dict[str, Control] = {
    "within-sequence": shuffled_within_sequences,
    "across-tokens": shuffled_across_tokens,
    "skew-only": without_coactivation,
}


def blocks(chunks: Iterable[Chunk], num_tokens: int) -> Iterator[Chunk]:
    """Join chunks until a block holds ``num_tokens`` or more, so that memory is bounded.

    A control shuffles inside one chunk: of larger blocks less topic survives.
    """
    parts: list[Chunk] = []
    for chunk in chunks:
        parts.append(chunk)
        if sum(part.num_tokens for part in parts) >= num_tokens:
            yield Chunk.concatenate(parts)
            parts = []
    if parts:
        yield Chunk.concatenate(parts)


def _reordered(chunk: Chunk, draw_order: Callable[[], AnyArray]) -> Chunk:
    orders = [draw_order() for _ in chunk.experts]

    def apply(layers: tuple[AnyArray, ...]) -> tuple[AnyArray, ...]:
        return tuple(rows[order] for rows, order in zip(layers, orders, strict=True))

    weights = None if chunk.weights is None else apply(chunk.weights)
    return replace(chunk, experts=apply(chunk.experts), weights=weights)


def _traded(ids: AnyArray, rng: np.random.Generator) -> AnyArray:
    traded = ids.copy()
    num_pairs, top_k = len(ids) // 2, ids.shape[1]
    for _ in range(_TRADE_ROUNDS):
        partners = rng.permutation(len(ids))[: 2 * num_pairs].reshape(num_pairs, 2)
        one, two = traded[partners[:, 0]], traded[partners[:, 1]]
        equal = one[:, :, None] == two[:, None, :]
        shared = np.concatenate([equal.any(axis=2), equal.any(axis=1)], axis=1)
        # Both orders list the places of unshared experts first and shared ones after in
        # place, so that only unshared experts move.
        places = np.argsort(shared, axis=1, kind="stable")
        drawn = np.where(shared, 2.0, rng.random(shared.shape))
        sources = np.argsort(drawn, axis=1, kind="stable")
        pooled = np.concatenate([one, two], axis=1)
        moved = np.take_along_axis(pooled, sources, axis=1)
        np.put_along_axis(pooled, places, moved, axis=1)
        traded[partners[:, 0]] = pooled[:, :top_k]
        traded[partners[:, 1]] = pooled[:, top_k:]
    return traded
