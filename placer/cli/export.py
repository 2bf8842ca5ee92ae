"""``placer export``: a plan in the form that an engine loads."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placer.cli.output import JsonOption, OutOption, note, print_json, print_table, warn
from placer.errors import UsageError

if TYPE_CHECKING:
    from placer.checkpoint.export import ExportReport

Facts = dict[str, object]


def export(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="One of: checkpoint, sglang.")
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
    if inverse:
        facts = _restore_checkpoint(plan, out)
    elif model is None:
        raise UsageError(
            f"target {target} needs the model: its config says which layers are MoE layers",
            f"placer export {target} {plan} MODEL --out {out}",
        )
    else:
        facts = _TARGETS[target](plan, model, out)
    if as_json:
        print_json(facts)
        return
    rows = [(name, str(value)) for name, value in facts.items() if name != "flags"]
    print_table((target, ""), rows)


def _restore_checkpoint(exported: Path, out: Path) -> Facts:
    from placer.checkpoint.export import restore_checkpoint

    return _checkpoint_facts(restore_checkpoint(exported, out), out)


def _export_checkpoint(plan: Path, model: Path, out: Path) -> Facts:
    from placer.checkpoint.export import export_checkpoint

    report = export_checkpoint(plan, model, out)
    if report.warning:
        warn(report.warning)
    note(f"prove it: placer verify {model} {out} {plan}")
    return _checkpoint_facts(report, out)


def _checkpoint_facts(report: "ExportReport", out: Path) -> Facts:
    return {
        "out": str(out),
        "shards": report.num_shards,
        "bytes": report.num_bytes,
        "renamed_tensors": report.num_renamed,
        "permuted_routers": report.num_routers,
    }


def _export_sglang(plan: Path, model: Path, out: Path) -> Facts:
    from placer.runtime_map.sglang import export_sglang

    written = export_sglang(plan, model, out)
    for text in written.warnings:
        warn(text)
    note(f"start it: python -m sglang.launch_server --model-path {model} {written.flags}")
    for text in written.conditions:
        note(f"mind: {text}")
    return {"out": str(out), "rows": written.num_rows, "flags": written.flags}


_TARGETS = {"checkpoint": _export_checkpoint, "sglang": _export_sglang}
