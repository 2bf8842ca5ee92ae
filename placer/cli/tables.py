"""``placer tables``: the token-shuffle table of a plan."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli.output import (
    FoldOption,
    ForceOption,
    JsonOption,
    NotFoldOption,
    claim,
    print_json,
    print_line,
    print_next,
    print_tables,
    print_verdict,
    progress_line,
)


def tables(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan.")],
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace with token ids.")],
    out: Annotated[Path, typer.Option("--out", help="The table to write (.safetensors).")],
    lookback: Annotated[
        int | None,
        typer.Option(
            help="Length of a history: how many past layers it has.",
            show_default="up to 4, fewer for many ranks",
        ),
    ] = None,
    shrinkage: Annotated[
        float,
        typer.Option(
            help="Each row (one token id or history) is averaged with the mean of its "
            "layer. The mean counts as this many tokens, so it matters most for rows with "
            "few tokens."
        ),
    ] = 4.0,
    token_score: Annotated[
        bool,
        typer.Option(
            "--token-score", help="Also store the score of every home for each token id."
        ),
    ] = False,
    combined: Annotated[
        bool,
        typer.Option(
            "--combined",
            help="Also store the combined rule: it predicts the home from the token id and "
            "the token's experts in earlier layers. Includes --token-score.",
        ),
    ] = False,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Checkpoint of the model. Token ids that are not in the trace get homes "
            "predicted from the model's embedding. Layers whose experts depend only on the "
            "token id get exact homes.",
        ),
    ] = None,
    max_home_imbalance: Annotated[
        float | None,
        typer.Option(
            help="Cap on the tokens of the fullest home rank over the mean.",
            show_default="none",
        ),
    ] = None,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: Annotated[
        str | None,
        typer.Option(
            help="Use only tokens of this phase: prefill, decode or all.",
            show_default="the plan's",
        ),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the token-shuffle table: a home rank for each token.

    The home rank of a token has its hidden state. The table gives a home by token id and by
    history (the ranks that served the token in past layers). It is built from the tokens
    that the plan was solved on, or those of --fold and --phase. It is judged on all other
    sequences.
    """
    claim(context, out, [plan, trace, embeddings], force=force, kinds=["table"])
    with progress_line("tables") as progress:
        made = placer.Plan.read(plan).table(
            placer.Trace.read(trace),
            fold=fold,
            not_fold=not_fold,
            phase=phase,
            lookback=lookback,
            shrinkage=shrinkage,
            token_score=token_score,
            combined=combined,
            embeddings=embeddings,
            max_home_imbalance=max_home_imbalance,
            progress=progress,
        )
    made = made.write(out, force=force)
    if as_json:
        print_json(made.to_json())
        return
    print_verdict(made.verdict)
    tables, lines = made.tables()
    print_tables(tables)
    for line in lines:
        print_line(line)
    print_line(f"table written to {out}")
    print_next(made.verdict)
