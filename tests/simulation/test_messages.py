"""Messages of a dispatch where the numbers of ranks and nodes are at their limits."""

from collections import Counter

import numpy as np
import pytest

from placer.serving.layer_serving import rank_dtype
from placer.simulation.messages import dispatch_messages


@pytest.mark.parametrize("num_nodes", [1, 2, 256])
def test_a_byte_holds_the_ranks_of_a_node_of_256(num_nodes: int) -> None:
    """Counted token by token; 256 ranks are the most whose numbers are bytes."""
    width = 256 // num_nodes
    rng = np.random.default_rng(0)
    ranks = rng.integers(256, size=(3, 50)).astype(rank_dtype(255))
    home = rng.integers(256, size=50).astype(rank_dtype(255))
    expected: Counter[tuple[int, int]] = Counter()
    for served, at in zip(ranks.T.tolist(), home.tolist(), strict=True):
        for node in {rank // width for rank in served}:
            landing = node * width + at % width
            expected[at, landing] += landing != at
            expected.update(
                (landing, rank)
                for rank in set(served)
                if rank // width == node and rank != landing
            )
    steps = dispatch_messages("per-node", ranks, home, width)
    found = sum(step.between(256) for step in steps)
    assert {pair: n for pair, n in np.ndenumerate(found) if n} == +expected
