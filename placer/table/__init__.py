"""Token-shuffle tables: a home for each token, by its id and history.

Legend of the shapes: T tokens, L MoE layers, k experts per token (top-k), E logical
experts of a layer, R ranks, V token ids.
"""

from placer.table.build import build_table
from placer.table.table import Table

__all__ = ["Table", "build_table"]
