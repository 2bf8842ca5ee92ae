"""``placer.import_file``: traces, loads and maps that something else recorded."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from placer.api.files import AnyPath, as_path, command_line, note, warn, writing
from placer.api.known import FORMATS, LOAD_FORMATS, MAP_FORMATS, TOKEN_FORMATS
from placer.api.shown import Result
from placer.errors import UsageError, meant

if TYPE_CHECKING:
    from placer.trace.imported import ImportOptions

_MAP = "-map"
# Files whose keys a user may name.
_KEYED = ("csv", "jsonl", "json-requests")


def import_file(
    format: str,
    file: AnyPath,
    out: AnyPath,
    *,
    model: AnyPath | None = None,
    map: AnyPath | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    keys: str | None = None,
    num_experts: int | None = None,
    skip_layers: str | Sequence[int] | None = None,
    force: bool = False,
) -> Result:
    """Import what an engine recorded: a trace, loads or a map, as ``placer import``.

    Parameters
    ----------
    format
        Of tokens, loads or a map: ``docs/importing.md`` describes each.
    file
        The file to read.
    out
        The trace, affinity file or plan to write.
    model
        Checkpoint of the recorded model; its ``config.json`` is enough.
    map
        With ``trtllm-statistic``: the load balancer's map that the engine used.
    nodes, gpus_per_node
        With a map: nodes, and expert-parallel ranks on each.
    keys
        What the file calls its columns or keys: ``"layer=layer_id,experts=topk_ids"``.
    num_experts
        Experts of every layer, without ``model``.
    skip_layers
        MoE layers that were not recorded, as the model numbers them.
    force
        Whether an earlier result at ``out`` is replaced.

    Returns
    -------
    Result
        ``open()`` opens the trace, the counts or the plan.

    Raises
    ------
    PlacerError
        If the file cannot be read, holds what the model cannot have emitted, or ``out``
        exists.
    UsageError
        If the format is not known, or an option is not for it.
    """
    source, place = Path(file), Path(out)
    what = "plan" if format in MAP_FORMATS else "trace"
    what = "affinity" if format in LOAD_FORMATS else what
    inputs = [source, as_path(model), as_path(map)]
    directory = format in TOKEN_FORMATS
    with writing(place, inputs, force=force, kinds=[what], directory=directory):
        facts = _import(
            format,
            source,
            place,
            as_path(model),
            as_path(map),
            nodes,
            gpus_per_node,
            keys,
            num_experts,
            skip_layers,
        )
    from placer.report.verdicts import verdict_of_import

    verdict = verdict_of_import(what, facts, place)
    return Result(title=what, verdict=verdict, facts=facts, out=place)


def _import(
    format_: str,
    file: Path,
    out: Path,
    model: Path | None,
    map_: Path | None,
    nodes: int | None,
    gpus_per_node: int | None,
    keys: str | None,
    num_experts: int | None,
    skip_layers: str | Sequence[int] | None,
) -> dict[str, object]:
    given: dict[str, object] = {
        "--map": map_,
        "--keys": keys,
        "--num-experts": num_experts,
        "--skip-layers": skip_layers,
    }
    if format_ in MAP_FORMATS:
        _require_unused(format_, given)
        facts = _import_map(format_, file, out, model, nodes or 1, gpus_per_node)
    elif nodes is not None or gpus_per_node is not None:
        raise UsageError(
            "--nodes and --gpus-per-node are for maps: a trace has no ranks",
            f"drop them, or choose a format among {', '.join(MAP_FORMATS)}",
        )
    elif format_ in LOAD_FORMATS:
        allowed = ("--map",) if format_ == "trtllm-statistic" else ()
        _require_unused(format_, given, *allowed, "--num-experts", "--skip-layers")
        options = _options(model, num_experts, skip_layers)
        facts = _import_loads(format_, file, out, options, map_)
    elif format_ in TOKEN_FORMATS:
        allowed = ("--keys",) if format_ in _KEYED else ()
        _require_unused(format_, given, *allowed, "--num-experts", "--skip-layers")
        options = _options(model, num_experts, skip_layers)
        facts = _import_tokens(format_, file, out, options, keys)
    else:
        known = ", ".join(FORMATS)
        raise UsageError(
            f"format {format_!r} is not known",
            f"{meant(format_, FORMATS)}known formats: {known}",
        )
    return facts


def _options(
    model: Path | None, num_experts: int | None, skip_layers: str | Sequence[int] | None
) -> "ImportOptions":
    from placer.trace.imported import ImportOptions

    if skip_layers is not None and not isinstance(skip_layers, str):
        skip_layers = ",".join(str(one) for one in skip_layers)
    skipped = (skip_layers or "").replace(" ", "")
    if skip_layers is not None and not re.fullmatch(r"\d+(,\d+)*", skipped):
        raise UsageError(
            f"--skip-layers is {skip_layers!r}, no list of layer numbers",
            "give the model's own numbers: --skip-layers 0,1,2",
        )
    return ImportOptions(
        model_directory=model,
        num_experts=num_experts,
        skip_layers=tuple(int(one) for one in skipped.split(",") if one),
        warn=warn,
    )


def _import_tokens(
    format_: str, file: Path, out: Path, options: "ImportOptions", keys: str | None
) -> dict[str, object]:
    from placer.trace import Trace
    from placer.trace.csv_rows import csv_reader
    from placer.trace.doubts import UNORDERED, doubts
    from placer.trace.imported import REORDERED, import_file
    from placer.trace.json_rows import Keys, jsonl_reader, requests_reader
    from placer.trace.npz import read_exflow, read_npz
    from placer.trace.routed_experts import read_sglang_routed, read_vllm_routed
    from placer.trace.sglang_dump import read_sglang_dump

    named = Keys.parse(keys)
    readers = (
        read_npz,
        read_exflow,
        csv_reader(named),
        jsonl_reader(named),
        requests_reader(named),
        read_sglang_routed,
        read_sglang_dump,
        read_vllm_routed,
    )
    reader = dict(zip(TOKEN_FORMATS, readers, strict=True))[format_]
    header = import_file(reader, format_, file, out, options)
    if not header.model.bound:
        _warn_unbound("trace", header.model.num_experts[0], options)
    if (number := header.provenance.get(REORDERED)) is not None:
        rows = header.num_tokens * header.model.num_layers
        note(
            f"{number:,} of {rows:,} rows (one token, one layer) did not list their "
            "experts by descending weight; they were reordered"
        )
    if not header.experts_by_weight:
        warn(
            f"{UNORDERED}: `trace links` leaves out its top-1 figures, and under follow a "
            "tie goes to the smallest id. Record the weights too, or the router's order: "
            "topk(sorted=True)"
        )
    for line in doubts(Trace(out)):
        warn(line)
    return {
        "out": str(out),
        "num_tokens": header.num_tokens,
        "num_sequences": header.num_sequences,
        "num_layers": header.model.num_layers,
        "num_experts": list(header.model.num_experts),
        "top_k": header.model.top_k,
        "domains": list(header.domains),
    }


def _warn_unbound(what: str, num_experts: int, options: "ImportOptions") -> None:
    """Say what is unknown because no model was named."""
    how = "the largest id + 1" if options.num_experts is None else "as given"
    warn(
        f"the {what} is not bound to a checkpoint. Every layer is assumed to have "
        f"{num_experts} experts, {how}. Bind it: --model DIR (a config.json is enough)"
        + ("" if options.num_experts else "; or give --num-experts N")
    )


def _import_loads(
    format_: str, file: Path, out: Path, options: "ImportOptions", map_: Path | None
) -> dict[str, object]:
    from placer.affinity.load_files import read_csv_loads, read_load_matrix
    from placer.affinity.loads import (
        import_loads,
        read_sglang_stat,
        trtllm_statistic_reader,
    )
    from placer.runtime_map.trtllm import parse_assignments

    slots = None if map_ is None else parse_assignments(map_)[1]
    readers = (
        read_sglang_stat,
        trtllm_statistic_reader(slots),
        read_csv_loads,
        read_load_matrix,
    )
    reader = dict(zip(LOAD_FORMATS, readers, strict=True))[format_]
    affinity = import_loads(reader, format_, file, out, options)
    if not affinity.model.bound:
        _warn_unbound("affinity file", affinity.model.num_experts[0], options)
    return {
        "out": str(out),
        "num_tokens": affinity.known_tokens,
        "num_layers": affinity.model.num_layers,
        "num_experts": list(affinity.model.num_experts),
        "top_k": affinity.model.top_k or None,
        "loads_alone": True,
    }


def _import_map(
    format_: str,
    file: Path,
    out: Path,
    model: Path | None,
    nodes: int,
    gpus_per_node: int | None,
) -> dict[str, object]:
    from placer.placement.topology import Topology
    from placer.runtime_map.imported import import_map

    if gpus_per_node is None:
        raise UsageError(
            f"{format_} needs the ranks that the map is for",
            command_line(
                "import",
                [format_, file],
                {"nodes": nodes, "gpus_per_node": "M", "out": out},
            ),
        )
    topology = Topology(num_nodes=nodes, gpus_per_node=gpus_per_node)
    plan, warning = import_map(format_.removesuffix(_MAP), file, topology, model, out)
    if warning is not None:
        warn(warning)
    if not plan.model.top_k:
        warn(
            "the map does not name its model: only shapes are compared with other files, "
            "and each row is read as an MoE layer. Name the model: --model DIR (a folder "
            "with its config.json is enough)"
        )
    placed = plan.placement
    return {
        "out": str(out),
        "num_layers": placed.num_layers,
        "num_experts": list(placed.num_experts),
        "num_ranks": placed.num_ranks,
        "num_nodes": placed.num_nodes,
        "redundant_experts": placed.redundant_experts,
        "replica_choice": plan.recorded_choice,
    }


def _require_unused(format_: str, given: dict[str, object], *allowed: str) -> None:
    for name, value in given.items():
        if value is not None and name not in allowed:
            fitting = {
                "--map": "trtllm-statistic",
                "--keys": ", ".join(_KEYED),
            }.get(name, "tokens and loads")
            raise UsageError(f"{name} is for {fitting}, not for {format_}", f"drop {name}")
