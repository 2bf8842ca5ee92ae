"""``placer export``: a plan in the form that an engine loads."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placer.cli.output import (
    JsonOption,
    note,
    print_json,
    print_line,
    print_table,
    progress_line,
    warn,
)
from placer.errors import UsageError

if TYPE_CHECKING:
    from placer.checkpoint.export import ExportJob, ExportReport
    from placer.checkpoint.writing import ExportOptions

Facts = dict[str, object]
# Told on stderr, one line each.
_TOLD = ("command", "conditions", "warnings")
MAPS = ("sglang", "trtllm", "vllm-ascend", "eplb", "csv", "json")
TARGETS = ("checkpoint", *MAPS)


def export(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help=f"One of: {', '.join(TARGETS)}.")
    ],
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="The plan; with --inverse, the export.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where to write the result; not with --dry-run."),
    ] = None,
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Hugging Face directory.")
    ] = None,
    inverse: Annotated[
        bool,
        typer.Option("--inverse", help="Restore the original of an exported checkpoint."),
    ] = False,
    link: Annotated[
        bool,
        typer.Option("--link", help="Hard-link shards that do not change."),
    ] = False,
    with_hashes: Annotated[
        bool,
        typer.Option(
            "--hash", help="Record SHA-256 of the original's shards; slower than the copy."
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Shards at a time; default one per CPU, at most 4."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List shards and bytes, write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a permuted checkpoint, or a map for a runtime.

    checkpoint: the model with its experts renumbered, for any engine that splits experts
    contiguously; nothing is recomputed, and an export that was killed goes on where it
    stopped. Maps: sglang (.json, .pt: --init-expert-location), trtllm (.yaml:
    moe_config.load_balancer), vllm-ascend (.json: expert_map_path), eplb (.safetensors,
    .npz: phy2log, log2phy, logcnt), csv and json (one slot a line, or rows). The last three
    need no MODEL.
    """
    if target not in TARGETS:
        raise UsageError(
            f"target {target!r} is not known",
            f"targets: {', '.join(TARGETS)}; engines that read no map (vLLM, Megatron, "
            "transformers) serve a permuted checkpoint",
        )
    if target in MAPS:
        if inverse or link or with_hashes or workers is not None or dry_run:
            raise UsageError(
                "--inverse, --link, --hash, --workers and --dry-run are for checkpoints",
                f"placer export {target} PLAN MODEL --out MAP",
            )
        facts = _export_map(target, plan, model, _required(out))
    else:
        from placer.checkpoint.writing import ExportOptions

        options = ExportOptions(link=link, with_hashes=with_hashes, num_workers=workers)
        job = _prepared(plan, model, inverse)
        if dry_run:
            _print_job(job, options, as_json)
            return
        facts = _export_checkpoint(job, _required(out), options)
        if not inverse:
            note(f"prove it: placer verify {model} {out} {plan}")
    if as_json:
        print_json(facts)
        return
    rows = [(name, str(value)) for name, value in facts.items() if name not in _TOLD]
    print_table((target, ""), rows)


def _required(out: Path | None) -> Path:
    if out is None:
        raise UsageError("there is no --out", "say where to write it: --out PATH")
    return out


def _prepared(plan: Path, model: Path | None, inverse: bool) -> "ExportJob":
    from placer.checkpoint.export import prepare_export, prepare_restore

    if inverse and model is not None:
        raise UsageError(
            "--inverse restores a checkpoint from its export alone",
            "placer export checkpoint EXPORTED --inverse --out ORIGINAL",
        )
    if inverse:
        return prepare_restore(plan)
    if model is None:
        raise UsageError(
            "target checkpoint needs the model, whose experts are renumbered",
            f"placer export checkpoint {plan} MODEL --out DIRECTORY",
        )
    return prepare_export(plan, model)


def _export_checkpoint(job: "ExportJob", out: Path, options: "ExportOptions") -> Facts:
    with progress_line("export") as progress:
        report = job.write(out, options, progress)
    if report.warning:
        warn(report.warning)
    if report.num_resumed:
        note(f"{report.num_resumed} shards were finished by an earlier run")
    if job.restoring and not report.contents_checked:
        note(
            "headers and sizes are those of the original; its contents were not hashed "
            "when it was exported (--hash)"
        )
    return _checkpoint_facts(report, out)


def _checkpoint_facts(report: "ExportReport", out: Path) -> Facts:
    return {
        "out": str(out),
        "shards": report.num_shards,
        "bytes": report.num_bytes,
        "renamed_tensors": report.num_renamed,
        "permuted_routers": report.num_routers,
        "linked_shards": report.num_linked,
    }


def _print_job(job: "ExportJob", options: "ExportOptions", as_json: bool) -> None:
    rows = [
        {
            "shard": work.name,
            "bytes": work.num_bytes,
            "renamed_tensors": sum(n in job.changes.names for n in work.shard.tensors),
            "reordered_tensors": sum(n in job.changes.rows for n in work.shard.tensors),
            "how": "link" if options.link and work.unchanged else "write",
        }
        for work in job.shards
    ]
    if job.warning:
        warn(job.warning)
    total = job.bytes_to_write(options)
    if as_json:
        print_json({"shards": rows, "bytes_to_write": total})
        return
    print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    print_line(f"{total} bytes to write; nothing was written")


def _export_map(target: str, plan: Path, model: Path | None, out: Path) -> Facts:
    from placer.runtime_map import export_map

    written = export_map(target, plan, model, out)
    for text in written.warnings:
        warn(text)
    if written.command:
        note(f"start it: {written.command}")
    for text in written.conditions:
        note(f"mind: {text}")
    if model is not None:
        note(f"check it: placer verify {model} {out} {plan}")
    return {
        "out": str(out),
        "layers": written.num_layers,
        "slots": written.num_slots,
        "command": written.command,
        "conditions": written.conditions,
        "warnings": written.warnings,
    }
