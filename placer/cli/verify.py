"""``placer verify``: prove that an export computes the same function."""

from pathlib import Path
from typing import Annotated

import typer

from placer.cli.output import (
    JsonOption,
    print_json,
    print_line,
    print_table,
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
    if exported.is_file():
        _verify_map(original, exported, plan, as_json)
        return
    from placer.checkpoint.deepspeed import is_deepspeed
    from placer.checkpoint.verify_deepspeed import verify_deepspeed
    from placer.checkpoint.verify_ranks import is_ranks

    if is_deepspeed(exported):
        with progress_line("verify"):
            num_tensors = verify_deepspeed(original, exported, plan)
        if as_json:
            print_json({"num_tensors": num_tensors})
            return
        print_line(f"verified: {num_tensors} tensors equal bit for bit under the plan")
        return
    if is_ranks(exported):
        _verify_ranks(original, exported, plan, as_json)
        return
    from placer.checkpoint.verify import verify as verify_export
    from placer.demo.text import documents
    from placer.trace.corpus import name_corpora

    if corpus:
        found = (text for one in name_corpora(corpus, []) for text in one.documents())
        texts = [text for text in found if isinstance(text, str)]
    else:
        texts = [one.text for one in documents("heldout")] if max_tokens else []
    with progress_line("verify"):
        report = verify_export(original, exported, plan, texts, max_tokens)
    if as_json:
        print_json(report.to_json())
        return
    rows = [
        ("tensors", f"{report.num_tensors} equal bit for bit, {report.num_bytes} bytes")
    ]
    if report.num_tokens:
        rows += [
            (
                "logits",
                f"{report.num_tokens} tokens, largest difference "
                f"{report.max_logit_difference:.2g}, allowed {report.tolerance:.2g}",
            ),
            (
                "routing",
                f"{report.num_routed_pairs} pairs exactly permuted, {report.num_ties} "
                "tokens not compared because they follow a tie",
            ),
        ]
    print_table(("check", "result"), rows)
    print_line("verified: the exported checkpoint computes the same function")


def _verify_map(original: Path, exported: Path, plan: Path, as_json: bool) -> None:
    from placer.runtime_map.maps import verify_map

    report = verify_map(exported, plan, original)
    if as_json:
        print_json(report.to_json())
        return
    slots = f"{report.num_slots} in {report.num_layers} MoE layers on {report.num_ranks}"
    rows = [
        ("format", report.runtime),
        ("slots", f"{slots} ranks, all as in the plan"),
        ("coverage", f"every expert has a slot; {report.num_replicas} replicas"),
        ("duplicates", "no rank holds two replicas of one expert"),
    ]
    print_table(("check", "result"), rows)
    if report.ignored is None:
        print_line("verified: the map is valid for its runtime and equals the plan")
        return
    warn(report.ignored)
    print_line(
        "verified: the map equals the plan, but its engine ignores it for this model"
    )


def _verify_ranks(original: Path, exported: Path, plan: Path, as_json: bool) -> None:
    from placer.checkpoint.verify_ranks import verify_ranks

    with progress_line("verify"):
        report = verify_ranks(original, exported, plan)
    if as_json:
        print_json(report.to_json())
        return
    rows = [
        ("ranks", f"{report.num_ranks}, each with the experts of the plan"),
        ("experts", f"{report.num_experts}, replicas included"),
        ("tensors", f"{report.num_tensors} equal bit for bit, {report.num_bytes} bytes"),
    ]
    print_table(("check", "result"), rows)
    print_line("verified: every rank has its part of the original")
