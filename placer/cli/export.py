"""``placer export``: a plan in the form that an engine loads."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placer.cli.output import JsonOption, OutOption, note, print_json, print_table, warn
from placer.errors import UsageError

if TYPE_CHECKING:
    from placer.checkpoint.export import ExportReport

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
    contiguously; nothing is recomputed. Maps: sglang (.json, .pt: --init-expert-location),
    trtllm (.yaml: moe_config.load_balancer), vllm-ascend (.json: expert_map_path), eplb
    (.safetensors, .npz: phy2log, log2phy, logcnt), csv and json (one slot a line, or rows).
    The last three need no MODEL.
    """
    if target not in TARGETS:
        raise UsageError(
            f"target {target!r} is not known",
            f"targets: {', '.join(TARGETS)}; engines that read no map (vLLM, Megatron, "
            "transformers) serve a permuted checkpoint",
        )
    if inverse and (target != "checkpoint" or model is not None):
        raise UsageError(
            "--inverse restores a checkpoint from its export alone",
            "placer export checkpoint EXPORTED --inverse --out ORIGINAL",
        )
    if inverse:
        facts = _restore_checkpoint(plan, out)
    elif target in MAPS:
        facts = _export_map(target, plan, model, out)
    elif model is None:
        raise UsageError(
            f"target {target} needs the model, whose experts are renumbered",
            f"placer export {target} {plan} MODEL --out {out}",
        )
    else:
        facts = _export_checkpoint(plan, model, out)
    if as_json:
        print_json(facts)
        return
    rows = [(name, str(value)) for name, value in facts.items() if name not in _TOLD]
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
