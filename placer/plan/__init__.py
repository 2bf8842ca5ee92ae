"""Plans: which physical slot of which rank holds which logical expert."""

from placer.plan.placement import Placement
from placer.plan.plan import Plan, SolverReport

__all__ = ["Placement", "Plan", "SolverReport"]
