"""Loads that an engine counted, without tokens: enough to balance, not to place links."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from placer.affinity.affinity import Affinity
from placer.arrays import IntArray
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.model.spec import MAX_EXPERTS
from placer.run.archives import UNREADABLE
from placer.run.documents import read_json
from placer.run.files import require_file, sha256_file, utf8_name
from placer.trace.imported import BY_ITSELF, BoundModel, ImportOptions, hash_layers_warning
from placer.trace.sglang_dump import load_dump
from placer.trace.token_rows import counted_from_one, is_counted_from_one
from placer.version import __version__

# The experts in the slots of a layer: its own layer number -> logical experts.
Assignments = Mapping[int, Sequence[int]]
_NO_MAP = (
    "ids above the number of experts are slots of a load balancer: give the map that it "
    "used, --map FILE"
)
_STATISTIC = re.compile(r"rank\d+\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CountedLoads:
    """Pairs of a token and an expert, as a foreign file counts them.

    Attributes
    ----------
    by_layer
        ``[E]`` int64 per layer, under the model's own layer number, or counted over its
        MoE layers where ``of_moe_layers``.
    of_moe_layers
        Whether layers are counted over MoE layers only; ``None`` where their number
        shows it.
    doubt
        What the file does not say, where neither a model nor its experts are given.
    """

    by_layer: Mapping[int, IntArray]
    of_moe_layers: bool | None = False
    doubt: str | None = None


LoadReader = Callable[[Path, BoundModel | None], CountedLoads]


def import_loads(
    read: LoadReader,
    source: str,
    path: Path,
    out: Path,
    options: ImportOptions = BY_ITSELF,
) -> Affinity:
    """Turn the loads that an engine counted into an affinity file without links.

    Parameters
    ----------
    read
        Reader of the format, given the file or directory and the model if it is known.
    source
        Name of the format, for the provenance.
    path
        What to read.
    out
        The affinity file to write.
    options
        What the user says of the file.

    Returns
    -------
    Affinity
        What was written. ``num_tokens`` is the pairs of the fullest layer over top-k, or
        those pairs where no model says top-k.

    Raises
    ------
    PlacerError
        If the file cannot be read, or counts what the model cannot have.
    """
    if not path.exists():
        raise PlacerError(f"{path} does not exist", f"give the file that {source} wrote")
    model = options.bound_model()
    try:
        counted = read(path, model)
        if model is None:
            if counted.doubt is not None and options.num_experts is None:
                options.warn(counted.doubt)
            spec, load = _unbound(counted, options.num_experts)
        else:
            spec, load = _of_model(counted, model, options)
    except PlacerError as error:
        hint = error.hint or f"check --model, and what {source} files hold"
        raise PlacerError(f"{path}: {error}", hint) from error
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    affinity = Affinity(
        model=spec,
        num_tokens=int(max(counts.sum() for counts in load)) // max(spec.top_k, 1),
        load=load,
        provenance={
            "placer": __version__,
            "source": source,
            "sha256": {utf8_name(f.name): sha256_file(f) for f in files if f.is_file()},
        },
    )
    affinity.write(out)
    return affinity


def read_sglang_stat(file: Path, model: BoundModel | None) -> CountedLoads:
    """Read a dump of SGLang's recorder in mode ``stat`` or ``stat_approx``.

    ``logical_count`` is ``[L, E]`` or ``[passes, L, E]``, L all hidden layers (SGLang
    ``srt/eplb/expert_distribution.py``).

    Raises
    ------
    PlacerError
        If the file would need unpickling of foreign classes, or is not such a dump.
    """
    dump = load_dump(file, "record in mode stat: --expert-distribution-recorder-mode stat")
    if not isinstance(dump, dict) or "logical_count" not in dump:
        raise PlacerError(
            "it has no logical_count", "a dump of tokens is format sglang-dump"
        )
    return matrix_loads(dump["logical_count"], "logical_count")


def matrix_loads(value: Any, what: str) -> CountedLoads:
    """Return what ``[L, E]`` or ``[passes, L, E]`` counts, L all hidden or MoE layers.

    Raises
    ------
    PlacerError
        If it is not such a array of whole numbers; ``what`` names it.
    """
    try:
        raw = np.asarray(value)
    except UNREADABLE as error:
        raise PlacerError(f"{what} is not an array: {error}") from error
    counts = whole_counts(whole_floats(raw), what)
    if counts.ndim not in (2, 3) or not counts.size:
        raise PlacerError(
            f"{what} has shape {list(counts.shape)}, expected [L, E] or [passes, L, E]"
        )
    layers = counts.reshape(-1, *counts.shape[-2:]).sum(axis=0)
    return CountedLoads(by_layer=dict(enumerate(layers)), of_moe_layers=None)


def trtllm_statistic_reader(assignments: Assignments | None) -> LoadReader:
    """Return the reader of what TensorRT-LLM writes to ``EXPERT_STATISTIC_PATH``.

    A directory of ``meta_info.json`` and ``rank*.safetensors`` with one count per
    iteration and layer, ``"{iteration}_{layer}"``; with a load balancer it counts slots
    (``tensorrt_llm/_torch/modules/fused_moe/moe_load_balancer.py`` and
    ``expert_statistic.py``).

    Parameters
    ----------
    assignments
        The experts in the slots of the load balancer that ran, or ``None`` where none
        did.
    """

    def read(directory: Path, model: BoundModel | None) -> CountedLoads:
        by_layer = _slot_counts(directory)
        if assignments is None:
            # Layers after the last hidden one draft tokens (MTP).
            end = max(by_layer) + 1 if model is None else model.num_hidden_layers
            for layer, counts in by_layer.items():
                if layer < end:
                    require_expert(_last_used(counts), most_experts(model), layer, _NO_MAP)
            return CountedLoads(by_layer=by_layer)
        return CountedLoads(
            by_layer={
                layer: counts
                if model is not None and layer >= model.num_hidden_layers
                else _of_slots(counts, layer, assignments, most_experts(model))
                for layer, counts in by_layer.items()
            }
        )

    return read


def _slot_counts(directory: Path) -> dict[int, IntArray]:
    if not directory.is_dir():
        raise PlacerError("it is not a directory", "give the EXPERT_STATISTIC_PATH")
    num_slots = read_json(directory / "meta_info.json", "statistic").get("num_experts")
    files = sorted(p for p in directory.iterdir() if _STATISTIC.fullmatch(p.name))
    if not files:
        raise PlacerError("it holds no rank*.safetensors")
    total: dict[int, IntArray] = {}
    for file in files:
        require_file(file, "statistic")
        try:
            with safe_open(file, "np") as opened:
                counted = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, *UNREADABLE) as error:
            raise PlacerError(f"{file.name} cannot be read: {error}") from error
        for name, raw in counted.items():
            counts = whole_counts(raw, f"{name} of {file.name}")
            found = re.fullmatch(r"\d+_(\d+)", name)
            if found is None or counts.shape != (num_slots,):
                raise PlacerError(
                    f"{file.name} holds {name} {list(counts.shape)}, expected "
                    f"ITERATION_LAYER [{num_slots}], as meta_info.json says"
                )
            layer = int(found[1])
            total[layer] = total.get(layer, np.zeros_like(counts)) + counts
    return total


def _of_slots(
    counts: IntArray, layer: int, assignments: Assignments, num_experts: int
) -> IntArray:
    slots = assignments.get(layer)
    if slots is None or len(slots) != len(counts):
        raise PlacerError(
            f"layer {layer} has counts of {len(counts)} slots, the map has "
            f"{'none' if slots is None else len(slots)}",
            "give the map that the engine ran with: --map FILE",
        )
    # Not bincount, whose weights are floats: exact up to 2^53 only.
    require_expert(
        max(slots, default=0), num_experts, layer, "check --model and --map: they disagree"
    )
    total = np.zeros(max(slots, default=0) + 1, dtype=np.int64)
    np.add.at(total, np.asarray(slots, dtype=np.int64), counts)
    return total


def whole_floats(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return floats that are all whole numbers as int64, anything else as it is."""
    if not np.issubdtype(values.dtype, np.floating) or (values != np.floor(values)).any():
        return values
    largest = float(np.abs(values).max(initial=0))  # float16 cannot hold 2^53
    return values.astype(np.int64) if largest < 2**53 else values


