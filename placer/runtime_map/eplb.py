"""EPLB: the three arrays that DeepSeek's ``rebalance_experts`` returns.

``phy2log`` [L, P], the expert in each slot; ``log2phy`` [L, E, X], the slots of each expert
in ascending order, padded with -1 up to X, the most replicas that any has; ``logcnt`` [L,
E], how many replicas it has. All int64 (https://github.com/deepseek-ai/EPLB, ``eplb.py``).
The last two follow from ``phy2log``, so a file may hold only that one. Import reads any
integer type. vLLM has other names for the same arrays
(``vllm/distributed/eplb/eplb_state.py``).
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from placer.arrays import IntArray
from placer.errors import PlacerError
from placer.model import ModelSpec, require_same_model
from placer.run.archives import UNREADABLE, load_arrays, unreadable_reason
from placer.run.documents import Document, NumRanks, parse_json, validated
from placer.run.files import require_file
from placer.run.writing import write_tensors
from placer.runtime_map.runtime import MapSource, ParsedMap, Runtime


class EplbHeader(Document, frozen=True, kw_only=True):
    """The metadata of a map; see ``docs/formats.md``."""

    kind: Literal["eplb"]
    model: ModelSpec
    num_ranks: NumRanks
    num_nodes: NumRanks


_NAMES = ("phy2log", "log2phy", "logcnt")
_VLLM_NAMES = {
    "physical_to_logical_map": "phy2log",
    "logical_to_physical_map": "log2phy",
    "logical_replica_count": "logcnt",
}


def _arrays(phy2log: IntArray, num_experts: int) -> dict[str, IntArray]:
    """Return the three arrays that ``phy2log`` implies."""
    num_layers = len(phy2log)
    logcnt = np.stack([np.bincount(row, minlength=num_experts) for row in phy2log])
    log2phy = np.full((num_layers, num_experts, int(logcnt.max())), -1, dtype=np.int64)
    for layer, row in enumerate(phy2log):
        slots = np.argsort(row, kind="stable")
        ends = np.cumsum(logcnt[layer])
        for expert, (count, end) in enumerate(zip(logcnt[layer], ends, strict=True)):
            log2phy[layer, expert, :count] = slots[end - count : end]
    arrays = (phy2log, log2phy, logcnt.astype(np.int64))
    return dict(zip(_NAMES, arrays, strict=True))


def _write(source: MapSource, path: Path, suffix: str) -> None:
    phy2log = np.asarray(source.uniform_rows("EPLB"), dtype=np.int64)
    arrays: dict[str, Any] = _arrays(phy2log, source.placement.num_experts[0])
    if suffix == ".npz":
        with path.open("wb") as stream:
            np.savez(stream, **arrays)
        return
    write_tensors(path, arrays, _header_of(source).to_json())


def _header_of(source: MapSource) -> EplbHeader:
    return EplbHeader(
        kind="eplb",
        model=source.model,
        num_ranks=source.placement.num_ranks,
        num_nodes=source.placement.num_nodes,
    )


def _require_header(found: EplbHeader, expected: EplbHeader, path: Path) -> None:
    """Refuse a header that is not the plan's; what a model is called means nothing."""
    pairs: list[tuple[Document, Document, tuple[str, ...]]] = [
        (found, expected, ("num_ranks", "num_nodes"))
    ]
    require_same_model(found.model, str(path), expected.model, "the plan's model")
    if found.model.bound and expected.model.bound:
        pairs.append((found.model, expected.model, ("n_group", "topk_group")))
    for one, other, names in pairs:
        for name in names:
            ours, theirs = getattr(one, name), getattr(other, name)
            if ours != theirs:
                raise PlacerError(
                    f"its header has {name} {ours}, in the plan it is {theirs}"
                )


