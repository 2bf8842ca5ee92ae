"""Triangle inequalities against all placements."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator

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


Expert = tuple[int, int]  # a layer and the number there
Inequality = frozenset[Expert] | tuple[frozenset[Expert], Expert]


def every_price(triangles: Triangles) -> Iterator[tuple[Inequality, float]]:
    """Yield prices: of z_ij + z_jk - z_ik <= 1 by ({i, k}, j), of others by {i, j, k}."""
    for triples in triangles._triples:
        for numbers in np.ndindex(triples.price.shape):
            i, j, k = zip(triples.layers, numbers, strict=True)
            one = frozenset((i, j, k)) if triples.most < 0 else (frozenset((i, k)), j)
            if len({i, j, k}) == 3:
                yield one, float(triples.price[numbers])
            else:
                assert triples.price[numbers] <= triangles._unit / 4


def shared(relaxed: Relaxation, one: Expert, two: Expert) -> float:
    (layer, e), (next_layer, other) = sorted((one, two))
    return float(relaxed.shared((layer, next_layer))[e, other])


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_inequality_has_a_price_that_follows_its_violation(num_ranks: int) -> None:
    """All triples of two layers; on two ranks two of any three experts share one."""
    split = grouping(random_problem((6, 6), ONE_NODE[num_ranks], 1))
    triangles, relaxed = Triangles(split), Relaxation(split)
    triples = list(itertools.permutations(itertools.product(range(2), range(6)), 3))
    step = triangles_module._STEP if num_ranks > 2 else triangles_module._STEP_OF_TWO
    step *= float(np.mean([abs(one) for one in split.weight.values()]))
    expected: dict[Inequality, float] = {}
    for move, num_steps in enumerate((20, 5, 30)):
        relaxed.run(num_steps)
        triangles.move(relaxed)
        violation: dict[Inequality, float] = {}
        for i, j, k in triples:
            pairs = [shared(relaxed, *pair) for pair in ((i, j), (j, k), (i, k))]
            violation[frozenset((i, k)), j] = pairs[0] + pairs[1] - pairs[2] - 1
            if num_ranks == 2:
                violation[frozenset((i, j, k))] = 1 - sum(pairs)
        now = step / (1 + move / triangles_module._SETTLING_MOVES)
        for one, value in violation.items():
            expected[one] = max(0.0, expected.get(one, 0.0) + now * value)
    found = list(every_price(triangles))
    assert dict(found).keys() == expected.keys()
    for one, price in found:
        assert price == pytest.approx(expected[one], abs=1e-5 * step)
    assert 0.0 in expected.values()
    assert max(expected.values()) > 0


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_prices_are_paid_by_the_pairs_of_their_inequality(num_ranks: int) -> None:
    """Rounded to a millionth of the heaviest weight, all sums are exact."""
    split = grouping(random_problem((6, 6), ONE_NODE[num_ranks], 2))
    triangles, rng = Triangles(split), np.random.default_rng(0)
    heaviest = max(one.max() for one in split.weight.values())
    unit = 2.0 ** (math.floor(math.log2(heaviest)) + 1 - 20)
    worth, paid = 0.0, defaultdict[frozenset[Expert], float](float)
    for triples in triangles._triples:
        units = rng.integers(9, size=triples.price.shape)
        triples.price[...] = unit * (units + rng.uniform(-0.4, 0.4, units.shape))
        for numbers in np.ndindex(units.shape):
            price = float(unit * units[numbers])
            i, j, k = zip(triples.layers, numbers, strict=True)
            is_transitive = triples.most > 0
            worth += price if is_transitive else -price
            for one, two, sign in ((i, j, 1), (j, k, 1), (i, k, -1)):
                paid[frozenset((one, two))] += price * (sign if is_transitive else -1)
    constant, weight = triangles.priced()
    assert constant == worth
    for (layer, next_layer), rest in weight.items():
        for e, other in np.ndindex(rest.shape):
            pair = frozenset(((layer, e), (next_layer, other)))
            if len(pair) == 2:
                before = split.weight[layer, next_layer][e, other]
                assert rest[e, other] == before - paid[pair]


def test_prices_that_cannot_be_added_up_exactly_are_refused() -> None:
    triangles = Triangles(grouping(random_problem((6, 6), ONE_NODE[2], 1)))
    price = 2.0**50 * triangles._unit
    for triples in triangles._triples[:2]:
        triples.price[0, 1, 2] = price
    assert [one.most for one in triangles._triples[:2]] == [1, 1]
    assert triangles.priced()[0] == 2 * price
    # Worth as much as the others, and of the other sign.
    opposite = next(one for one in triangles._triples if one.most < 0)
    opposite.price[0, 1, 2] = 4 * price
    with pytest.raises(OverflowError, match="diverged"):
        triangles.priced()


def test_too_many_triples_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem((6, 6), ONE_NODE[3], 1)
    monkeypatch.setattr(triangles_module, "_MOST_TRIPLES", 2 * 6**3)
    triangles = Triangles(grouping(problem))
    assert [triples.layers for triples in triangles._triples] == [(0, 0, 0), (1, 1, 1)]
