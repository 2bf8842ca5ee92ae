"""What is said of the loads of groups, against all splits under their caps."""

import numpy as np
import pytest

from placer.solver.proof.grouping import GroupingProblem
from tests.solver.enumeration import every_layer, least_max_load


def problem_of(load: np.ndarray, num_groups: int, max_load: float) -> GroupingProblem:
    return GroupingProblem(
        num_groups=num_groups, weight={}, load=(load,), max_load=(max_load,)
    )


def allowed_splits(
    load: np.ndarray, num_groups: int, max_load: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return every split under the cap, with the loads of its groups."""
    every = [
        (one, np.bincount(one, load, minlength=num_groups))
        for one in every_layer(len(load), num_groups)
    ]
    return [(one, loads) for one, loads in every if loads.max() <= max_load]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("size", "num_groups"), [(6, 2), (6, 3), (8, 2), (8, 4), (4, 4)])
def test_no_split_under_the_cap_breaks_them(size: int, num_groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    load = np.floor(5 + 60 * rng.random(size) ** 2)
    least = least_max_load(load, num_groups)
    max_load = least + (0, 3, 12, 40)[seed % 4]
    problem = problem_of(load, num_groups, max_load)
    splits = allowed_splits(load, num_groups, max_load)
    between, squares = problem.load_range(0), problem.most_squares(0)
    slots = size // num_groups
    assert problem.slots(0) == slots
    heaviest = np.sort(load)[::-1][:slots].sum()
    assert (between is None) == (squares is None) == (heaviest <= max_load)
    may = problem.may_share(0)
    for one, loads in splits:
        together = one[:, None] == one
        assert (may[together] == 1).all()
        if between is not None:
            assert between[0] <= loads.min() <= loads.max() <= between[1]
            assert (loads**2).sum() <= squares


@pytest.mark.parametrize("seed", range(12))
def test_squares_are_most_where_loads_are_at_the_ends_of_their_range(seed: int) -> None:
    """Against a fine grid of loads that add up, of two, three and four groups."""
    rng = np.random.default_rng(seed)
    num_groups = 2 + seed % 3
    load = np.floor(5 + 30 * rng.random(2 * num_groups))
    heaviest = np.sort(load)[-2:].sum()
    cap = min(np.ceil(load.sum() / num_groups) + seed, heaviest - 1)
    problem = problem_of(load, num_groups, cap)
    between = problem.load_range(0)
    assert between is not None
    least, cap = (int(one) for one in between)
    most = 0
    for rest in np.ndindex(*(cap - least + 1,) * (num_groups - 1)):
        loads = [least + one for one in rest]
        last = int(load.sum()) - sum(loads)
        if least <= last <= cap:
            most = max(most, sum(one**2 for one in (*loads, last)))
    assert problem.most_squares(0) == most


def test_the_range_of_loads_by_hand() -> None:
    load = np.array([1.0, 2, 3, 10, 11, 12])
    # No three weigh more than 33.
    assert problem_of(load, 2, 33.0).load_range(0) is None
    assert problem_of(load, 2, 33.0).most_squares(0) is None
    # The other group holds what is left of 39, and at least the lightest three.
    assert problem_of(load, 2, 25.0).load_range(0) == (14, 25)
    assert problem_of(load, 2, 32.0).load_range(0) == (7, 32)
    assert problem_of(load, 3, 14.0).load_range(0) == (11, 14)
    # All groups at the cap.
    assert problem_of(load, 3, 13.0).most_squares(0) == 3 * 13**2


def test_who_may_share_by_hand() -> None:
    load = np.array([1.0, 2, 3, 10, 11, 12])
    alone = problem_of(load[:3], 3, 99.0)
    assert (alone.may_share(0) == np.eye(3)).all()
    # Two in a group: 11 and 12 are 23, and 12 and 10 are 22.
    two = problem_of(load, 3, 22.0).may_share(0)
    assert np.argwhere(two == 0).tolist() == [[4, 5], [5, 4]]
    # Three in a group: with the lightest, of load 1.
    three = problem_of(load, 2, 23.0).may_share(0)
    assert np.argwhere(three == 0).tolist() == [[4, 5], [5, 4]]
    assert (problem_of(load, 2, 24.0).may_share(0) == 1).all()
    assert (problem_of(load, 2, 99.0).may_share(0) == 1).all()
    # Four in a group: with the two lightest, of 3 together.
    eight = np.array([1.0, 2, 3, 4, 5, 10, 11, 12])
    four = problem_of(eight, 2, 25.0).may_share(0)
    assert np.argwhere(four == 0).tolist() == [[6, 7], [7, 6]]
