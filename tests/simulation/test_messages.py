"""Messages of a dispatch where the numbers of ranks and nodes are at their limits."""

from collections import Counter

import numpy as np
import pytest

from placer.errors import UsageError
from placer.serving.layer_serving import rank_dtype
from placer.simulation.messages import dispatch_messages
from placer.target.engine import Exchange


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


@pytest.mark.parametrize(
    ("exchange", "sent"),
    [
        # Token 0 is at home on rank 0, token 1 on rank 3; two nodes of two ranks.
        ("per-expert", [{(0, 1): 1, (0, 3): 2}, {(3, 0): 1, (3, 1): 2}]),
        ("per-rank", [{(0, 1): 1, (0, 3): 1}, {(3, 0): 1, (3, 1): 1}]),
        # To ranks of the other node by way of the home's local index there.
        (
            "per-node",
            [{(0, 1): 1, (0, 2): 1, (2, 3): 1}, {(3, 1): 1, (1, 0): 1}],
        ),
    ],
)
def test_what_is_sent_by_hand(exchange: Exchange, sent: list[dict[object, int]]) -> None:
    ranks = np.array([[0, 1, 3, 3], [3, 1, 1, 0]], dtype=np.uint8).T
    home = np.array([0, 3], dtype=np.uint8)
    for token, expected in enumerate(sent):
        mine = slice(token, token + 1)
        steps = dispatch_messages(exchange, ranks[:, mine], home[mine], 2)
        found = sum(step.between(4) for step in steps)
        assert {pair: n for pair, n in np.ndenumerate(found) if n} == expected


@pytest.mark.parametrize("exchange", ["all-gather", "padded"])
def test_what_does_not_depend_on_the_placement_is_refused(exchange: Exchange) -> None:
    ranks, home = np.zeros((2, 1), np.uint8), np.zeros(1, np.uint8)
    with pytest.raises(UsageError, match=f"exchange {exchange} sends the same"):
        dispatch_messages(exchange, ranks, home, 2)
