"""``placer advise``: whether placing experts is worth it."""

from pathlib import Path
from typing import Annotated

import typer

from placer.cli.output import (
    ExpertSizeOption,
    GpusPerNodeOption,
    HiddenSizeOption,
    JsonOption,
    NodesOption,
    PhaseOption,
    SizedByOption,
    WeightBytesOption,
    print_json,
    print_line,
    print_table,
    warn,
)


def advise(
    source: Annotated[
        Path, typer.Argument(metavar="TRACE|AFFINITY", help="Traffic, or loads alone.")
    ],
    gpus_per_node: GpusPerNodeOption,
    nodes: NodesOption = 1,
    policy: Annotated[str, typer.Option(help="Home policy: fixed or follow.")] = "fixed",
    engine: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What sends (docs/engines.md)."),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Measure by predicted time: h100, h200, b200, a100, or a .toml file.",
        ),
    ] = None,
    model: SizedByOption = None,
    hidden_size: HiddenSizeOption = None,
    expert_size: ExpertSizeOption = None,
    weight_bytes: WeightBytesOption = None,
    least_gain: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share that a change must save.")
    ] = 0.03,
    phase: PhaseOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Tell whether placing experts is worth it, balancing alone is, or nothing is.

    Half of the sequences make a quick plan, the other half judge it. From an affinity file,
    such as the loads that an engine counted, only balance is judged.
    """
    from placer.affinity import Affinity
    from placer.engine import Engine
    from placer.hardware import Hardware
    from placer.plan.problem import Topology
    from placer.report.advice import (
        Question,
        advise_on_loads,
        advise_on_trace,
        next_command,
    )
    from placer.simulation.cost import find_expert_shape, require_no_sizes
    from placer.trace import Trace
    from placer.trace.selection import parse_phase

    if hardware is None:
        require_no_sizes(model, hidden_size, expert_size, weight_bytes, "--hardware")
    counts = source.is_file()
    trace = None if counts else Trace(source)
    question = Question(
        topology=Topology(num_nodes=nodes, gpus_per_node=gpus_per_node),
        policy=policy,
        engine=None if engine is None else Engine.named(engine),
        hardware=None if hardware is None else Hardware.named(hardware),
        expert=find_expert_shape(
            model,
            hidden_size or (None if trace is None else trace.model.hidden_size),
            expert_size,
            weight_bytes,
        ),
        least_gain=least_gain,
        phase=parse_phase(phase),
    )
    if trace is None:
        advice = advise_on_loads(Affinity.read(source), question)
    else:
        advice = advise_on_trace(trace, question)
    for line in advice.warnings:
        warn(line)
    command = next_command(advice, source, question)
    if as_json:
        print_json(advice.to_json() | {"next": command})
        return
    columns = ("placement", "copies/token", "imbalance", "straggler", "layer us")
    print_table(
        columns,
        [
            (
                name,
                one.copies_per_token,
                one.load_imbalance,
                one.straggler,
                one.time_us,
            )
            for name, one in advice.candidates.items()
        ],
    )
    print_line(f"verdict: {advice.verdict}")
    for reason in advice.reasons:
        print_line(f"- {reason}")
    if advice.break_even is not None:
        print_line(f"- beside contiguous, the placed plan {advice.break_even.words}")
    if command is not None:
        print_line(f"next: {command}")
