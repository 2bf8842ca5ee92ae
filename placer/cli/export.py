"""``placer export``: a plan in the form that an engine loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placer.cli.output import (
    ForceOption,
    JsonOption,
    claim,
    note,
    print_json,
    print_line,
    print_table,
    progress_line,
    warn,
)
from placer.errors import UsageError, one_of
from placer.target.map_formats import MAPS

if TYPE_CHECKING:
    from placer.checkpoint.export import ExportJob
    from placer.checkpoint.ranks import RanksJob
    from placer.checkpoint.writing import ExportOptions
    from placer.runtime_map.engine_family import Start

Facts = dict[str, object]
# Printed on stderr, one line each.
_TOLD = ("start", "warnings")
# Written of counts, not of a plan.
_COUNTS = "ktransformers"
TARGETS = ("checkpoint", "ranks", "deepspeed", *MAPS, _COUNTS)
_BACKEND = ("--backend", "--ray-address")
# Maps take only --out.
_OPTIONS = {
    "checkpoint": ("--inverse", "--link", "--hash", "--workers", *_BACKEND, "--dry-run"),
    "deepspeed": ("--inverse",),
    "ranks": ("--experts-only", "--workers", *_BACKEND, "--dry-run"),
}


def export(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help=f"One of: {', '.join(TARGETS)}.")
    ],
    plan: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN", help="The plan. With --inverse: the exported checkpoint."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The file or directory to write. Not used with --dry-run."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]", help="The original model: a Hugging Face directory."
        ),
    ] = None,
    inverse: Annotated[
        bool,
        typer.Option("--inverse", help="Restore the original of an exported checkpoint."),
    ] = False,
    link: Annotated[
        bool,
        typer.Option("--link", help="Hard-link unchanged shards instead of copying them."),
    ] = False,
    with_hashes: Annotated[
        bool,
        typer.Option(
            "--hash",
            help="Record the SHA-256 of each original shard. This takes longer than the "
            "copy itself.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=(
                "Number of shards written at the same time. Default: one per CPU, at "
                "most 4."
            ),
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="Where shards are written: processes on this machine, or ray (tasks of a "
            "Ray cluster).",
            show_default="processes",
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster whose nodes can read the source and write the "
            "target."
        ),
    ] = None,
    experts_only: Annotated[
        bool,
        typer.Option("--experts-only", help="With target ranks: write only the experts."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List shards and their bytes. Write nothing.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a plan as a checkpoint, or as a map for an engine.

    Checkpoints. No weight changes, and an interrupted export continues if you run it again:

      checkpoint    the model with its experts renumbered, for any engine that
                    splits experts contiguously
      ranks         one directory for each rank: its experts and all other tensors
      deepspeed     a DeepSpeed-MoE checkpoint (MODEL is the folder of a tag)

    Maps, which the engine reads when it starts:

      sglang        .json or .pt for --init-expert-location
      trtllm        .yaml for moe_config.load_balancer
      vllm-ascend   .json for expert_map_path
      vllm-pr49572  .json as proposed to vLLM; no release reads it
      vllm-das      .json for the plugin vllm-plugin-das

    Other formats. The first three need no MODEL:

      eplb          .safetensors or .npz with phy2log, log2phy, logcnt
      csv           one line for each slot
      json          one list of slots for each layer
      ktransformers .pt with counts; give an affinity file instead of PLAN
    """
    if target not in TARGETS:
        raise UsageError(
            f"target {target!r} is not known",
            f"targets: {', '.join(TARGETS)}; engines that read no map (vLLM, Megatron, "
            "transformers) serve a permuted checkpoint",
        )
    given = {
        "--inverse": inverse,
        "--link": link,
        "--hash": with_hashes,
        "--workers": workers,
        "--backend": backend,
        "--ray-address": ray_address,
        "--experts-only": experts_only,
        "--dry-run": dry_run,
    }
    _require_options(target, [name for name, value in given.items() if value])
    if not dry_run:
        directory = target not in (*MAPS, _COUNTS)
        kinds = ("export", "ranks", "checkpoint") if directory else ()
        inputs = [plan, model]
        claim(
            context, _required(out), inputs, force=force, kinds=kinds, directory=directory
        )
    if target in MAPS:
        facts = _export_map(target, plan, model, _required(out))
    elif target == _COUNTS:
        facts = _export_counts(plan, model, _required(out))
    elif target == "deepspeed":
        facts = _export_deepspeed(plan, model, _required(out), inverse)
    else:
        from placer.checkpoint.writing import ExportOptions
        from placer.run.parallel import BACKENDS, Backend

        options = ExportOptions(
            link=link,
            with_hashes=with_hashes,
            num_workers=workers,
            # Backend refuses other names.
            backend=Backend(
                name=one_of("--backend", backend or "processes", BACKENDS),
                address=ray_address,
            ),
        )
        if target == "ranks":
            job: ExportJob | RanksJob = _prepared_ranks(plan, model, experts_only)
        else:
            job = _prepared_checkpoint(plan, model, inverse)
        if dry_run:
            _print_shards(job, options, as_json)
            return
        facts = _write(job, _required(out), options)
        if not inverse:
            facts |= _start(target, plan, _required(out))
            note(f"check it: placer verify {model} {out} {plan}")
    if inverse and (unchecked := facts.pop("unchecked_files")):
        note(f"not checked, because no hash of it was recorded: {unchecked}")
    if as_json:
        print_json(facts)
        return
    rows = [
        (name, str(value))
        for name, value in facts.items()
        if name not in _TOLD and value is not None
    ]
    print_table((target, ""), rows)


