"""Placements: which physical slot of which rank holds which logical expert."""

from placer.placement.placement import Placement
from placer.placement.plan import Plan
from placer.placement.solver_report import SolverReport

__all__ = ["Placement", "Plan", "SolverReport"]