def whole_counts(values: npt.NDArray[Any], what: str) -> IntArray:
    """Return counts as int64.

    Raises
    ------
    PlacerError
        If one is not a whole number from 0, or they add up to more than int64 holds.
    """
    if not np.issubdtype(values.dtype, np.integer) or (values < 0).any():
        raise PlacerError(f"{what} holds a value that is not a whole number of at least 0")
    if values.sum(dtype=np.float64) >= 2**63:
        raise PlacerError(f"{what} holds numbers above int64, or their sum is above it")
    return values.astype(np.int64)


def _of_model(
    counted: CountedLoads, model: BoundModel, options: ImportOptions
) -> tuple[ModelSpec, tuple[IntArray, ...]]:
    """Return L arrays ``[E]``, dense layers left out; refuse what the model cannot have."""
    every = tuple(sorted({*(model.spec.layer_ids or ()), *options.skip_layers}))
    by_layer = counted.by_layer
    if counted.of_moe_layers is not None and is_counted_from_one(by_layer, model):
        options.warn(counted_from_one(len(by_layer)))
        counted = replace(
            counted,
            by_layer={n - 1: row for n, row in by_layer.items()},
            of_moe_layers=False,
        )
    counts = {n: row for n, row in counted.by_layer.items() if row.any()}
    # The model's own numbers, where they are no places among MoE layers.
    is_own = set(counts) == set(every)
    named = every if counted.of_moe_layers and not is_own else None
    if counted.of_moe_layers is None:
        named = options.columns(model, len(counted.by_layer))
        if named is None:
            raise PlacerError(
                f"it has {len(counted.by_layer)} layers, the model {len(every)} MoE layers "
                f"of {model.num_hidden_layers} hidden layers",
                "check --model; if layers were not recorded, name them: --skip-layers LIST",
            )
    if named is not None:
        if odd := [n for n in counts if n >= len(named)]:
            raise PlacerError(
                f"MoE layer {odd[0]} has counts, but the model has {len(every)} MoE "
                "layers, counted from 0",
                "check --model; in csv-loads, name the column layer_id if it holds the "
                "model's own numbers",
            )
        counts = {named[n]: row for n, row in counts.items()}
    behind = sorted(n for n in counts if n >= model.num_hidden_layers)
    if behind:
        options.warn(
            f"layer {behind[0]} is left out: it comes after the {model.num_hidden_layers} "
            "hidden layers, so it is for multi-token prediction (MTP), and plans do not "
            "move its experts"
        )
    odd = sorted(set(counts) - {*every, *behind})
    if odd:
        raise PlacerError(
            f"layer {odd[0]} has counts, but the model's MoE layers are {[*every]}",
            "check --model",
        )
    empty = [n for n in model.hash_layers if n not in counts]
    if empty:
        options.warn(hash_layers_warning(empty))
    spec = model.without(empty).spec
    ids = spec.layer_ids or ()
    missing = [n for n in ids if n not in counts]
    if missing:
        raise PlacerError(
            f"layer {missing[0]} has no counts, but the model has experts there",
            f"record it again, or leave it out: --skip-layers "
            f"{','.join(map(str, missing))}",
        )
    return spec, tuple(
        _of_layer(counts[n], size, n) for n, size in zip(ids, spec.num_experts, strict=True)
    )


