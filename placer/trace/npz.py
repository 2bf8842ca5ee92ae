"""Reading router traces from NumPy archives.

An archive holds ``experts`` [T, L, k] and ``sequence_ids`` [T], and may hold ``token_ids``
[T], ``phase`` [T] (0 prefill, 1 decode), ``weights`` [T, L, k], ``domain_of_sequence`` [S]
and ``domain_names`` [D]. Batches are ``experts`` [B, S, L, k] with ``attention_mask``
[B, S] or ``lengths`` [B]. ExFlow
(https://github.com/YJHMITWEB/ExFlow) saves one array [T, L] instead: top-1 routing.
"""

from pathlib import Path
from typing import Any

import numpy as np

from placer.errors import PlacerError
from placer.run.archives import UNREADABLE, load_array, load_arrays, unreadable_reason
from placer.trace.imported import BoundModel, ImportedTokens, axes_doubt
from placer.trace.token_rows import phase_numbers

_ARRAYS = (
    "experts",
    "sequence_ids",
    "token_ids",
    "phase",
    "weights",
    "domain_of_sequence",
)
_DOMAIN_NAMES = "domain_names"
# Of batches: which of their tokens are real.
_MASKS = ("attention_mask", "mask", "lengths")
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
        loaded, found = load_arrays(file, {*_ARRAYS, _DOMAIN_NAMES, *_MASKS})
        names = loaded.pop(_DOMAIN_NAMES, np.zeros(0, dtype=str))
        arrays: dict[str, Any] = {**loaded}
    except UNREADABLE as error:
        raise PlacerError(
            f"no readable .npz archive of plain arrays: {unreadable_reason(error)}", remedy
        ) from error
    masks = {name: arrays.pop(name) for name in _MASKS if name in arrays}
    if "experts" in arrays and arrays["experts"].ndim == 4:
        arrays = _of_batches(arrays, masks)
    for name in ("experts", "sequence_ids"):
        if name not in arrays:
            listed = ", ".join(found) or "nothing"
            raise PlacerError(f"lacks the array {name}; it holds {listed}", remedy)
    if names.ndim != 1:
        raise PlacerError(f"domain_names has shape {list(names.shape)}, expected [D]")
    arrays = {name: _numbers(name, values, arrays) for name, values in arrays.items()}
    if "phase" in arrays and arrays["phase"].dtype == np.bool_:  # whether it is decode
        arrays["phase"] = arrays["phase"].astype(np.uint8)
    return ImportedTokens(**arrays, domain_names=tuple(str(name) for name in names))


def _of_batches(arrays: dict[str, Any], masks: dict[str, Any]) -> dict[str, Any]:
    """Return ``[T, ...]`` of ``[B, S, ...]``: the tokens of B sequences without padding."""
    shape = arrays["experts"].shape[:2]
    mask = next((masks[name] for name in _MASKS if name in masks), np.zeros(0))
    is_numbers = mask.dtype.kind in "biuf"
    # Without the longest sequence S may be another axis.
    if is_numbers and mask.shape == shape[:1] and mask.max(initial=0) == shape[1]:
        mask = np.arange(shape[1]) < mask[:, None]
    if mask.shape != shape or not is_numbers:
        raise PlacerError(
            f"experts has shape {list(arrays['experts'].shape)}: of [B, S, L, k] placer "
            "must know which tokens are padding",
            "save attention_mask [B, S] with it, or lengths [B] whose largest is S",
        )
    if not np.isin(
        mask, (0, 1)
    ).all():  # such as a mask to add: 0 for real, -inf for padding
        raise PlacerError(
            f"the mask of tokens holds {mask.min():g} to {mask.max():g}, expected 0 and 1",
            "save attention_mask as 1 for real tokens and 0 for padding",
        )
    given = arrays.get("sequence_ids", np.arange(shape[0]))
    arrays["sequence_ids"] = (
        np.repeat(given[:, None], shape[1], axis=1) if given.ndim == 1 else given
    )
    for name, values in arrays.items():
        if name != "domain_of_sequence":
            if values.shape[:2] != shape:
                raise PlacerError(
                    f"{name} has shape {list(values.shape)}, expected {[*shape]} in front, "
                    "as experts has"
                )
            arrays[name] = values[mask != 0]
    return arrays


def _numbers(name: str, values: Any, arrays: dict[str, Any]) -> Any:
    """Return ids that are texts as numbers; other names of sequences in their order."""
    if values.dtype.kind not in "US" or name == "weights":
        return values
    if name == "phase":
        return phase_numbers(
            values.tolist(), "save phase as prefill and decode, or 0 and 1"
        )
    try:
        return values.astype(np.int64)
    except (ValueError, OverflowError) as error:
        if name != "sequence_ids":
            raise PlacerError(f"{name} holds a text that is not a whole number") from error
    if "domain_of_sequence" in arrays:
        raise PlacerError(
            "sequence_ids are names, so domain_of_sequence cannot be read by their number",
            "save sequence_ids as whole numbers from 0",
        )
    _, first, name_of = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[name_of]


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
    num_tokens, num_layers = experts.shape
    is_doubtful = model is None and num_layers > num_tokens
    return ImportedTokens(
        experts=experts[:, :, None],
        remarks=(axes_doubt(f"{num_tokens} tokens of {num_layers} layers"),)
        if is_doubtful
        else (),
        sequence_ids=np.arange(len(experts)) // _EXFLOW_SEQUENCE,
    )
