"""Affinity: exact counts of which experts are used, and used together.

Legend of the shapes: L MoE layers, E logical experts of a layer, V token ids, S sequences.
"""

from placer.affinity.affinity import Affinity
from placer.affinity.count import count_affinity
from placer.affinity.sparse import SparseCounts

__all__ = ["Affinity", "SparseCounts", "count_affinity"]