def _read(source: MapSource, path: Path, suffix: str) -> list[list[int]]:
    found = _load(path, suffix)
    if suffix != ".npz" and (header := _header(path)) is not None:
        _require_header(header, _header_of(source), path)
    kinds = np.integer if source.any_integers else np.int64
    odd = [name for name, one in found.items() if not np.issubdtype(one.dtype, kinds)]
    phy2log = found["phy2log"]
    if odd or phy2log.ndim != 2 or len(phy2log) != source.model.num_layers:
        raise PlacerError(
            f"phy2log has shape {list(phy2log.shape)} for {source.model.num_layers} MoE "
            f"layers; not int64: {odd}"
        )
    num_experts = source.placement.num_experts[0]
    if phy2log.min(initial=0) < 0 or phy2log.max(initial=0) >= num_experts:
        raise PlacerError(f"phy2log holds an expert outside 0..{num_experts - 1}")
    for name, expected in _arrays(phy2log, num_experts).items():
        if name in found and not np.array_equal(found[name], expected):
            raise PlacerError(f"{name} does not match phy2log")
    rows: list[list[int]] = phy2log.tolist()
    return rows


def _parse(path: Path, suffix: str) -> ParsedMap:
    found = _load(path, suffix)
    phy2log, logcnt = found["phy2log"], found.get("logcnt")
    is_odd = logcnt is not None and logcnt.ndim != 2
    if phy2log.ndim != 2 or is_odd or not np.issubdtype(phy2log.dtype, np.integer):
        raise PlacerError("phy2log or logcnt is not a matrix of whole numbers")
    sizes = None if logcnt is None else (logcnt.shape[1],) * len(phy2log)
    if 0 in phy2log.shape:
        raise PlacerError(f"phy2log has shape {list(phy2log.shape)}: it has no slot")
    header = None if suffix == ".npz" else _header(path)
    model = None if header is None else header.model
    return ParsedMap(rows=phy2log.tolist(), num_experts=sizes, model=model)


def _header(path: Path) -> EplbHeader | None:
    """Return what placer wrote next to the arrays; files of others have no metadata."""
    from safetensors import safe_open

    with safe_open(path, "np") as opened:
        metadata = opened.metadata()
    if not metadata:
        return None
    if set(metadata) != {"placer"}:
        raise PlacerError(f"its metadata has {sorted(metadata)}, expected ['placer']")
    text = metadata["placer"]
    where, again = f"map {path}", f"placer export eplb PLAN --out {path}"
    header = parse_json(text, f"the header of {where}")
    return validated(header, EplbHeader, where, again)


def _load(path: Path, suffix: str) -> dict[str, Any]:
    """Return all three arrays, or only ``phy2log``; under vLLM's names any with it."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    require_file(path, "map")
    try:
        found = load_arrays(path)[0] if suffix == ".npz" else load_file(path)
    except (SafetensorError, *UNREADABLE) as error:
        raise PlacerError(f"it cannot be loaded: {unreadable_reason(error)}") from error
    if "physical_to_logical_map" in found and found.keys() <= _VLLM_NAMES.keys():
        return _of_vllm({_VLLM_NAMES[name]: array for name, array in found.items()})
    if sorted(found) not in (["phy2log"], sorted(_NAMES)):
        raise PlacerError(f"it holds {sorted(found)}, not {sorted(_NAMES)} or only phy2log")
    return found


def _of_vllm(found: dict[str, Any]) -> dict[str, Any]:
    """Return its arrays with the slots of experts as EPLB lists them.

    vLLM pads them to the number of redundant experts, and may list them in any order.
    """
    slots = found.get("log2phy")
    if slots is not None and slots.ndim == 3 and np.issubdtype(slots.dtype, np.integer):
        ordered = np.sort(np.where(slots < 0, np.iinfo(np.int64).max, slots), axis=2)
        ordered = np.where(ordered == np.iinfo(np.int64).max, -1, ordered)
        found["log2phy"] = ordered[..., (ordered != -1).any(axis=(0, 1))]
    return found


EPLB = Runtime(
    needs_model=False,
    write=_write,
    read=_read,
    parse=_parse,
)
