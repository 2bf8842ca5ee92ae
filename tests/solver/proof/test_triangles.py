"""Triangle inequalities against all placements."""

import numpy as np
import pytest

from placer.solver.problem.pairs import PlacementProblem
from placer.solver.proof import triangles as triangles_module
from placer.solver.proof.grouping import GroupingProblem
from placer.solver.proof.relaxation import Relaxation
from placer.solver.proof.triangles import Triangles
from tests.solver.enumeration import ONE_NODE, every_placement, random_problem


def kept_together(
    weight: dict[tuple[int, int], np.ndarray], placement: tuple[np.ndarray, ...]
) -> float:
    total = 0.0
    for (layer, next_layer), one in weight.items():
        together = placement[layer][:, None] == placement[next_layer]
        if layer == next_layer:
            total += (one * np.triu(together, 1)).sum()
        else:
            total += (one * together).sum()
    return total


def grouping(problem: PlacementProblem) -> GroupingProblem:
    weight = {(layer, layer): one for layer, one in enumerate(problem.within)}
    for layer, one in enumerate(problem.between or ()):
        weight[layer, layer + 1] = one
    return GroupingProblem(
        num_groups=problem.num_ranks,
        weight=weight,
        load=problem.load,
        max_load=problem.max_load,
    )


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(
    ("num_experts", "num_ranks"), [((4, 4, 2), 2), ((6, 4), 2), ((6, 3), 3), ((4, 4), 4)]
)
def test_any_prices_certify(
    num_experts: tuple[int, ...], num_ranks: int, seed: int
) -> None:
    """What a placement keeps is at most the constant plus what it keeps of new weights."""
    problem = random_problem(num_experts, ONE_NODE[num_ranks], seed, reachable=True)
    split = grouping(problem)
    triangles = Triangles(split)
    relaxed = Relaxation(split)
    relaxed.run(3)
    rng = np.random.default_rng(seed)
    for triples in triangles._triples:
        triples.price[...] = rng.random(triples.price.shape) * 20 * (rng.random() < 0.5)
    triangles.move(relaxed)
    constant, weight = triangles.priced()
    for placement in every_placement(problem):
        kept = kept_together(dict(split.weight), placement)
        assert kept <= constant + kept_together(weight, placement)


def test_even_sharing_raises_no_price() -> None:
    problem = random_problem((6, 6), ONE_NODE[3], 1)
    split = grouping(problem)
    triangles, relaxed = Triangles(split), Relaxation(split)
    triangles.move(relaxed)  # at the even z = 1/3, nothing is violated
    constant, weight = triangles.priced()
    assert constant == 0
    for block, one in weight.items():
        assert (one == split.weight[block]).all()


def test_prices_rise_exactly_where_sharing_is_not_transitive() -> None:
    split = grouping(random_problem((6, 6), ONE_NODE[3], 1))
    triangles, relaxed = Triangles(split), Relaxation(split)
    relaxed.run(20)
    triangles.move(relaxed)

    def shared(one: tuple[int, int], two: tuple[int, int]) -> float:
        """Return z of two experts, each a layer and its number there."""
        (layer, e), (next_layer, other) = sorted((one, two))
        return float(relaxed.shared((layer, next_layer))[e, other])

    raised, expected = [], []
    for triples in triangles._triples:
        for numbers in np.ndindex(triples.price.shape):
            i, j, k = zip(triples.layers, numbers, strict=True)
            raised.append(bool(triples.price[numbers] > 0))
            distinct = len({i, j, k}) == 3
            expected.append(distinct and shared(i, j) + shared(j, k) > 1 + shared(i, k))
    assert raised == expected
    assert any(raised)


def test_too_many_triples_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem((6, 6), ONE_NODE[3], 1)
    monkeypatch.setattr(triangles_module, "_MOST_TRIPLES", 2 * 6**3)
    triangles = Triangles(grouping(problem))
    assert [triples.layers for triples in triangles._triples] == [(0, 0, 0), (1, 1, 1)]
