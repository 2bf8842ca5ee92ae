"""The independent referee, ``tools/score.py`` of the folder beside the repository."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from placer.placement import Placement
from placer.trace import Chunk


def load_referee(path: Path) -> ModuleType:
    """Import ``score.py``, which shares no code with placer."""
    spec = importlib.util.spec_from_file_location("referee_score", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def referee_result(
    referee: ModuleType,
    placement: Placement,
    tokens: Chunk,
    batch_size: int,
    table: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the referee's metrics by home policy, which it rounds to four decimals."""
    return referee.score(
        np.stack(tokens.experts, axis=1).astype(np.int64),
        tokens.sequence_ids.astype(np.int64),
        list(placement.physical_to_logical_map),
        placement.num_ranks,
        placement.num_nodes,
        batch_size,
        table,
        None if tokens.token_ids is None else tokens.token_ids.astype(np.int64),
        list(placement.num_experts),
    )
