"""CP-SAT under a time limit, for the baselines whose papers use a commercial solver."""

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from placer.arrays import IntArray

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

#: ``[n][G]``: whether an expert is in a group.
Assignment: TypeAlias = "list[list[cp_model.IntVar]]"


class GroupingProgram:
    """A program that puts experts into equal groups, several times over.

    Attributes
    ----------
    model
        The program; the caller adds other variables and constraints.
    """

    def __init__(self) -> None:
        from ortools.sat.python import cp_model

        self.model = cp_model.CpModel()
        self._start: list[IntArray] = []
        self._assignments: list[Assignment] = []

    def add_experts(self, start: IntArray, num_groups: int) -> Assignment:
        """Add experts that are to be in equal groups; ``start`` ``[n]`` is a solution."""
        model, variables = self.model, []
        for group in start.tolist():
            row = [model.new_bool_var("") for _ in range(num_groups)]
            for g, variable in enumerate(row):
                model.add_hint(variable, g == group)
            model.add_exactly_one(row)
            variables.append(row)
        for column in zip(*variables, strict=True):
            model.add(sum(column) == len(start) // num_groups)
        self._start.append(start)
        self._assignments.append(variables)
        return variables

    def solve(self, seconds: float, seed: int, gap: float = 0.0) -> list[IntArray]:
        """Return the group of each expert, ``[n]`` int64, in the order they were added.

        Parameters
        ----------
        seconds
            Limit in deterministic seconds; in one thread, so that the same program gives
            the same solution everywhere. Where CP-SAT finds nothing within it, the start
            is returned.
        seed
            Seed of the search.
        gap
            Relative gap at which to stop.
        """
        from ortools.sat.python import cp_model

        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        # Breaking the symmetry of groups would lose the hint.
        solver.parameters.symmetry_level = 0
        solver.parameters.random_seed = seed
        solver.parameters.max_deterministic_time = seconds
        solver.parameters.relative_gap_limit = gap
        # If OR-Tools catches Ctrl-C, only this search ends and the caller does not notice.
        solver.parameters.catch_sigint_signal = False
        if solver.solve(self.model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return self._start
        return [
            np.asarray(
                [[solver.boolean_value(on) for on in row].index(True) for row in rows],
                dtype=np.int64,
            )
            for rows in self._assignments
        ]
