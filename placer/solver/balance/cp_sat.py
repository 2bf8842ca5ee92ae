"""Running CP-SAT: the same answer on every machine, and Ctrl-C stops it.

Functions import CP-SAT where they use it: it imports pandas, which takes longer than many
solves, and most need no CP-SAT.
"""

from typing import TYPE_CHECKING

from placer.run.deadline import Deadline

if TYPE_CHECKING:
    from ortools.sat.python import cp_model


def repeatable_solver(deterministic_time: float, deadline: Deadline) -> "cp_model.CpSolver":
    """Return a solver on one thread, which stops at the deadline.

    Parameters
    ----------
    deterministic_time
        Most work, in CP-SAT's seconds that do not depend on the machine.
    deadline
        Stops it earlier.
    """
    from ortools.sat.python import cp_model

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = deterministic_time
    if (left := deadline.left()) is not None:
        solver.parameters.max_time_in_seconds = left
    # A Ctrl-C that is caught ends only this search, and nothing reports it.
    solver.parameters.catch_sigint_signal = False
    return solver
