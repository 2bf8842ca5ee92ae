"""The answer of each command that makes, checks or measures traces."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from placer.planning.learning import LearningPoint
from placer.report.headline import change, over_mean
from placer.report.links import Links
from placer.run.verdict import Verdict
from placer.trace.dedup import Repetition
from placer.trace.header import TraceHeader

# Plans are as good where they differ by less, in shares of contiguous or of the mean load.
_CLOSE = 0.03
_WITHIN_SEQUENCE = "within-sequence"


def verdict_of_recording(header: TraceHeader, model: Path, out: Path) -> Verdict:
    """Return how much was recorded."""
    return Verdict(
        answer=(
            f"Recorded {_tokens(header)} in {header.model.num_layers} MoE layers of "
            f"{model}.",
        ),
        next=f"placer advise {quote(str(out))} --gpus-per-node 8",
    )


def verdict_of_validation(header: TraceHeader, path: Path) -> Verdict:
    """Return that a trace is valid: one that is not is an error."""
    number = len(header.chunks)
    return Verdict(
        answer=(
            f"{path} is valid: every hash, tensor and id of {_tokens(header)} in "
            f"{number} {'file' if number == 1 else 'files'} was checked.",
        ),
        next=_inspect(path),
        is_better=True,
    )


def verdict_of_rewriting(
    header: TraceHeader, out: Path, found: Repetition | None = None
) -> Verdict:
    """Return what a trace made from others holds; ``found`` is what was removed."""
    answer = f"{out} holds {_tokens(header)}."
    if found is not None:
        share = found.num_removed / found.num_tokens if found.num_tokens else 0.0
        answer = (
            f"Removed {found.num_removed:,} of {found.num_tokens:,} tokens ({share:.1%}). "
            f"{answer}"
        ).replace("%", " %")
    return Verdict(answer=(answer,), next=_inspect(out))


def verdict_of_links(found: Mapping[str, Links]) -> Verdict:
    """Return how strongly layers of each trace are linked, and how much the topic does."""
    told = tuple(f"{path}: {_linked(one)}" for path, one in found.items())
    return Verdict(answer=told, next=_inspect(Path(next(iter(found)))))


def _linked(found: Links) -> str:
    observed = found.information[0]
    shuffled = next(
        (one for one in found.information if one.control == _WITHIN_SEQUENCE), None
    )
    if observed.top1_corrected is None:
        what = "experts of a token in neighbouring layers share"
        bits, left = observed.pairs, None if shuffled is None else shuffled.pairs
    else:
        what = "first experts of a token in neighbouring layers share"
        bits = observed.top1_corrected
        left = None if shuffled is None else shuffled.top1_corrected
    told = f"{what} {bits:.3f} bits of information (0: no link)."
    if left is None:
        return told
    return (
        f"{told} Of these, {left:.3f} bits come from the topic: they remain when the "
        "tokens of each sequence are shuffled."
    )


def verdict_of_learning(points: Sequence[LearningPoint], solve: str) -> Verdict:
    """Return how many tokens a plan needs.

    Parameters
    ----------
    points
        By ascending tokens; the last is of all of them.
    solve
        The command that makes the plan.
    """
    whole = points[-1]
    enough = whole
    for one in reversed(points):
        if not _as_good(one, whole):
            break
        enough = one
    if enough is whole:
        before = points[-2]
        return Verdict(
            answer=(
                f"More tokens still help: record more. {_judged(before)} {_judged(whole)}",
            ),
            next=solve,
        )
    return Verdict(
        answer=(
            f"{enough.num_tokens:,} tokens are enough. {_judged(enough)} {_judged(whole)}",
        ),
        next=solve,
    )


def _as_good(one: LearningPoint, whole: LearningPoint) -> bool:
    return (
        one.ratio <= whole.ratio + _CLOSE
        and one.load_imbalance_mean <= whole.load_imbalance_mean + _CLOSE
    )


def _judged(one: LearningPoint) -> str:
    return (
        f"A plan from {one.num_tokens:,} tokens sends {change(one.ratio, 1.0)} the "
        "contiguous placement on held-out sequences, and its busiest rank has "
        f"{over_mean(one.load_imbalance_mean)} more load than the mean."
    )


def _tokens(header: TraceHeader) -> str:
    return f"{header.num_tokens:,} tokens of {header.num_sequences:,} sequences"


def _inspect(path: Path) -> str:
    """Return a command that works on every trace; one fold alone cannot be judged."""
    return f"placer inspect {quote(str(path))}"
