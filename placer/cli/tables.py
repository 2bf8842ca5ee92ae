"""``placer tables``: the token-shuffle table of a plan."""

from pathlib import Path
from typing import Annotated

import typer

from placer.cli.output import (
    FoldOption,
    ForceOption,
    JsonOption,
    NotFoldOption,
    claim,
    note,
    parse_fold,
    print_json,
    print_line,
    print_next,
    print_table,
    print_verdict,
    warn,
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
            help="How much a row with few tokens is pulled to the layer's average: the "
            "average counts as this many tokens."
        ),
    ] = 4.0,
    token_score: Annotated[
        bool,
        typer.Option(
            "--token-score", help="Also store the second-best home of each token id."
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
            help="Checkpoint of the model. Its embedding predicts rows for token ids that "
            "are not in the trace. Hash-routed layers get exact rows.",
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

    The table gives a home by token id and by history (the ranks that served the token in
    past layers). It is built from the tokens that the plan was solved on, or those of
    --fold and --phase, and is judged on all other sequences.
    """
    from placer.planning.tables import TableOptions, make_table
    from placer.report.verdicts import verdict_of_table
    from placer.trace import Trace

    claim(context, out, [plan, trace, embeddings], force=force, kinds=["table"])

    options = TableOptions(
        lookback=lookback,
        shrinkage=shrinkage,
        with_token_score=token_score,
        with_combined=combined,
        embeddings=embeddings,
        max_home_imbalance=max_home_imbalance,
    )
    chosen = parse_fold(fold, not_fold)
    result = make_table(plan, Trace(trace), fold=chosen, phase=phase, options=options)
    result.table.write(out)
    for warning in result.warnings:
        warn(warning)
    if result.profile.fold is None:
        warn("built from all sequences: none was held out, so no figures are shown")
    elif chosen is None:
        note(f"built from the tokens that the plan was solved on: {result.profile.options}")
    verdict = verdict_of_table(result, plan, trace, out)
    if as_json:
        answer = {"verdict": verdict.to_json(), "out": str(out)}
        print_json(answer | result.to_json())
        return
    print_verdict(verdict)
    if result.heldout is not None:
        print_table(
            ("policy", "local rate", "copies/token", "home imbalance"),
            [
                [
                    policy,
                    metrics.local_activation_rate,
                    metrics.remote_rank_copies_per_token,
                    metrics.home_imbalance_max,
                ]
                for policy, metrics in result.heldout.items()
            ],
            title="on held-out sequences",
        )
    table = result.table
    print_line(
        f"{table.vocab_size:,} token ids ({result.num_seen_ids:,} of them in the "
        f"profile), {table.num_ranks} ranks: a random home has local rate "
        f"{1 / table.num_ranks:.3f}"
    )
    if result.exact_layers:
        print_line(
            f"MoE layers {', '.join(map(str, result.exact_layers))} are hash-routed: "
            "their rows are exact for every token id"
        )
    print_line(f"table written to {out}")
    print_next(verdict)
