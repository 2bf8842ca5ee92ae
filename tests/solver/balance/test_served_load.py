"""Shares of copies, against the tables that the simulator serves by."""

import numpy as np
import pytest

from placer.placement.placement import Placement
from placer.placement.reference import contiguous
from placer.serving.replica_choice import serving_layers
from placer.solver.balance.served_load import ServedLoad

RANKS, NODES = 8, 4
LAYER_IDS = (1, 4, 5)


def placed(seed: int) -> Placement:
    """Three layers of 24 experts, each rank with one more slot at random."""
    rng = np.random.default_rng(seed)
    base = contiguous((24,) * 3, RANKS)
    rows = []
    for row in base.physical_to_logical_map:
        held = row.reshape(RANKS, -1)
        more = [rng.choice(np.setdiff1d(np.arange(24), one), 1) for one in held]
        rows.append(np.concatenate([held, more], axis=1).ravel())
    return Placement(
        physical_to_logical_map=tuple(rows),
        num_experts=(24,) * 3,
        num_ranks=RANKS,
        num_nodes=NODES,
    )


@pytest.mark.parametrize("choice", ["hash", "local-first", "sglang-static"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_home_counts_the_same(choice: str, seed: int) -> None:
    placement = placed(seed)
    served = ServedLoad(choice, placement, LAYER_IDS)
    for layer, tables in enumerate(serving_layers(placement, choice, LAYER_IDS)):
        expected = np.zeros((24, RANKS))
        for home in range(RANKS):
            for expert in range(24):
                number = tables.num_choices[home, expert]
                ranks = tables.choices[home, expert, :number]
                expected[expert, ranks] += 1 / (RANKS * number)
        trial = placed(seed + 10).holds(layer)
        served.shares(trial)  # what is tried does not draw
        np.testing.assert_allclose(served.shares(placement.holds(layer)), expected)
        np.testing.assert_allclose(served.place(placement.holds(layer)), expected)
        np.testing.assert_allclose(expected.sum(axis=1), 1)
