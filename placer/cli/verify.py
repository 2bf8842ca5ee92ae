"""``placer verify``: prove that an export computes the same function."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli.output import (
    JsonOption,
    print_json,
    print_table,
    print_verdict,
    progress_line,
    warn,
)


def verify(
    original: Annotated[
        Path, typer.Argument(metavar="ORIGINAL", help="The original model.")
    ],
    exported: Annotated[
        Path,
        typer.Argument(
            metavar="EXPORTED", help="Its export: a checkpoint, ranks or a map."
        ),
    ],
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="The plan that was exported.")
    ],
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Text to run both models on. Default: a text that comes with placer.",
        ),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(min=0, help="Limit on the tokens to run. 0 compares tensors only."),
    ] = 2048,
    as_json: JsonOption = False,
) -> None:
    """Check that an export computes what the original computes. Exit 5 if not.

    A checkpoint: every tensor is compared bit for bit under the plan's permutation. Then
    both models run on text, in float32. Routing must be the same, and logits may differ by
    1e-4 of the largest logit, because experts are summed in another order.

    A map: checked by the rules of its engine, then slot by slot against the plan. Ranks:
    every tensor is compared.
    """
    with progress_line("verify") as progress:
        found = placer.Plan.read(plan).verify(
            original,
            exported,
            corpus=corpus or (),
            max_tokens=max_tokens,
            progress=progress,
        )
    if as_json:
        print_json(found.to_json())
        return
    print_verdict(found.verdict, always=True)
    if found.checks:
        print_table(("check", "result"), found.checks)
    if found.warning is not None:
        warn(found.warning)
