"""``placer advise``: whether placing experts is worth it."""

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from placer.cli.output import (
    BatchingOption,
    ExpertSizeOption,
    GpusPerNodeOption,
    HiddenSizeOption,
    JsonOption,
    NodesOption,
    PhaseOption,
    SizedByOption,
    TokensPerRankOption,
    WeightBytesOption,
    note,
    print_json,
    print_line,
    print_table,
    print_verdict,
    progress_line,
    warn,
)


def advise(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE|AFFINITY", help="A trace directory or an affinity file."
        ),
    ],
    gpus_per_node: GpusPerNodeOption,
    nodes: NodesOption = 1,
    policy: Annotated[
        str,
        typer.Option(
            help="How the home of a token, the rank that has its hidden state, is chosen: "
            "fixed or follow (docs/concepts.md)."
        ),
    ] = "fixed",
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="An engine (docs/engines.md), or a family of engines, such as "
            "vllm. Default: two answers, one for all-gather (the engines' default), "
            "one for a token all-to-all.",
        ),
    ] = None,
    tokens_per_rank: TokensPerRankOption = None,
    batching: BatchingOption = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Judge by predicted time on h100, h200, b200, a100, or on the hardware "
            "of a .toml file (placer calibrate).",
        ),
    ] = None,
    model: SizedByOption = None,
    hidden_size: HiddenSizeOption = None,
    expert_size: ExpertSizeOption = None,
    weight_bytes: WeightBytesOption = None,
    least_gain: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Smallest saving that is worth a change: 0.03 is 3 %."
        ),
    ] = 0.03,
    phase: PhaseOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Say whether to place by traffic, only balance, or do nothing.

    A quick plan is made on half of the sequences and judged on the other half. An affinity
    file, such as the loads that an engine counted, can only judge balance. Nothing is
    written: the last line is the command that makes the plan.
    """
    from placer.affinity import Affinity
    from placer.errors import require_left_out
    from placer.placement.topology import Topology
    from placer.planning.advice import advise_on_loads, next_command, timing_command
    from placer.planning.question import Question, predictable_policy, usual_engines
    from placer.planning.trace_advice import advise_on_trace
    from placer.planning.verdict import grouped
    from placer.report.batches import advice_table
    from placer.serving.homes import batch_shapes, parse_tokens_per_rank
    from placer.simulation.cost import find_expert_shape, require_no_sizes
    from placer.target.engine import engines_named
    from placer.target.hardware import Hardware
    from placer.trace import Trace
    from placer.trace.selection import parse_phase

    if source.is_file():
        require_left_out(
            {
                "--hardware": hardware,
                "--tokens-per-rank": tokens_per_rank,
                "--batching": batching,
                "--policy": None if policy == "fixed" else policy,
            },
            "a trace: an affinity file holds counts, which cannot be divided into batches",
        )
    if hardware is None:
        require_no_sizes(None, hidden_size, expert_size, weight_bytes, "--hardware")
        if model is not None:
            note("--model has no effect without --hardware: it sizes the experts")
    trace = None if source.is_file() else Trace(source)
    width = hidden_size or (None if trace is None else trace.model.hidden_size)
    named = None if hardware is None else Hardware.named(hardware)
    shapes = batch_shapes(parse_tokens_per_rank(tokens_per_rank), batching)
    usual = usual_engines(nodes) if trace is not None else (None,)
    engines = usual if engine is None else engines_named(engine)
    questions = [
        Question(
            topology=Topology(num_nodes=nodes, gpus_per_node=gpus_per_node),
            policy=predictable_policy(policy),
            engine=one,
            hardware=named,
            expert=find_expert_shape(model, width, expert_size, weight_bytes, one),
            shapes=shapes,
            least_gain=least_gain,
            phase=parse_phase(phase),
        )
        for one in engines
    ]
    with progress_line("advise") as progress:
        if trace is None:
            counts = Affinity.read(source)
            advice = advise_on_loads(counts, questions, source, progress)
        else:
            advice = advise_on_trace(trace, questions, progress)
    for line in advice.warnings:
        warn(line)
    batches: dict[str, object] = {
        "--tokens-per-rank": tokens_per_rank,
        "--batching": batching,
    }
    gain: dict[str, object] = {"--least-gain": f"{least_gain:g}"}
    command = next_command(advice, source, _given(batches | gain))
    timing = None
    if hardware is not None:
        timed: dict[str, object] = {
            "--hardware": hardware,
            "--model": model,
            "--hidden-size": hidden_size,
            "--expert-size": expert_size,
            "--weight-bytes": None if weight_bytes is None else f"{weight_bytes:g}",
        }
        timing = timing_command(advice, source, _given(batches | timed))
    if as_json:
        print_json(advice.to_json() | {"next": command, "then": timing})
        return
    for names, sentence in grouped((one.engine, one.sentence) for one in advice.answers):
        print_verdict(", ".join(names) or None, sentence)
    print_line("")
    columns, rows, alike = advice_table(advice)
    print_table(columns, rows)
    for line in alike:
        print_line(line)
    for reason in advice.reasons:
        print_line(f"- {reason}")
    if command is not None:
        print_line(f"next: {command}")
    if timing is not None:
        print_line(f"then, for its predicted time: {timing}")


def _given(options: Mapping[str, object]) -> list[str]:
    """Return the words of the options that have a value."""
    words = ((name, str(value)) for name, value in options.items() if value is not None)
    return [*chain.from_iterable(words)]
