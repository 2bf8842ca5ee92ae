"""``placer import``: traces and loads that something else recorded."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placer.cli.choices import among
from placer.cli.output import (
    ForceOption,
    JsonOption,
    claim,
    note,
    print_facts,
    print_json,
    print_next,
    print_verdict,
    warn,
)
from placer.errors import UsageError, meant
from placer.target.map_formats import MAPS

if TYPE_CHECKING:
    from placer.trace.imported import ImportOptions

_FORMATS = (
    "npz",
    "exflow",
    "csv",
    "jsonl",
    "json-requests",
    "sglang-routed",
    "sglang-dump",
    "vllm-routed",
)
_LOAD_FORMATS = ("sglang-stat", "trtllm-statistic", "csv-loads", "load-matrix")
# Files whose keys a user may name.
_KEYED = ("csv", "jsonl", "json-requests")
_MAP = "-map"
_MAP_FORMATS = tuple(f"{name}{_MAP}" for name in MAPS)
_KNOWN = (*_FORMATS, *_LOAD_FORMATS, *_MAP_FORMATS)


def _require_order(context: typer.Context, file: Path) -> Path:
    """Refuse a file and a format in each other's place."""
    given = context.params.get("format_")
    if str(file) in _KNOWN and given not in _KNOWN:
        raise UsageError(
            f"{given} is not a format, but {file} is: the format comes first",
            f"placer import {file} {given} --out OUT",
        )
    return file


def import_(
    context: typer.Context,
    format_: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help=f"Tokens: {', '.join(_FORMATS)}. Loads: {', '.join(_LOAD_FORMATS)}. "
            f"Maps: {', '.join(_MAP_FORMATS)}.",
            autocompletion=among(*_KNOWN),
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The file to read.", callback=_require_order),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="The trace directory, affinity file or plan to write."),
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Checkpoint of the recorded model; its config.json is enough. It says "
            "which layers are MoE layers, and binds the result to this model.",
        ),
    ] = None,
    map_: Annotated[
        Path | None,
        typer.Option(
            "--map",
            metavar="FILE",
            help="With trtllm-statistic: the load balancer's map that the engine used.",
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="With a map: number of nodes.", show_default="1"),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=1, help="With a map: number of expert-parallel ranks on each node."
        ),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="With jsonl or json-requests: the names of keys in your file, as "
            "MEANING=KEY, such as layer=layer,token=token_idx,experts=topk_ids.",
        ),
    ] = None,
    num_experts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of experts in every layer, if --model is not given. Default: the "
            "largest id plus 1.",
        ),
    ] = None,
    skip_layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="MoE layers that were not recorded, as the model numbers them, such as "
            "0,1,2. Plans leave them out, and exports do not move their experts.",
        ),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Import what an engine recorded: a trace, loads or a map.

    Experts of each token become a trace (docs/importing.md has every field):

      npz               arrays experts [tokens, layers, top-k] and sequence_ids
      exflow            .npy array [tokens, layers]
      csv, jsonl        one row for each token and layer
      json-requests     one object per request: layer -> experts of its tokens
      sglang-routed     responses of SGLang with routed experts
      vllm-routed       responses of vLLM with routed experts
      sglang-dump       .pt file of SGLang's recorder in mode per_token

    Loads of experts become an affinity file, which is enough to balance:

      sglang-stat       .pt file of SGLang's recorder in mode stat
      trtllm-statistic  the directory that EXPERT_STATISTIC_PATH names
      csv-loads         columns layer, expert, count (or layer_id, expert_id)
      load-matrix       counts [layers, experts] as .npy, .npz, .pt or .json

    A map that placer export wrote, or that an engine uses, becomes a plan. It needs
    --gpus-per-node. It also needs --model if the map does not say which layers are MoE
    layers.
    """
    from placer.report.verdicts import verdict_of_import

    directory = format_ in _FORMATS
    what = "plan" if format_ in _MAP_FORMATS else "trace"
    what = "affinity" if format_ in _LOAD_FORMATS else what
    inputs = [file, model, map_]
    claim(context, out, inputs, force=force, kinds=[what], directory=directory)
    given: dict[str, object] = {
        "--map": map_,
        "--keys": keys,
        "--num-experts": num_experts,
        "--skip-layers": skip_layers,
    }
    if format_ in _MAP_FORMATS:
        _require_unused(format_, given)
        facts = _import_map(format_, file, out, model, nodes or 1, gpus_per_node)
    elif nodes is not None or gpus_per_node is not None:
        raise UsageError(
            "--nodes and --gpus-per-node are for maps: a trace has no ranks",
            f"drop them, or choose a format among {', '.join(_MAP_FORMATS)}",
        )
    elif format_ in _LOAD_FORMATS:
        allowed = ("--map",) if format_ == "trtllm-statistic" else ()
        _require_unused(format_, given, *allowed, "--num-experts", "--skip-layers")
        options = _options(model, num_experts, skip_layers)
        facts = _import_loads(format_, file, out, options, map_)
    elif format_ in _FORMATS:
        allowed = ("--keys",) if format_ in _KEYED else ()
        _require_unused(format_, given, *allowed, "--num-experts", "--skip-layers")
        options = _options(model, num_experts, skip_layers)
        facts = _import_tokens(format_, file, out, options, keys)
    else:
        known = ", ".join(_KNOWN)
        raise UsageError(
            f"format {format_!r} is not known",
            f"{meant(format_, _KNOWN)}known formats: {known}",
        )
    verdict = verdict_of_import(what, facts, out)
    if as_json:
        print_json({"verdict": verdict.to_json()} | facts)
    else:
        print_verdict(verdict)
        print_facts(what, facts)
        print_next(verdict)


def _options(
    model: Path | None, num_experts: int | None, skip_layers: str | None
) -> "ImportOptions":
    from placer.trace.imported import ImportOptions

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
    reader = dict(zip(_FORMATS, readers, strict=True))[format_]
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
    reader = dict(zip(_LOAD_FORMATS, readers, strict=True))[format_]
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
            f"placer import {format_} {file} --nodes {nodes} --gpus-per-node M --out {out}",
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
