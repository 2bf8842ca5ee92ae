"""The load balancer of DeepSeek: EPLB (github.com/deepseek-ai/EPLB, its README)."""

from placer.baseline.problem import BaselineProblem
from placer.placement.placement import Placement
from placer.solver.balance.eplb import pack_loads


def eplb(problem: BaselineProblem) -> Placement:
    """Place replicas of experts by the load of the profile: see :func:`pack_loads`."""
    topology, model = problem.topology, problem.trace.model
    return pack_loads(problem.load, topology, problem.redundant_experts, model.n_group)