def _unbound(
    counted: CountedLoads, num_experts: int | None
) -> tuple[ModelSpec, tuple[IntArray, ...]]:
    """Take every layer for a MoE layer, of as many experts as the widest has."""
    layers = sorted(counted.by_layer)
    empty = [n for n in layers if not counted.by_layer[n].any()]
    if empty or not layers:
        raise PlacerError(
            f"layer {empty[0]} has no counts, as dense layers have none"
            if empty
            else "it has no counts",
            "name the model, so that its dense layers can be left out: --model DIR (a "
            "folder with its config.json is enough)",
        )
    size = num_experts or max(len(row) for row in counted.by_layer.values())
    spec = ModelSpec(
        num_experts=(size,) * len(layers),
        top_k=0,
        layer_ids=tuple(layers) if counted.of_moe_layers is False else None,
    )
    return spec, tuple(_of_layer(counted.by_layer[n], size, n) for n in layers)


def _of_layer(counts: IntArray, num_experts: int, layer: int) -> IntArray:
    used = _last_used(counts) + 1
    require_expert(used - 1, num_experts, layer)
    return np.pad(counts[:used], (0, num_experts - used))


def _last_used(counts: IntArray) -> int:
    return int(counts.nonzero()[0].max(initial=0))


def most_experts(model: BoundModel | None) -> int:
    """Return the experts of the largest layer; the most that there can be, if unknown."""
    return MAX_EXPERTS if model is None else max(model.spec.num_experts)


def require_expert(
    expert: int,
    num_experts: int,
    layer: int,
    hint: str = "check --model or --num-experts",
) -> None:
    """Refuse the id of an expert that there is not.

    Raises
    ------
    PlacerError
        With the layer and both numbers.
    """
    if expert >= num_experts:
        raise PlacerError(
            f"layer {layer} counts experts up to {expert}, the model has {num_experts}"
            if num_experts < MAX_EXPERTS
            else f"layer {layer} counts experts up to {expert}; placer supports at most "
            f"{MAX_EXPERTS}",
            hint,
        )