def _require_options(target: str, given: list[str]) -> None:
    odd = [name for name in given if name not in _OPTIONS.get(target, ())]
    if odd:
        raise UsageError(
            f"target {target} takes no {odd[0]}",
            f"it takes {', '.join(('--out', *_OPTIONS.get(target, ())))}",
        )


def _required(out: Path | None) -> Path:
    if out is None:
        raise UsageError("there is no --out", "say where to write it: --out PATH")
    return out


def _prepared_checkpoint(plan: Path, model: Path | None, inverse: bool) -> "ExportJob":
    from placer.checkpoint.export import prepare_export, prepare_restore

    if not inverse:
        return prepare_export(plan, _required_model("checkpoint", plan, model))
    _require_no_model("checkpoint", model)
    return prepare_restore(plan)


def _export_deepspeed(plan: Path, model: Path | None, out: Path, inverse: bool) -> Facts:
    from placer.checkpoint.deepspeed import export_deepspeed, restore_deepspeed

    if inverse:
        _require_no_model("deepspeed", model)
        report, start = restore_deepspeed(plan, out), {}
    else:
        model = _required_model("deepspeed", plan, model)
        report = export_deepspeed(plan, model, out)
        start = _start("deepspeed", plan, out)
        note(f"check it: placer verify {model} {out} {plan}")
        note(
            "note: if the gate draws noise per expert (top2_2nd_expert_sampling, "
            "noisy_gate_policy), other experts get each draw: results are statistically "
            "the same, but not number for number"
        )
    return {"out": str(out)} | report.to_json() | start


def _require_no_model(target: str, model: Path | None) -> None:
    if model is not None:
        raise UsageError(
            f"--inverse needs only the exported checkpoint, but MODEL {model} is given",
            f"placer export {target} EXPORTED --inverse --out ORIGINAL",
        )


def _prepared_ranks(plan: Path, model: Path | None, experts_only: bool) -> "RanksJob":
    from placer.checkpoint.ranks import prepare_ranks

    model = _required_model("ranks", plan, model)
    return prepare_ranks(plan, model, experts_only=experts_only)


def _required_model(target: str, plan: Path, model: Path | None) -> Path:
    if model is None:
        raise UsageError(
            f"target {target} copies the model's tensors, so it needs MODEL",
            f"placer export {target} {plan} MODEL --out DIRECTORY",
        )
    return model


def _write(job: "ExportJob | RanksJob", out: Path, options: "ExportOptions") -> Facts:
    from placer.checkpoint.served_files import left_out_line

    with progress_line("export") as progress:
        report = job.write(out, options, progress)
    if report.warning:
        warn(report.warning)
    if line := left_out_line(job.source.left_out):
        note(line)
    if stale := getattr(job, "stale", ()):
        note(
            f"{', '.join(map(str, stale))}: copied as they are, with the old numbers of "
            "experts, because engines do not read them"
        )
    if report.num_resumed:
        note(f"{report.num_resumed} shards were finished by an earlier run")
    return {"out": str(out)} | report.to_json()


def _print_shards(
    job: "ExportJob | RanksJob", options: "ExportOptions", as_json: bool
) -> None:
    rows = [
        {
            "shard": work.name,
            "bytes": work.num_bytes,
            "how": "link" if options.link and work.unchanged else "write",
        }
        for work in job.shards
    ]
    total = job.bytes_to_write(options)
    if as_json:
        print_json({"shards": rows, "bytes_to_write": total})
        return
    print_table(("shard", "bytes", "how"), [tuple(row.values()) for row in rows])
    print_line(f"{total} bytes to write; nothing was written")


def _start(target: str, plan: Path, out: Path) -> Facts:
    """Say how to start the engines that serve an exported checkpoint."""
    from placer.placement import Plan
    from placer.runtime_map.engine_family import start_lines

    starts = start_lines(target, Plan.read(plan), str(out))
    _print_start(starts)
    return {"start": [one.to_json() for one in starts]} if starts else {}


def _print_start(starts: "Sequence[Start]") -> None:
    for one in starts:
        for line in one.lines():
            note(line)


def _export_counts(counts: Path, model: Path | None, out: Path) -> Facts:
    from placer.runtime_map.logical_count import export_logical_count

    if model is None:
        raise UsageError(
            f"target {_COUNTS} needs the model, which says which layers are MoE layers",
            f"placer export {_COUNTS} AFFINITY MODEL --out counts.pt",
        )
    shape = export_logical_count(counts, model, out)
    note(
        "start KTransformers with --kt-expert-placement-strategy frequency "
        f"--init-expert-location {out}"
    )
    return {"out": str(out), "shape": list(shape)}


def _export_map(target: str, plan: Path, model: Path | None, out: Path) -> Facts:
    from placer.placement import Plan
    from placer.planning.served import split_groups
    from placer.runtime_map.maps import export_map

    written = export_map(target, plan, model, out)
    split = split_groups(Plan.read(plan))
    warnings = [*written.warnings, *([split] if split else [])]
    for text in warnings:
        warn(text)
    _print_start(written.start)
    if model is not None:
        note(f"check it: placer verify {model} {out} {plan}")
    return {
        "out": str(out),
        "layers": written.num_layers,
        "slots": written.num_slots,
        "start": [one.to_json() for one in written.start],
        "warnings": warnings,
    }
