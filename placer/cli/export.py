"""``placer export``: a plan in the form that an engine loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from placer.api.known import EXPORT_TARGETS as TARGETS
from placer.cli.choices import among
from placer.cli.output import (
    ForceOption,
    JsonOption,
    note,
    print_json,
    print_line,
    print_next,
    print_table,
    print_verdict,
    progress_line,
)


def export(
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

    Checkpoints. No weight changes. An interrupted export of checkpoint or ranks continues
    if you run it again. checkpoint and deepspeed take no redundant experts:

      checkpoint    the model with its experts renumbered, for any engine that
                    splits experts contiguously
      ranks         one directory for each rank: its experts and all other tensors
      deepspeed     a DeepSpeed-MoE checkpoint (MODEL: a global_step folder)

    Maps, which the engine reads when it starts:

      sglang        .json or .pt for --init-expert-location
      trtllm        .yaml for moe_config.load_balancer
      vllm-ascend   .json for expert_map_path
      vllm-pr49572  .json as proposed to vLLM; no release reads it
      vllm-das      .json for the plugin vllm-plugin-das

    Other formats. The first three, and vllm-pr49572, need no MODEL:

      eplb          .safetensors or .npz with phy2log, log2phy, logcnt
      csv           one line for each slot
      json          one list of slots for each layer
      ktransformers .pt with counts, made from an affinity file in place of PLAN
    """
    from placer.api.exporting import export_file, shards_to_write
    from placer.api.files import UsedFile

    options: dict[str, Any] = {
        "inverse": inverse,
        "link": link,
        "hash": with_hashes,
        "workers": workers,
        "backend": backend,
        "ray_address": ray_address,
        "experts_only": experts_only,
    }
    source = UsedFile(plan)
    if dry_run:
        _print_shards(shards_to_write(target, source, model, **options), as_json=as_json)
        return
    with progress_line("export") as progress:
        found = export_file(
            target, source, model, out, force=force, progress=progress, **options
        )
    for line in found.notes:
        note(line)
    if as_json:
        print_json(found.to_json())
        return
    print_verdict(found.verdict)
    rows = [(name, str(value)) for name, value in found.shown_facts.items()]
    print_table((target, ""), rows)
    print_next(found.verdict)


def _print_shards(found: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    rows = [tuple(row.values()) for row in found["shards"]]
    print_table(("shard", "bytes", "how"), rows)
    print_line(f"{found['bytes_to_write']} bytes to write; nothing was written")
