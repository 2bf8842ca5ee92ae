"""Placements: which physical slot of which rank holds which logical expert."""

from placer.placement.placement import Placement
from placer.placement.plan import Plan, SolverReport

__all__ = ["Placement", "Plan", "SolverReport"]
