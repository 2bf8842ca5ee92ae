"""``placer.advise``: whether placing experts is worth it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from placer.affinity import Affinity as Counts
from placer.api.affinity import Affinity
from placer.api.arguments import AdviseArguments, require_known, sizes_text
from placer.api.files import as_path, note, warn
from placer.api.shown import Shape, Shown, TitledTable
from placer.api.trace import Trace
from placer.errors import require_left_out
from placer.placement.topology import Topology
from placer.planning.advice import Advice as Answers
from placer.planning.advice import advise_on_loads, next_command, timing_command
from placer.planning.question import Question, predictable_policy, usual_engines
from placer.planning.trace_advice import advise_on_trace
from placer.report.batches import advice_table
from placer.report.verdicts import verdict_of_advice
from placer.run.verdict import Verdict
from placer.serving.homes import batch_shapes, parse_tokens_per_rank
from placer.simulation.cost import find_expert_shape, require_no_sizes
from placer.target.engine import engines_named
from placer.target.hardware import Hardware
from placer.trace import Trace as TraceDirectory
from placer.trace.selection import parse_phase

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Advice(Shown):
    """Whether to place by traffic, only balance, or do nothing.

    :func:`placer.advise` makes one.

    Attributes
    ----------
    contents
        What the rest of placer works with; not part of the stable API.
    verdict
        One sentence for each phase, and engines that have the same one; ``next`` is the
        command that makes the plan, ``None`` where none is worth it.
    then
        The command that predicts its time; ``None`` without hardware.
    """

    contents: Answers
    verdict: Verdict
    then: str | None

    @property
    def recommendation(self) -> str:
        """What to do, by the answer with the most to gain.

        ``worth it``, ``less traffic, busier rank``, ``balance only``, ``EPLB does as well``
        or ``not worth it``.
        """
        return self.contents.verdict

    @property
    def reasons(self) -> tuple[str, ...]:
        """What holds for all answers, one sentence each."""
        return self.contents.reasons

    @property
    def warnings(self) -> tuple[str, ...]:
        """What limits the figures, one sentence each."""
        return self.contents.warnings

    def to_frame(self) -> "DataFrame":
        """Return one row for each engine, phase, candidate and size of batches.

        Columns: ``engine``, ``phase``, ``verdict``, ``placement`` and the figures of
        :class:`placer.planning.advice.Candidate`.
        """
        from pandas import DataFrame

        return DataFrame(
            [
                {
                    "engine": one["engine"],
                    "phase": one["phase"],
                    "verdict": one["verdict"],
                    "placement": name,
                    **figures,
                }
                for one in self.contents.to_json()["answers"]
                for name, every in one["candidates"].items()
                for figures in every
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``placer advise --json``."""
        commands = {"next": self.verdict.next, "then": self.then}
        return self.contents.to_json() | commands

    def table(self) -> tuple[TitledTable, list[str]]:
        """Return the figures of each placement, and in words those that are all alike."""
        columns, rows, alike = advice_table(self.contents)
        return (None, columns, rows), alike

    def _shape(self) -> Shape:
        (_, columns, rows), alike = self.table()
        lines = [*alike, *(f"- {reason}" for reason in self.reasons)]
        if self.verdict.next is not None:
            lines.append(f"next: {self.verdict.next}")
        answers = enumerate(self.verdict.answer, 1)
        return Shape(
            title=f"Advice: {self.recommendation}",
            facts={f"answer {n}": text for n, text in answers},
            columns=columns,
            rows=rows,
            lines=lines,
        )


def advise(
    source: Trace | Affinity,
    *,
    gpus_per_node: int,
    nodes: int = 1,
    progress: Callable[[str], None] | None = None,
    **options: Unpack[AdviseArguments],
) -> Advice:
    """Say whether to place by traffic, only balance, or do nothing, as ``placer advise``.

    Parameters
    ----------
    source
        A trace, or counts: those judge only balance.
    gpus_per_node, nodes
        Expert-parallel ranks on each node, and nodes.
    progress
        Called with one line for each step.
    **options
        The others of ``placer advise``, such as ``engine``, ``policy`` and ``hardware``:
        :class:`placer.AdviseArguments`.

    Raises
    ------
    PlacerError
        If the trace is damaged.
    UsageError
        If an option is not known, or needs another one.

    Examples
    --------
    >>> import placer
    >>> trace = placer.open("traces/demo/traces/final")
    >>> advice = placer.advise(trace, gpus_per_node=4)
    >>> advice.verdict.next.split()[:2]
    ['placer', 'solve']
    """
    require_known(options, AdviseArguments)
    contents, path = source.contents, source.path or Path("AFFINITY")
    policy, batching = options.get("policy", "fixed"), options.get("batching")
    hardware, least_gain = options.get("hardware"), options.get("least_gain", 0.03)
    text = sizes_text(options.get("tokens_per_rank"))
    if isinstance(contents, Counts):
        require_left_out(
            {
                "--hardware": hardware,
                "--tokens-per-rank": text,
                "--batching": batching,
                "--policy": None if policy == "fixed" else policy,
            },
            "a trace: an affinity file holds counts, which cannot be divided into batches",
        )
    model, hidden_size = as_path(options.get("model")), options.get("hidden_size")
    expert_size, weight_bytes = options.get("expert_size"), options.get("weight_bytes")
    if hardware is None:
        require_no_sizes(None, hidden_size, expert_size, weight_bytes, "--hardware")
        if model is not None:
            note("--model has no effect without --hardware: it sizes the experts")
    is_trace, engine = isinstance(contents, TraceDirectory), options.get("engine")
    width = hidden_size or (contents.model.hidden_size if is_trace else None)
    named = None if hardware is None else Hardware.named(str(hardware))
    shapes = batch_shapes(parse_tokens_per_rank(text), batching)
    usual = usual_engines(nodes) if is_trace else (None,)
    questions = [
        Question(
            topology=Topology(num_nodes=nodes, gpus_per_node=gpus_per_node),
            policy=predictable_policy(policy),
            engine=one,
            hardware=named,
            expert=find_expert_shape(model, width, expert_size, weight_bytes, one),
            shapes=shapes,
            least_gain=least_gain,
            phase=parse_phase(options.get("phase", "all")),
        )
        for one in (usual if engine is None else engines_named(engine))
    ]
    if isinstance(contents, Counts):
        advice = advise_on_loads(contents, questions, path, progress)
    else:
        advice = advise_on_trace(contents, questions, progress)
    batches: dict[str, object] = {"--tokens-per-rank": text, "--batching": batching}
    gain: dict[str, object] = {"--least-gain": f"{least_gain:g}"}
    timed: dict[str, object] = {
        "--hardware": hardware,
        "--model": model,
        "--hidden-size": hidden_size,
        "--expert-size": expert_size,
        "--weight-bytes": None if weight_bytes is None else f"{weight_bytes:g}",
    }
    for warning in advice.warnings:
        warn(warning)
    return Advice(
        advice,
        verdict_of_advice(advice, next_command(advice, path, _given(batches | gain))),
        None if hardware is None else timing_command(advice, path, _given(batches | timed)),
    )


def _given(options: Mapping[str, object]) -> list[str]:
    """Return the words of the options that have a value."""
    words = ((name, str(value)) for name, value in options.items() if value is not None)
    return [*chain.from_iterable(words)]
