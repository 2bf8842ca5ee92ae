"""Baselines: placements of other methods, to compare placer's own with.

One module each, written from the description of the paper or tool that its docstring
names. Every baseline sees a :class:`BaselineProblem` and returns a placement with equal
slots; the docstring says where it differs from its source. The same problem and seed give
the same placement.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from placer.baseline.eplb import eplb
from placer.baseline.exflow import exflow
from placer.baseline.grace import grace
from placer.baseline.kernighan_lin import kernighan_lin
from placer.baseline.metis import metis
from placer.baseline.moetuner import moetuner
from placer.baseline.mtkahypar import mtkahypar
from placer.baseline.occult import occult
from placer.baseline.problem import BaselineProblem
from placer.baseline.semmoe import semmoe
from placer.placement.placement import Placement
from placer.placement.reference import contiguous, random
from placer.solver.balance.load_caps import balanced

__all__ = ["BASELINES", "BaselineProblem"]


def _contiguous(problem: BaselineProblem) -> Placement:
    return contiguous(
        problem.num_experts,
        problem.num_ranks,
        problem.num_nodes,
        problem.redundant_experts,
    )


def _balanced(problem: BaselineProblem) -> Placement:
    return balanced(problem.load, problem.num_ranks, problem.num_nodes)


def _random(problem: BaselineProblem) -> Placement:
    return random(
        problem.num_experts, problem.num_ranks, problem.num_nodes, seed=problem.seed
    )


#: Baselines by the name that ``placer simulate --baseline`` takes.
BASELINES: Mapping[str, Callable[[BaselineProblem], Placement]] = MappingProxyType(
    {
        "contiguous": _contiguous,
        "balanced": _balanced,
        "random": _random,
        "eplb": eplb,
        "exflow": exflow,
        "moetuner": moetuner,
        "grace": grace,
        "occult": occult,
        "sem-moe": semmoe,
        "kernighan-lin": kernighan_lin,
        "metis": metis,
        "mt-kahypar": mtkahypar,
    }
)
