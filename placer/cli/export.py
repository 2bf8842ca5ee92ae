"""``placer export``: a plan in the form that an engine loads."""

from pathlib import Path
from typing import Annotated

import typer

from placer.cli.output import JsonOption, OutOption, note, print_json, print_table, warn
from placer.errors import UsageError

_TARGETS = ("checkpoint", "sglang")


def export(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help=f"One of: {', '.join(_TARGETS)}.")
    ],
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="The plan; with --inverse, the export.")
    ],
    out: OutOption,
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Hugging Face directory.")
    ] = None,
    inverse: Annotated[
        bool,
        typer.Option("--inverse", help="Restore the original of an exported checkpoint."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a permuted checkpoint, or a map for a runtime.

    checkpoint: the model with its experts renumbered, for any engine that splits experts
    contiguously; nothing is recomputed. sglang: the file of --init-expert-location.
    """
    if target not in _TARGETS:
        raise UsageError(
            f"target {target!r} is not known", f"targets: {', '.join(_TARGETS)}"
        )
    if inverse and (target != "checkpoint" or model is not None):
        raise UsageError(
            "--inverse restores a checkpoint from its export alone",
            "placer export checkpoint EXPORTED --inverse --out ORIGINAL",
        )
    if not inverse and model is None:
        raise UsageError(
            f"target {target} needs the model: its config says which layers are MoE layers",
            f"placer export {target} {plan} MODEL --out {out}",
        )
    facts = (
        _export_sglang(plan, model, out)
        if target == "sglang"
        else _export_checkpoint(plan, model, out)
    )
    if as_json:
        print_json(facts)
    else:
        print_table((target, ""), [(name, str(value)) for name, value in facts.items()])


def _export_checkpoint(plan: Path, model: Path | None, out: Path) -> dict[str, object]:
    from placer.checkpoint.export import export_checkpoint, restore_checkpoint

    if model is None:
        report = restore_checkpoint(plan, out)
    else:
        report = export_checkpoint(plan, model, out)
        note(f"prove it: placer verify {model} {out} {plan}")
    if report.warning:
        warn(report.warning)
    return {
        "out": str(out),
        "shards": report.num_shards,
        "bytes": report.num_bytes,
        "renamed_tensors": report.num_renamed,
        "permuted_routers": report.num_routers,
    }


def _export_sglang(plan: Path, model: Path | None, out: Path) -> dict[str, object]:
    from placer.runtime_map.sglang import export_sglang

    written = export_sglang(plan, model or Path(), out)
    for text in written.warnings:
        warn(text)
    for text in written.conditions:
        note(f"mind: {text}")
    return {"out": str(out), "rows": written.num_rows, "flags": written.flags}
