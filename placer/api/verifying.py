"""Proving that an export computes what the original computes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placer.api.shown import Result, Shape
from placer.run.verdict import Verdict


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Verified(Result):
    """What was compared, and found as the plan promises.

    :meth:`placer.Plan.verify` makes one; a difference is a ``VerificationError``.

    Attributes
    ----------
    checks
        Each check and its result, in words.
    warning
        What the engine makes of the export, or ``None``.
    """

    checks: tuple[tuple[str, str], ...] = ()
    warning: str | None = None

    def _shape(self) -> Shape:
        lines = [] if self.warning is None else [f"warning: {self.warning}"]
        title = " ".join(self.verdict.answer)
        return Shape(title=title, facts=dict(self.checks), lines=lines)


def _verified(
    sentence: str,
    facts: Mapping[str, Any],
    checks: Sequence[tuple[str, str]] = (),
    warning: str | None = None,
) -> Verified:
    return Verified(
        title="export",
        verdict=Verdict(answer=(sentence,), is_better=True),
        facts=facts,
        checks=tuple(checks),
        warning=warning,
    )


def verify_export(
    original: Path,
    exported: Path,
    plan: Path,
    *,
    corpus: Sequence[Path] = (),
    max_tokens: int = 2048,
    progress: Callable[[str], None] | None = None,
) -> Verified:
    """Compare an export with its original under the plan of a file.

    Parameters
    ----------
    original, exported, plan
        The model, its export (a checkpoint, ranks or a map), and the plan.
    corpus
        Text to run both models on; a text that comes with placer where it is empty.
    max_tokens
        Limit on the tokens to run; 0 compares tensors only.
    progress
        Called with one line for each tensor or text.

    Raises
    ------
    VerificationError
        If the export differs from what the plan promises.
    PlacerError
        If a file cannot be read.
    """
    if exported.is_file():
        return _verify_map(original, exported, plan)
    from placer.checkpoint.deepspeed import is_deepspeed
    from placer.checkpoint.verify_deepspeed import verify_deepspeed
    from placer.checkpoint.verify_ranks import is_ranks

    if is_deepspeed(exported):
        num_tensors = verify_deepspeed(original, exported, plan, progress)
        return _verified(
            f"verified: {num_tensors} tensors equal bit for bit under the plan",
            {"num_tensors": num_tensors},
        )
    if is_ranks(exported):
        return _verify_ranks(original, exported, plan, progress)
    return _verify_checkpoint(original, exported, plan, corpus, max_tokens, progress)


def _verify_checkpoint(
    original: Path,
    exported: Path,
    plan: Path,
    corpus: Sequence[Path],
    max_tokens: int,
    progress: Callable[[str], None] | None,
) -> Verified:
    from placer.checkpoint.verify import verify
    from placer.demo.text import documents
    from placer.trace.corpus import name_corpora

    if corpus:
        found = (text for one in name_corpora(corpus, []) for text in one.documents())
        texts = [text for text in found if isinstance(text, str)]
    else:
        texts = [one.text for one in documents("heldout")] if max_tokens else []
    report = verify(original, exported, plan, texts, max_tokens, progress)
    checks = [
        ("tensors", f"{report.num_tensors} equal bit for bit, {report.num_bytes} bytes")
    ]
    if report.num_tokens:
        checks += [
            (
                "logits",
                f"{report.num_tokens} tokens, largest difference "
                f"{report.max_logit_difference:.2g}, allowed {report.tolerance:.2g}",
            ),
            (
                "routing",
                f"{report.num_routed_pairs} pairs exactly permuted, {report.num_ties} "
                "tokens left out, at or after a tie of two experts",
            ),
        ]
    return _verified(
        "verified: the exported checkpoint computes the same function",
        report.to_json(),
        checks,
    )


def _verify_map(original: Path, exported: Path, plan: Path) -> Verified:
    from placer.runtime_map.maps import verify_map

    report = verify_map(exported, plan, original)
    slots = f"{report.num_slots} in {report.num_layers} MoE layers on {report.num_ranks}"
    told = "the map is valid for its runtime and equals the plan"
    if report.ignored is not None:
        told = "the map equals the plan, but its engine ignores it for this model"
    return _verified(
        f"verified: {told}",
        report.to_json(),
        (
            ("format", report.runtime),
            ("slots", f"{slots} ranks, all as in the plan"),
            ("coverage", f"every expert has a slot; {report.num_replicas} replicas"),
            ("duplicates", "no rank holds two replicas of one expert"),
        ),
        report.ignored,
    )


def _verify_ranks(
    original: Path,
    exported: Path,
    plan: Path,
    progress: Callable[[str], None] | None,
) -> Verified:
    from placer.checkpoint.verify_ranks import verify_ranks

    report = verify_ranks(original, exported, plan, progress)
    return _verified(
        "verified: every rank has its part of the original",
        report.to_json(),
        (
            ("ranks", f"{report.num_ranks}, each with the experts of the plan"),
            ("experts", f"{report.num_experts}, replicas included"),
            (
                "tensors",
                f"{report.num_tensors} equal bit for bit, {report.num_bytes} bytes",
            ),
        ),
    )
