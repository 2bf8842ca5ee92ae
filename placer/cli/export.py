"""``placer export``: a plan in the form that an engine loads."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placer.cli.choices import among
from placer.cli.output import (
    ForceOption,
    JsonOption,
    claim,
    note,
    print_json,
    print_line,
    print_next,
    print_table,
    print_verdict,
    progress_line,
    warn,
)
from placer.errors import UsageError
from placer.target.map_formats import TARGETS

if TYPE_CHECKING:
    from placer.checkpoint.export import ExportJob
    from placer.checkpoint.ranks import RanksJob
    from placer.checkpoint.writing import ExportOptions

# Printed on stderr, one line each.
_TOLD = ("start", "warnings")


def export(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help=f"One of: {', '.join(TARGETS)}.",
            autocompletion=among(*TARGETS),
        ),
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
      ktransformers .pt with counts, made from an affinity file in place of PLAN
    """
    from placer.api.exporting import (
        export_kinds,
        is_directory,
        prepared,
        require_options,
        write_export,
        writing_options,
    )
    from placer.report.verdicts import verdict_of_export

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
    require_options(target, given)
    options = writing_options(
        link=link,
        with_hashes=with_hashes,
        workers=workers,
        backend=backend,
        ray_address=ray_address,
    )
    if dry_run:
        job = prepared(target, plan, model, inverse=inverse, experts_only=experts_only)
        _print_shards(job, options, as_json)
        return
    if out is None:
        raise UsageError("there is no --out", "say where to write it: --out PATH")
    claim(
        context,
        out,
        [plan, model],
        force=force,
        kinds=export_kinds(target),
        directory=is_directory(target),
    )
    with progress_line("export") as progress:
        facts = write_export(
            target,
            plan,
            model,
            out,
            options,
            inverse=inverse,
            experts_only=experts_only,
            progress=progress,
            note=note,
            warn=warn,
        )
    verdict = verdict_of_export(target, plan, model, out, inverse=inverse)
    if as_json:
        print_json({"verdict": verdict.to_json()} | dict(facts))
        return
    print_verdict(verdict)
    rows = [
        (name, str(value))
        for name, value in facts.items()
        if name not in _TOLD and value is not None
    ]
    print_table((target, ""), rows)
    print_next(verdict)


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
