"""A plan on a real expert-parallel run, every byte counted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from placer.api.arguments import ReplayArguments, require_known, selected
from placer.api.files import AnyPath, as_path, note, warn
from placer.api.plan import Plan
from placer.api.shown import Result, TitledTable
from placer.api.trace import Trace
from placer.errors import one_of
from placer.replay.outcome import ReplayOutcome
from placer.replay.replay import ReplayOptions, prepared
from placer.replay.replay import replay as replay_plan
from placer.report.replay import columns, facts, rows
from placer.report.verdicts import verdict_of_replay
from placer.run.worker import Worker, start_workers
from placer.target.hardware import Hardware
from placer.trace.loading import DTYPES


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Replayed(Result):
    """What ranks really sent: :meth:`placer.Plan.replay` makes one.

    Attributes
    ----------
    contents
        What the rest of placer works with; not part of the stable API.
    """

    contents: ReplayOutcome

    @property
    def warnings(self) -> tuple[str, ...]:
        """What limits the figures, one sentence each."""
        return self.contents.warnings

    def require_verified(self) -> None:
        """Refuse a run that sent other bytes, or computed something else.

        Raises
        ------
        VerificationError
            With the run, and both figures.
        """
        self.contents.require_verified()

    def tables(self) -> tuple[list[TitledTable], list[str]]:
        """Return what ``placer replay`` shows: figures, and sentences after them."""
        found = self.contents
        return [(None, columns(found), rows(found))], facts(found)


def replay(
    plan: Plan, model: AnyPath, trace: Trace, **options: Unpack[ReplayArguments]
) -> Replayed | None:
    """Run a model expert-parallel; :meth:`placer.Plan.replay` says with what.

    Raises
    ------
    PlacerError
        If plan, model, trace and table do not fit, or the model cannot be run so.
    UsageError
        If the processes are not as many as the ranks, or an option has no such value.
    """
    require_known(options, ReplayArguments)
    with plan.as_file() as file:
        outcome = replay_plan(
            file.path,
            Path(model),
            trace.contents,
            _options(options),
            Worker.of_environment(),
            selection=selected(options),
            table_path=as_path(options.get("table")),
            say=note,
        )
    if outcome is None:
        return None
    outcome = replace(outcome, warnings=tuple(map(file.words, outcome.warnings)))
    for text in outcome.warnings:
        warn(text)
    return Replayed(
        title="replay",
        verdict=verdict_of_replay(outcome),
        facts=outcome.to_json(),
        contents=outcome,
    )


def start_replay(
    words: Sequence[str],
    plan: Plan,
    model: AnyPath,
    trace: Trace,
    **options: Unpack[ReplayArguments],
) -> int | None:
    """Run ``placer replay`` as one process for each rank, on this machine.

    What each of them would refuse is refused here, before any starts.

    Parameters
    ----------
    words
        The words of the command line after ``placer replay``.
    plan, model, trace, **options
        What they say; as in :func:`replay`.

    Returns
    -------
    int or None
        The exit code; ``None`` where this process is one of those of torchrun.

    Raises
    ------
    PlacerError
        Those of :func:`replay`, or a process was ended by a signal.
    """
    how, selection = _options(options), selected(options)
    if not Worker.of_environment().alone:
        return None
    with plan.as_file() as file:
        table = as_path(options.get("table"))
        prepared(file.path, Path(model), trace.contents, how, selection, table)
    return start_workers(plan.num_ranks, ["replay", *words])


def _options(given: ReplayArguments) -> ReplayOptions:
    default, hardware = ReplayOptions(), given.get("hardware")
    return ReplayOptions(
        exchanges=tuple(given.get("exchange") or ()),
        sequence_length=given.get("sequence_length", default.sequence_length),
        sequences_per_rank=given.get("sequences_per_rank", default.sequences_per_rank),
        num_passes=given.get("passes", default.num_passes),
        repeats=given.get("repeats", default.repeats),
        dtype=one_of("--dtype", given.get("dtype", default.dtype), DTYPES),
        device=given.get("device", default.device),
        hardware=None if hardware is None else Hardware.named(hardware),
        elsewhere=tuple(Hardware.named(name) for name in given.get("elsewhere") or ()),
    )
