"""Simulation: what a placement costs on a trace, under every home policy.

Legend of the shapes: T tokens, L MoE layers, k experts per token (top-k), E logical
experts of a layer, R ranks, V token ids. Arrays ``[k, T]`` hold one row per place in the
router's order, so that every step is a pass over contiguous memory.
"""

from placer.simulation.metrics import PolicyMetrics
from placer.simulation.simulate import simulate

__all__ = ["PolicyMetrics", "simulate"]
