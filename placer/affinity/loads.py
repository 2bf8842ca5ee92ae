"""Loads that an engine counted, without tokens: enough to balance, not to place links."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from placer import __version__
from placer.affinity.affinity import Affinity
from placer.arrays import IntArray
from placer.errors import PlacerError
from placer.run.documents import read_json
from placer.run.files import (
    require_file,
    sha256_file,
)
from placer.trace.csv_rows import (
    read_table,
    require_whole,
)
from placer.trace.imported import (
    UNREADABLE,
    BoundModel,
)
from placer.trace.sglang_dump import load_dump

# The experts in the slots of a layer: its own layer number -> logical experts.
Assignments = Mapping[int, Sequence[int]]
_CSV_COLUMNS = ("layer", "expert", "count")
_CSV_LAYOUT = "the header is layer,expert,count (docs/importing.md)"
_CSV_SLOTS = (
    "check --model; if the ids are slots of an engine that ran with redundant experts, add "
    "up the counts of each expert's slots first"
)
_NO_MAP = (
    "ids beyond the model's experts are slots of a load balancer: give the map that it ran "
    "with, --map FILE"
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
        Whether layers are counted over MoE layers alone.
    """

    by_layer: Mapping[int, IntArray]
    of_moe_layers: bool = False


LoadReader = Callable[[Path, BoundModel], CountedLoads]


def import_loads(
    read: LoadReader, source: str, path: Path, out: Path, model_directory: Path
) -> Affinity:
    """Turn the loads that an engine counted into an affinity file without links.

    Parameters
    ----------
    read
        Reader of the format, given the file or directory and the model.
    source
        Name of the format, for the provenance.
    path
        What to read.
    out
        The affinity file to write.
    model_directory
        The checkpoint whose experts were counted.

    Returns
    -------
    Affinity
        What was written. ``num_tokens`` is the pairs of the fullest layer over top-k.

    Raises
    ------
    PlacerError
        If the file cannot be read, or counts what the model cannot have.
    """
    if not path.exists():
        raise PlacerError(f"{path} does not exist", f"give what {source} wrote")
    model = BoundModel.of(model_directory)
    try:
        load = _of_model(read(path, model), model)
    except PlacerError as error:
        hint = error.hint or f"check --model, and what {source} files hold"
        raise PlacerError(f"{path}: {error}", hint) from error
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    affinity = Affinity(
        model=model.spec,
        num_tokens=int(max(counts.sum() for counts in load)) // model.spec.top_k,
        load=load,
        transition=(),
        coactivation=(),
        token_expert=None,
        sequence_expert=None,
        provenance={
            "placer": __version__,
            "source": source,
            "sha256": {file.name: sha256_file(file) for file in files if file.is_file()},
        },
    )
    affinity.write(out)
    return affinity


def read_sglang_stat(file: Path, model: BoundModel) -> CountedLoads:
    """Read a dump of SGLang's recorder in mode ``stat`` or ``stat_approx``.

    ``logical_count`` is ``[L, E]`` or ``[passes, L, E]``, L all hidden layers (SGLang
    ``srt/eplb/expert_distribution.py``).

    Raises
    ------
    PlacerError
        If the file would need unpickling of foreign classes, or is no such dump.
    """
    dump = load_dump(file, "record in mode stat: --expert-distribution-recorder-mode stat")
    if not isinstance(dump, dict) or "logical_count" not in dump:
        raise PlacerError(
            "there is no logical_count in it", "a dump of tokens is format sglang-dump"
        )
    try:
        raw = np.asarray(dump["logical_count"])
    except UNREADABLE as error:
        raise PlacerError(f"logical_count is no array: {error}") from error
    counts = _whole(raw, "logical_count")
    if counts.ndim not in (2, 3) or not counts.size:
        raise PlacerError(
            f"logical_count has shape {list(counts.shape)}, expected [passes, L, E]"
        )
    layers = counts.reshape(-1, *counts.shape[-2:]).sum(axis=0)
    return CountedLoads(
        by_layer=dict(enumerate(layers)),
        of_moe_layers=len(layers) == model.spec.num_layers,
    )


