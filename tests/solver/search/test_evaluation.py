"""Which of two placements is the better, and what is priced beside their copies."""

import numpy as np
import pytest

from placer.placement import Placement
from placer.placement.topology import Topology
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.search.evaluation import Evaluation
from placer.solver.search.evaluator import evaluate

Layer = tuple[float, float, float]


def evaluation(*layers: Layer) -> Evaluation:
    """Return what costs so much: load above its cap, copies above theirs, price."""
    load, copies, price = np.array(layers).T
    return Evaluation(
        copies=0.0,
        price=price.sum(),
        price_of_layer=price,
        overflow=np.array([load, copies]),
        imbalance=np.ones(len(layers)),
        most_received_copies=np.arange(len(layers)) + 0.5,
    )


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ((0, 0, 1), (0, 0, 2)),
        ((0, 0, 9), (1, 0, 1)),
        ((0, 0, 9), (0, 1, 1)),
        ((0, 5, 9), (1, 0, 1)),
        ((1, 1, 9), (1, 2, 1)),
        ((0.0009, 0.0009, 1), (0, 0, 2)),
        ((0, 0, 2), (0.0011, 0, 1)),
    ],
)
def test_the_load_cap_comes_first_then_the_copies_cap_then_the_price(
    better: Layer, worse: Layer
) -> None:
    """Sums above a cap are the same up to a thousandth."""
    assert evaluation(better).is_better(evaluation(worse))
    assert not evaluation(worse).is_better(evaluation(better))
    assert not evaluation(better).is_better(evaluation(better))


def test_layers_are_compared_together_or_one_by_one() -> None:
    one = evaluation((2, 0, 1), (0, 0, 5), (0, 0, 3))
    other = evaluation((0, 0, 9), (1, 0, 1), (0, 0, 3))
    assert not one.is_better(other)
    assert one.better_layers(other).tolist() == [False, True, False]
    assert other.better_layers(one).tolist() == [True, False, False]


def test_layers_above_the_cap_on_copies_are_told_with_what_they_reach() -> None:
    found = evaluation((0, 0.0009, 1), (9, 0, 1), (0, 0.0011, 1))
    assert found.missed_receive_cap() == {2: 2.5}


def test_what_is_priced_beside_the_copies_is_counted_in_copies() -> None:
    """Four tokens of even homes; experts 0 and 1 are on rank 0, 2 and 3 on rank 1."""
    problem = TrafficProblem(
        experts=(np.array([[0, 1], [0, 1], [0, 2], [2, 3]], dtype=np.int16),),
        topology=Topology(gpus_per_node=2),
        policy="fixed",
        load=(np.array([[3.0, 2, 2, 1], [4, 2, 1, 1], [1, 1, 3, 3]]),),
        max_load=(np.array([4.5, 5, 4]),),
        overflow_price=3.0,
        receive_price=10.0,
    )
    placement = Placement.from_expert_rank([np.array([0, 0, 1, 1])], 2)
    found = evaluate(problem, placement)
    # Half of the homes are on the other rank: 3 tokens use rank 0 and 2 use rank 1.
    assert found.copies == pytest.approx((1.5 + 1) / 4)
    # The other loads put 6 - 5 and 6 - 4 pairs above the cap.
    beside = 3 * (1 + 2) / 2 + 10 * 1.5
    assert found.price == pytest.approx(found.copies + beside / 4)
    assert found.price_of_layer == pytest.approx([2 * 4 * found.price])
    assert found.overflow.tolist() == [[0.5], [0]]
    assert found.imbalance == pytest.approx([5 / 4])
    assert found.most_received_copies == pytest.approx([2 * 1.5 / 4])
