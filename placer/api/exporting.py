"""Writing a plan in the form that an engine loads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from placer.api.arguments import ExportArguments, require_known
from placer.api.files import AnyPath, UsedFile, as_path, warn, writing
from placer.api.shown import Result, Shape
from placer.errors import UsageError, meant, one_of
from placer.report.verdicts import verdict_of_export
from placer.target.map_formats import COUNTS, MAPS, TARGETS

if TYPE_CHECKING:
    from placer.api.plan import Plan
    from placer.checkpoint.export import ExportJob
    from placer.checkpoint.ranks import RanksJob
    from placer.checkpoint.writing import ExportOptions
    from placer.run.progress import Progress

Facts = dict[str, Any]
Tell = Callable[[str], None]
_BACKEND = ("--backend", "--ray-address")
# In the order in which they are refused.
_ORDER = ("link", "hash", "workers", "backend", "ray_address", "experts_only")
# Facts that notes or warnings say.
_TOLD = ("start", "warnings", "ignored")
# Maps take only --out.
_OPTIONS = {
    "checkpoint": ("--inverse", "--link", "--hash", "--workers", *_BACKEND, "--dry-run"),
    "deepspeed": ("--inverse",),
    "ranks": ("--experts-only", "--workers", *_BACKEND, "--dry-run"),
}


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Exported(Result):
    """What was written, and how an engine is started with it.

    :meth:`placer.Plan.export`, :meth:`placer.Affinity.export` and :func:`placer.restore`
    make one.

    Attributes
    ----------
    notes
        How to start engines with it, and what else to know, one line each.
    """

    notes: tuple[str, ...]

    @property
    def target(self) -> str:
        """The target."""
        return self.title

    @property
    def shown_facts(self) -> dict[str, Any]:
        """The facts that are not in the notes or the warnings."""
        return {n: v for n, v in self.facts.items() if n not in _TOLD and v is not None}

    def _shape(self) -> Shape:
        lines = [
            *(f"warning: {one}" for one in self.facts.get("warnings", ())),
            *self.notes,
        ]
        return Shape(title=f"Export: {self.target}", facts=self.shown_facts, lines=lines)


def export_plan(
    plan: "Plan",
    target: str,
    model: AnyPath | None,
    out: AnyPath,
    **options: Unpack[ExportArguments],
) -> Exported:
    """Write a plan in the form that an engine loads: :meth:`placer.Plan.export`.

    Raises
    ------
    PlacerError
        As :meth:`placer.Plan.export`.
    """
    if target == COUNTS:
        raise UsageError(
            f"target {COUNTS} is written from an affinity file, not from a plan",
            f"placer export {COUNTS} AFFINITY MODEL --out counts.pt",
        )
    with plan.as_file() as file:
        return export_file(target, file, model, out, **options)


def export_file(
    target: str,
    source: UsedFile,
    model: AnyPath | None,
    out: AnyPath | None,
    *,
    inverse: bool = False,
    progress: "Progress | None" = None,
    **options: Unpack[ExportArguments],
) -> Exported:
    """Write what is in a file in the form that an engine loads.

    Parameters
    ----------
    target, model, out, **options
        As in :meth:`placer.Plan.export`.
    source
        A plan; for ``ktransformers`` counts, with ``inverse`` the exported checkpoint.
    inverse
        Whether the original is restored.
    progress
        Gets each step.

    Raises
    ------
    PlacerError
        As :meth:`placer.Plan.export`.
    """
    require_known(options, ExportArguments)
    _require_options(target, options, inverse=inverse)
    settings = _settings(options)
    if out is None:
        raise UsageError("there is no --out", "say where to write it: --out PATH")
    place, directory, notes = Path(out), as_path(model), list[str]()
    claim = writing(
        place,
        [source.path, directory],
        force=options.get("force", False),
        kinds=_kinds(target),
        directory=_is_directory(target),
    )
    with claim:
        facts = _write_export(
            target,
            source.path,
            directory,
            place,
            settings,
            inverse=inverse,
            experts_only=options.get("experts_only", False),
            progress=progress,
            note=lambda text: notes.append(source.words(text)),
            warn=lambda text: warn(source.words(text)),
        )
    if "warnings" in facts:
        facts["warnings"] = [source.words(text) for text in facts["warnings"]]
    called = source.path if source.called is None else Path(source.called)
    return Exported(
        title=target,
        verdict=verdict_of_export(
            *(target, called, directory, place),
            inverse=inverse,
            ignored=facts.get("ignored") and source.words(facts["ignored"]),
        ),
        facts=facts,
        out=place,
        notes=tuple(notes),
    )


def shards_to_write(
    target: str,
    source: UsedFile,
    model: AnyPath | None,
    *,
    inverse: bool = False,
    **options: Unpack[ExportArguments],
) -> Facts:
    """Return the JSON object of ``placer export --dry-run --json``: nothing is written.

    Parameters are those of :func:`export_file`; the target is ``checkpoint`` or ``ranks``.

    Raises
    ------
    PlacerError
        As :func:`export_file`.
    """
    require_known(options, ExportArguments)
    _require_options(target, options, inverse=inverse, dry_run=True)
    settings, only = _settings(options), options.get("experts_only", False)
    job = _prepared(target, source.path, as_path(model), inverse=inverse, experts_only=only)
    rows = [
        {
            "shard": work.name,
            "bytes": work.num_bytes,
            "how": "link" if settings.link and work.unchanged else "write",
        }
        for work in job.shards
    ]
    return {"shards": rows, "bytes_to_write": job.bytes_to_write(settings)}


def restore(
    exported: AnyPath,
    out: AnyPath,
    *,
    target: str = "checkpoint",
    **options: Unpack[ExportArguments],
) -> Exported:
    """Restore the original of an exported checkpoint, as ``placer export --inverse``.

    Parameters
    ----------
    exported
        What was exported.
    out
        The directory to write.
    target
        ``checkpoint`` or ``deepspeed``.
    **options
        Those of ``placer export``: :class:`placer.ExportArguments`.

    Raises
    ------
    PlacerError
        If the export is damaged, or ``out`` exists and ``force`` is false.
    UsageError
        If the target cannot be restored, or an option is not for it.
    """
    return export_file(target, UsedFile(Path(exported)), None, out, inverse=True, **options)


def _is_directory(target: str) -> bool:
    """Return whether a target is a directory, or else a file."""
    return target not in (*MAPS, COUNTS)


def _kinds(target: str) -> tuple[str, ...]:
    """Return the kinds of results that an export may replace."""
    return ("export", "ranks", "checkpoint") if _is_directory(target) else ()


def _require_options(
    target: str, options: ExportArguments, *, inverse: bool, dry_run: bool = False
) -> None:
    """Refuse a target that is not known, and options that are not for it.

    Raises
    ------
    UsageError
        If it is refused.
    """
    if target not in TARGETS:
        raise UsageError(
            f"target {target!r} is not known",
            f"{meant(target, TARGETS)}"
            f"targets: {', '.join(TARGETS)}; engines that read no map (vLLM, Megatron, "
            "transformers) serve a permuted checkpoint",
        )
    allowed = _OPTIONS.get(target, ())
    given: dict[str, object] = {"--inverse": inverse}
    given |= {f"--{name.replace('_', '-')}": options.get(name) for name in _ORDER}
    given["--dry-run"] = dry_run
    odd = [name for name, value in given.items() if value and name not in allowed]
    if odd:
        raise UsageError(
            f"target {target} takes no {odd[0]}",
            f"it takes {', '.join(('--out', *allowed))}",
        )


def _settings(options: ExportArguments) -> "ExportOptions":
    """Return how shards are written.

    Raises
    ------
    UsageError
        If the backend is not known, or not for a Ray address.
    """
    from placer.checkpoint.writing import ExportOptions
    from placer.run.parallel import BACKENDS, Backend

    name = one_of("--backend", options.get("backend") or "processes", BACKENDS)
    return ExportOptions(
        link=options.get("link", False),
        with_hashes=options.get("hash", False),
        num_workers=options.get("workers"),
        backend=Backend(name=name, address=options.get("ray_address")),
    )


def _write_export(
    target: str,
    plan: Path,
    model: Path | None,
    out: Path,
    options: "ExportOptions",
    *,
    note: Tell,
    warn: Tell,
    inverse: bool = False,
    experts_only: bool = False,
    progress: "Progress | None" = None,
) -> Facts:
    """Write what is asked, and return the JSON object of ``placer export --json``.

    Parameters
    ----------
    target, plan, model, out
        As in :meth:`placer.Plan.export`; with ``inverse``, ``plan`` is the exported
        checkpoint.
    options
        How shards are written.
    note, warn
        Called with what to know, one line each.
    inverse
        Whether the original is restored.
    experts_only
        With target ``ranks``: whether only experts are written.
    progress
        Gets each step.

    Raises
    ------
    PlacerError
        As :meth:`placer.Plan.export`.
    """
    if target in MAPS:
        return _export_map(target, plan, model, out, note, warn)
    if target == COUNTS:
        return _export_counts(plan, model, out, note)
    if target == "deepspeed":
        facts = _export_deepspeed(plan, model, out, inverse, note)
    else:
        job = _prepared(target, plan, model, inverse=inverse, experts_only=experts_only)
        facts = _write(job, out, options, progress, note, warn)
        if not inverse:
            facts |= _start(target, plan, out, note)
    if inverse and (unchecked := facts.pop("unchecked_files")):
        note(f"not checked, because no hash of it was recorded: {unchecked}")
    return facts


def _prepared(
    target: str, plan: Path, model: Path | None, *, inverse: bool, experts_only: bool
) -> "ExportJob | RanksJob":
    """Return what ``checkpoint`` or ``ranks`` is to write, from headers only.

    Raises
    ------
    PlacerError
        If plan and model differ, or a file is damaged.
    UsageError
        If MODEL is missing, or given where it has no use.
    """
    from placer.checkpoint.export import prepare_export, prepare_restore
    from placer.checkpoint.ranks import prepare_ranks

    if target == "ranks":
        named = _required_model(target, plan, model)
        return prepare_ranks(plan, named, experts_only=experts_only)
    if not inverse:
        return prepare_export(plan, _required_model(target, plan, model))
    _require_no_model(target, model)
    return prepare_restore(plan)


def _export_deepspeed(
    plan: Path, model: Path | None, out: Path, inverse: bool, note: Tell
) -> Facts:
    from placer.checkpoint.deepspeed import export_deepspeed, restore_deepspeed

    if inverse:
        _require_no_model("deepspeed", model)
        return {"out": str(out)} | restore_deepspeed(plan, out).to_json()
    model = _required_model("deepspeed", plan, model)
    report = export_deepspeed(plan, model, out)
    start = _start("deepspeed", plan, out, note)
    note(
        "note: if the gate adds random noise (top2_2nd_expert_sampling, "
        "noisy_gate_policy), each expert gets the noise of another one: results are the "
        "same on average, but not number for number"
    )
    return {"out": str(out)} | report.to_json() | start


def _require_no_model(target: str, model: Path | None) -> None:
    if model is not None:
        raise UsageError(
            f"--inverse needs only the exported checkpoint, but MODEL {model} is given",
            f"placer export {target} EXPORTED --inverse --out ORIGINAL",
        )


def _required_model(target: str, plan: Path, model: Path | None) -> Path:
    if model is None:
        raise UsageError(
            f"target {target} copies the model's tensors, so it needs MODEL",
            f"placer export {target} {plan} MODEL --out DIRECTORY",
        )
    return model


def _write(
    job: "ExportJob | RanksJob",
    out: Path,
    options: "ExportOptions",
    progress: "Progress | None",
    note: Tell,
    warn: Tell,
) -> Facts:
    from placer.checkpoint.served_files import left_out_line

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


def _start(target: str, plan: Path, out: Path, note: Tell) -> Facts:
    """Say how to start the engines that serve an exported checkpoint."""
    from placer.placement import Plan
    from placer.runtime_map.engine_family import start_lines

    starts = start_lines(target, Plan.read(plan), str(out))
    for one in starts:
        for line in one.lines():
            note(line)
    return {"start": [one.to_json() for one in starts]} if starts else {}


def _export_counts(counts: Path, model: Path | None, out: Path, note: Tell) -> Facts:
    from placer.runtime_map.logical_count import export_logical_count

    if model is None:
        raise UsageError(
            f"target {COUNTS} needs the model, which says which layers are MoE layers",
            f"placer export {COUNTS} AFFINITY MODEL --out counts.pt",
        )
    shape = export_logical_count(counts, model, out)
    note(
        "start KTransformers with --kt-expert-placement-strategy frequency "
        f"--init-expert-location {out}"
    )
    return {"out": str(out), "shape": list(shape)}


def _export_map(
    target: str, plan: Path, model: Path | None, out: Path, note: Tell, warn: Tell
) -> Facts:
    from placer.placement import Plan
    from placer.planning.engine_options import split_groups
    from placer.runtime_map.maps import export_map

    written = export_map(target, plan, model, out)
    split = split_groups(Plan.read(plan))
    warnings = [*written.warnings, *([split] if split else [])]
    for text in warnings:
        if text != written.ignored:  # the verdict says it
            warn(text)
    for one in written.start:
        for line in one.lines():
            note(line)
    return {
        "out": str(out),
        "ignored": written.ignored,
        "layers": written.num_layers,
        "slots": written.num_slots,
        "start": [one.to_json() for one in written.start],
        "warnings": warnings,
    }
