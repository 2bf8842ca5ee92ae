"""CP-SAT under a time limit, for the baselines whose papers use a commercial solver."""

import numpy as np
from ortools.sat.python import cp_model

from placer.plan.problem import IntArray

#: ``[n][G]``: whether an expert is in a group.
Assignment = list[list[cp_model.IntVar]]


def equal_assignment(
    model: cp_model.CpModel, hint: IntArray, num_groups: int
) -> Assignment:
    """Add variables that put experts into equal groups; ``hint`` ``[n]`` is a solution."""
    variables = []
    for group in hint.tolist():
        first = [model.new_bool_var("") for _ in range(num_groups)]
        for g, variable in enumerate(first):
            model.add_hint(variable, g == group)
        model.add_exactly_one(first)
        variables.append(first)
    for column in zip(*variables, strict=True):
        model.add(sum(column) == len(hint) // num_groups)
    return variables


def read_assignment(solver: cp_model.CpSolver, assignment: Assignment) -> IntArray:
    """Return the group of each expert, ``[n]`` int64."""
    return np.asarray(
        [[solver.boolean_value(on) for on in row].index(True) for row in assignment],
        dtype=np.int64,
    )


def solve_model(
    model: cp_model.CpModel, seconds: float, seed: int, gap: float = 0.0
) -> cp_model.CpSolver:
    """Solve a program that has a hint, and return the solver that holds its solution.

    Parameters
    ----------
    model
        The program; its hint is a solution.
    seconds
        Limit in deterministic seconds; several strategies take turns in one thread, so
        the same program gives the same solution everywhere.
    seed
        Seed of the strategies.
    gap
        Relative gap at which to stop.
    """
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 8
    solver.parameters.interleave_search = True
    solver.parameters.random_seed = seed
    solver.parameters.max_deterministic_time = seconds
    solver.parameters.relative_gap_limit = gap
    solver.parameters.repair_hint = True
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise RuntimeError(f"CP-SAT lost a solution that it was given: {status}")
    return solver
