"""``placer import``: traces and loads that something else recorded."""

from pathlib import Path
from typing import Annotated

import typer

from placer.cli.export import MAPS
from placer.cli.output import (
    ForceOption,
    JsonOption,
    OutOption,
    claim,
    note,
    print_json,
    print_table,
    warn,
)
from placer.errors import UsageError

_FORMATS = ("npz", "exflow", "csv", "sglang-routed", "sglang-dump", "vllm-routed")
_LOAD_FORMATS = ("sglang-stat", "trtllm-statistic", "csv-loads")
_MAP = "-map"
_MAP_FORMATS = tuple(f"{name}{_MAP}" for name in MAPS)


def import_(
    context: typer.Context,
    format_: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help=f"Tokens: {', '.join(_FORMATS)}. Loads: {', '.join(_LOAD_FORMATS)}. "
            f"Maps: {', '.join(_MAP_FORMATS)}.",
        ),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to read.")],
    out: OutOption,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Checkpoint of the model that was recorded. Its fingerprint is stored in "
            "the trace.",
        ),
    ] = None,
    map_: Annotated[
        Path | None,
        typer.Option(
            "--map",
            metavar="FILE",
            help="With trtllm-statistic: the load balancer's map that was in service, as "
            "placer wrote it.",
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Maps: number of nodes.", show_default="1")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Maps: expert-parallel ranks per node.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn an engine's records into a trace, or its loads into an affinity file.

    Records of tokens. npz: arrays experts [T, L, k], sequence_ids [T] and others. exflow:
    .npy [tokens, layers]. csv: one row per token and layer. sglang-routed, vllm-routed:
    JSON lines of responses with return_routed_experts. sglang-dump: the .pt file of the
    recorder's mode per_token.

    Loads without tokens are enough to balance. sglang-stat: the .pt file of the recorder's
    mode stat. trtllm-statistic: the directory EXPERT_STATISTIC_PATH. csv-loads: columns
    layer, expert, count. Loads need --model.

    Maps that placer export writes, or an engine runs with, become plans: they need
    --gpus-per-node, and --model where the map does not say which layers are MoE layers.
    """
    directory = format_ in _FORMATS
    claim(context, out, [file, model, map_], force=force, directory=directory)
    what = "trace"
    if format_ in _MAP_FORMATS:
        what = "plan"
        _require_no_map(format_, map_)
        facts = _import_map(format_, file, out, model, nodes or 1, gpus_per_node)
    elif nodes is not None or gpus_per_node is not None:
        raise UsageError(
            "--nodes and --gpus-per-node are for maps: a trace has no ranks",
            f"drop them, or choose a format among {', '.join(_MAP_FORMATS)}",
        )
    elif format_ in _LOAD_FORMATS:
        what = "affinity"
        facts = _import_loads(format_, file, out, model, map_)
    elif format_ in _FORMATS:
        facts = _import_tokens(format_, file, out, model, map_)
    else:
        known = ", ".join((*_FORMATS, *_LOAD_FORMATS, *_MAP_FORMATS))
        raise UsageError(f"format {format_!r} is not known", f"known formats: {known}")
    if as_json:
        print_json(facts)
    else:
        print_table((what, ""), [(name, str(value)) for name, value in facts.items()])


def _import_tokens(
    format_: str, file: Path, out: Path, model: Path | None, map_: Path | None
) -> dict[str, object]:
    from placer.trace import Trace
    from placer.trace.csv_rows import read_csv
    from placer.trace.doubts import (
        UNORDERED,
        doubts,
    )
    from placer.trace.imported import (
        REORDERED,
        import_file,
    )
    from placer.trace.npz import (
        read_exflow,
        read_npz,
    )
    from placer.trace.routed_experts import (
        read_sglang_routed,
        read_vllm_routed,
    )
    from placer.trace.sglang_dump import read_sglang_dump

    _require_no_map(format_, map_)
    readers = (
        read_npz,
        read_exflow,
        read_csv,
        read_sglang_routed,
        read_sglang_dump,
        read_vllm_routed,
    )
    reader = dict(zip(_FORMATS, readers, strict=True))[format_]
    header = import_file(reader, format_, file, out, model)
    if not header.model.bound:
        warn(
            "the trace is bound to no checkpoint: the number of experts is the largest id "
            "+ 1; bind it with --model DIR (a folder with its config.json is enough)"
        )
    if (number := header.provenance.get(REORDERED)) is not None:
        rows = header.num_tokens * header.model.num_layers
        note(
            f"{number:,} of {rows:,} rows (of a token and a layer) did not list their "
            "experts by descending weight: now all do"
        )
    if not header.experts_by_weight:
        warn(
            f"{UNORDERED}: trace links leaves out its top-1 figures, and ties of follow go "
            "to the smallest id. Record the weights too, or the order of the router: "
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


def _import_loads(
    format_: str, file: Path, out: Path, model: Path | None, map_: Path | None
) -> dict[str, object]:
    from placer.affinity.loads import (
        import_loads,
        read_csv_loads,
        read_sglang_stat,
        trtllm_statistic_reader,
    )
    from placer.runtime_map.trtllm import parse_assignments

    if model is None:
        raise UsageError(
            f"{format_} does not say which experts its layers have",
            "name the model: --model DIR",
        )
    if format_ != "trtllm-statistic":
        _require_no_map(format_, map_)
    slots = None if map_ is None else parse_assignments(map_)[1]
    readers = (read_sglang_stat, trtllm_statistic_reader(slots), read_csv_loads)
    reader = dict(zip(_LOAD_FORMATS, readers, strict=True))[format_]
    affinity = import_loads(reader, format_, file, out, model)
    return {
        "out": str(out),
        "num_tokens": affinity.num_tokens,
        "num_layers": affinity.model.num_layers,
        "num_experts": list(affinity.model.num_experts),
        "top_k": affinity.model.top_k,
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
            f"placer import {format_} {file} --nodes {nodes} --gpus-per-node M --out {out}",
        )
    topology = Topology(num_nodes=nodes, gpus_per_node=gpus_per_node)
    plan, warning = import_map(format_.removesuffix(_MAP), file, topology, model, out)
    if warning is not None:
        warn(warning)
    if not plan.model.top_k:
        warn(
            "the map names no model: files match it by shape alone, and each of its rows "
            "is taken for a MoE layer. Name the model with --model DIR (a folder with its "
            "config.json is enough)"
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


def _require_no_map(format_: str, map_: Path | None) -> None:
    if map_ is not None:
        raise UsageError(f"--map is for trtllm-statistic, not for {format_}", "drop --map")