def read_csv_loads(file: Path, model: BoundModel) -> CountedLoads:
    """Read columns ``layer, expert, count``; layers count from 0 over MoE layers.

    Rows may be in any order; an expert without a row has no tokens.

    Raises
    ------
    PlacerError
        If a column is missing, a value is no whole number, the model has no such expert,
        or an expert has two rows.
    """
    table = read_table(file, _CSV_LAYOUT)
    require_whole(table, _CSV_COLUMNS, _CSV_LAYOUT)
    layer, expert, count = (
        _whole(table[name].to_numpy(), f"column {name}") for name in _CSV_COLUMNS
    )
    num_experts = max(model.spec.num_experts)
    by_layer = {}
    for number in np.unique(layer).tolist():
        of_it = layer == number
        _require_expert(int(expert[of_it].max()), num_experts, number, _CSV_SLOTS)
        times = np.bincount(expert[of_it])
        if times.max() > 1:
            raise PlacerError(
                f"layer {number}, expert {times.argmax()} has {times.max()} rows",
                "add them up where they count different tokens, or drop what is repeated: "
                "one row for each layer and expert",
            )
        rows = np.zeros(num_experts, dtype=np.int64)
        rows[expert[of_it]] = count[of_it]
        by_layer[number] = rows
    return CountedLoads(by_layer=by_layer, of_moe_layers=True)


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

    def read(directory: Path, model: BoundModel) -> CountedLoads:
        slots = _slot_counts(directory)
        after = [layer for layer in slots if layer >= model.num_hidden_layers]
        by_layer = {n: counts for n, counts in slots.items() if n not in after}
        if assignments is None:
            size = max(model.spec.num_experts)
            for layer, counts in by_layer.items():
                _require_expert(_last_used(counts), size, layer, _NO_MAP)
            return CountedLoads(by_layer=by_layer)
        return CountedLoads(
            by_layer={
                layer: _of_slots(counts, layer, assignments, max(model.spec.num_experts))
                for layer, counts in by_layer.items()
            }
        )

    return read


def _slot_counts(directory: Path) -> dict[int, IntArray]:
    if not directory.is_dir():
        raise PlacerError("it is no directory", "give the EXPERT_STATISTIC_PATH")
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
            counts = _whole(raw, f"{name} of {file.name}")
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
            f"layer {layer} has counts of {len(counts)} slots, the map assigns "
            f"{'none' if slots is None else len(slots)}",
            "give the map that the engine ran with: --map FILE",
        )
    # Not bincount, whose weights are floats: exact up to 2^53 only.
    _require_expert(
        max(slots, default=0), num_experts, layer, "check --model and --map: they disagree"
    )
    total = np.zeros(num_experts, dtype=np.int64)
    np.add.at(total, np.asarray(slots, dtype=np.int64), counts)
    return total


def _whole(values: npt.NDArray[Any], what: str) -> IntArray:
    if not np.issubdtype(values.dtype, np.integer) or (values < 0).any():
        raise PlacerError(f"{what} holds something that is no whole number from 0")
    if values.sum(dtype=np.float64) >= 2**63:
        raise PlacerError(f"{what} holds numbers beyond int64, or that add up to more")
    return values.astype(np.int64)


def _of_model(counted: CountedLoads, model: BoundModel) -> tuple[IntArray, ...]:
    """Return L arrays ``[E]``, dense layers left out; refuse what the model cannot have."""
    spec = model.spec
    of_moe = counted.of_moe_layers
    names = range(spec.num_layers) if of_moe else spec.layer_ids or ()
    counts = {n: row for n, row in counted.by_layer.items() if row.any()}
    odd = sorted(set(counts) - set(names))
    if odd:
        raise PlacerError(
            f"layer {odd[0]} has counts, but the model's MoE layers are {list(names)}",
            "check --model",
        )
    missing = sorted(set(names) - set(counts))
    if missing:
        raise PlacerError(f"MoE layer {missing[0]} has no counts: it was not recorded")
    return tuple(
        _of_layer(counts[n], size, n)
        for n, size in zip(names, spec.num_experts, strict=True)
    )


def _of_layer(counts: IntArray, num_experts: int, layer: int) -> IntArray:
    used = _last_used(counts) + 1
    _require_expert(used - 1, num_experts, layer)
    return np.pad(counts[:used], (0, num_experts - used))


def _last_used(counts: IntArray) -> int:
    return int(counts.nonzero()[0].max(initial=0))


def _require_expert(
    expert: int, num_experts: int, layer: int, hint: str = "check --model"
) -> None:
    if expert >= num_experts:
        raise PlacerError(
            f"layer {layer} counts experts up to {expert}, the model has {num_experts}",
            hint,
        )
