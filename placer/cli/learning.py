"""``placer trace learning``: how many tokens a plan needs."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from placer.cli.output import (
    FoldOption,
    GpusPerNodeOption,
    JsonOption,
    NodesOption,
    NotFoldOption,
    PhaseOption,
    given_words,
    parse_selection,
    print_json,
    print_next,
    print_table,
    print_verdict,
    progress_line,
)
from placer.errors import one_of


def learning(
    context: typer.Context,
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace directory.")],
    gpus_per_node: GpusPerNodeOption,
    nodes: NodesOption = 1,
    policy: Annotated[
        str,
        typer.Option(
            help="How the home of a token, the rank that has its hidden state, is chosen: "
            "fixed or follow (docs/concepts.md)."
        ),
    ] = "fixed",
    max_imbalance: Annotated[
        float,
        typer.Option(
            help="Cap on the load of the busiest rank over the mean, in every layer."
        ),
    ] = 1.10,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Number of tokens to solve on. Repeatable. Default: 500, 1000, "
            "2000, 5000 and so on, up to 100000.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Random seed of the sample and the search.")
    ] = 0,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: PhaseOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Solve on more and more tokens, to see how many a plan needs.

    Plans are solved on parts of the sequences of --fold (default 0/2) and judged on all
    other sequences.
    """
    from placer.placement.policy import POLICIES
    from placer.placement.topology import Topology
    from placer.planning.learning import DEFAULT_TOKENS, learning_curve
    from placer.report.trace_verdicts import verdict_of_learning
    from placer.run.session import Session
    from placer.solver.caps import Caps
    from placer.solver.goal import NOT_SOLVED, Goal
    from placer.solver.options import SolveOptions
    from placer.trace import Trace

    options = SolveOptions(
        topology=Topology(num_nodes=nodes, gpus_per_node=gpus_per_node),
        goal=Goal(
            policy=one_of("--policy", policy, POLICIES, NOT_SOLVED),
            caps=Caps(max_imbalance=max_imbalance),
        ),
    )
    chosen = parse_selection(fold or (None if not_fold else "0/2"), not_fold, phase)
    sizes = tuple(tokens) if tokens else DEFAULT_TOKENS
    with progress_line("learning") as progress:
        session = Session(seed=seed, progress=progress)
        points = learning_curve(
            Trace(trace), options, chosen, tokens=sizes, session=session
        )
    words = given_words(context, "tokens", "as_json")
    # A small part may put the cap out of reach, so the curve relaxes it too.
    words += ["--relax-cap"] if "--max-imbalance" in words else []
    words += [] if fold or not_fold else ["--fold", "0/2"]
    solve = shlex.join(["placer", "solve", *words, "--out", "plan.json"])
    verdict = verdict_of_learning(points, solve)
    rows = [asdict(point) for point in points]
    if as_json:
        answer = {"verdict": verdict.to_json()}
        print_json(answer | {**chosen.to_json(), "points": rows})
        return
    print_verdict(verdict, always=True)
    print_table(
        ("tokens", "sequences", "copies/token", "of contiguous", "imbalance", "moved"),
        [tuple(row.values()) for row in rows],
    )
    print_next(verdict)
