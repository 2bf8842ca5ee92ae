"""Router traces: which experts the router chose for every token.

Legend of the shapes: T tokens, L MoE layers, k experts per token (top-k), E logical
experts of a layer.
"""

from placer.trace.chunk import Chunk
from placer.trace.fold import Fold
from placer.trace.reader import Trace
from placer.trace.selection import EVERYTHING, Selection
from placer.trace.stored import Routing, StoredTokens
from placer.trace.writer import TraceWriter

__all__ = [
    "EVERYTHING",
    "Chunk",
    "Fold",
    "Routing",
    "Selection",
    "StoredTokens",
    "Trace",
    "TraceWriter",
]
