"""Reading router traces from NumPy archives.

An archive holds ``experts`` [T, L, k] and ``sequence_ids`` [T], and may hold ``token_ids``
[T], ``phase`` [T] (0 prefill, 1 decode), ``weights`` [T, L, k], ``domain_of_sequence`` [S]
and ``domain_names`` [D]. ExFlow
(https://github.com/YJHMITWEB/ExFlow) saves one array [T, L] instead: top-1 routing.
"""

from pathlib import Path
from typing import Any

import numpy as np

from placer.errors import PlacerError
from placer.run.archives import UNREADABLE, load_array, load_arrays, unreadable_reason
from placer.trace.imported import BoundModel, ImportedTokens

_ARRAYS = (
    "experts",
    "sequence_ids",
    "token_ids",
    "phase",
    "weights",
    "domain_of_sequence",
)
_DOMAIN_NAMES = "domain_names"
# ExFlow's rows have no sequences; blocks of this many rows make folds possible.
_EXFLOW_SEQUENCE = 256


def read_npz(file: Path, model: BoundModel | None) -> ImportedTokens:
    """Read an archive; objects inside it are refused, never unpickled.

    Raises
    ------
    PlacerError
        If it is not an archive, or an array is missing or of the wrong kind or shape.
    """
    remedy = "save it with numpy.savez(FILE, experts=..., sequence_ids=...)"
    try:
        loaded, found = load_arrays(file, {*_ARRAYS, _DOMAIN_NAMES})
        names = loaded.pop(_DOMAIN_NAMES, np.zeros(0, dtype=str))
        arrays: dict[str, Any] = {**loaded}
    except UNREADABLE as error:
        raise PlacerError(
            f"no readable .npz archive of plain arrays: {unreadable_reason(error)}", remedy
        ) from error
    for name in ("experts", "sequence_ids"):
        if name not in arrays:
            listed = ", ".join(found) or "nothing"
            raise PlacerError(f"lacks the array {name}; it holds {listed}", remedy)
    if names.ndim != 1:
        raise PlacerError(f"domain_names has shape {list(names.shape)}, expected [D]")
    if "phase" in arrays and arrays["phase"].dtype == np.bool_:  # whether it is decode
        arrays["phase"] = arrays["phase"].astype(np.uint8)
    return ImportedTokens(**arrays, domain_names=tuple(str(name) for name in names))


def read_exflow(file: Path, model: BoundModel | None) -> ImportedTokens:
    """Read ExFlow's ``.npy``: ``[T, L]``, the one expert of each token and MoE layer.

    The file knows no sequences: every 256 rows become one, so that folds are blocks.

    Raises
    ------
    PlacerError
        If it is not an array of two axes.
    """
    try:
        experts = load_array(file)
    except UNREADABLE as error:
        raise PlacerError(
            f"no readable .npy array: {unreadable_reason(error)}",
            "save it with numpy.save(FILE, experts)",
        ) from error
    if not isinstance(experts, np.ndarray) or experts.ndim != 2:
        shape = list(getattr(experts, "shape", ()))
        raise PlacerError(f"the array has shape {shape}, expected [tokens, layers]")
    return ImportedTokens(
        experts=experts[:, :, None],
        sequence_ids=np.arange(len(experts)) // _EXFLOW_SEQUENCE,
    )
