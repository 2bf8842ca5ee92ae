"""A simulated plan in words: a verdict for each phase, then the facts."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from placer.planning.judge import PLAN, Judgement
from placer.simulation.batch_figures import BatchFigures, full_batches_note, times
from placer.simulation.cost import PredictedTime

Row = TypeVar("Row", bound=Hashable)
# Times closer than this are the same: no model of a layer is as exact.
_SAME = 0.005
_WORDS = {
    (-1,): "faster than {0}",
    (0,): "as fast as {0}",
    (1,): "slower than {0}",
    (-1, 0): "no slower than {0}",
    (0, 1): "no faster than {0}",
}
_BY_SIZE = "faster than {0} at some batch sizes, slower at others"
#: What a verdict compares a plan with, where they were simulated.
_REFERENCES = ("contiguous", "eplb")


def grouped(named: Iterable[tuple[str | None, Row]]) -> list[tuple[tuple[str, ...], Row]]:
    """Return each value once, with the names that have it, in their order.

    Engines that send the same have the same figures.
    """
    found: dict[Row, list[str]] = {}
    for name, value in named:
        found.setdefault(value, []).extend([] if name is None else [name])
    return [(tuple(names), value) for value, names in found.items()]


def verdict_lines(judgements: Sequence[Judgement]) -> Iterator[tuple[str | None, str]]:
    """Yield an engine and what the plan saves it, for each phase."""
    for one in judgements:
        engine = one.serving.engine
        for text in _verdicts(one):
            yield None if engine is None else engine.name, text


def references(baselines: Iterable[str]) -> list[str]:
    """Return the baselines that a verdict is about: contiguous and EPLB, else all."""
    names = list(baselines)
    return [name for name in _REFERENCES if name in names] or names


def _verdicts(judgement: Judgement) -> Iterator[str]:
    for phase in ("prefill", "decode"):
        places = [n for n, one in enumerate(judgement.shapes) if one.batching == phase]
        if not places:
            continue
        figures = {
            name: [every[n] for n in places] for name, every in judgement.batches.items()
        }
        plan = figures.pop(PLAN)
        others = {name: figures[name] for name in references(figures)}
        parts = [
            *_sent_words(judgement, others),
            *(
                speed_words(name, times(plan), times(other))
                for name, other in others.items()
                if times(plan)
            ),
        ]
        parts.append(_balance_words(plan, others))
        yield f"{phase}: {'; '.join(parts)}"


def speed_words(
    name: str, plan: Sequence[PredictedTime], other: Sequence[PredictedTime]
) -> str:
    """Say whether a plan is faster than another placement, with and without overlap."""
    found = []
    for way in ("total", "overlapped"):
        changes = [
            getattr(one, way) / getattr(base, way) - 1
            for one, base in zip(plan, other, strict=True)
        ]
        signs = sorted({0 if abs(c) < _SAME else 1 if c > 0 else -1 for c in changes})
        percents = " / ".join(f"{100 * change:+.1f}" for change in changes)
        found.append((_WORDS.get(tuple(signs), _BY_SIZE), f"{percents} %"))
    (word, change), (overlapped_word, overlapped) = found
    if word == overlapped_word:
        return f"{word.format(name)} (layer {change}, overlapped {overlapped})"
    return (
        f"{word.format(name)} (layer {change}), with two-batch overlap "
        f"{overlapped_word.format('it')} ({overlapped})"
    )


def _sent_words(judgement: Judgement, others: dict[str, list[BatchFigures]]) -> list[str]:
    if judgement.sent is None:
        return ["every placement sends the same"]
    ratios = [
        f"{judgement.ratios[name].ratio:.3f} of {name}'s"
        for name in others
        if name in judgement.ratios
    ]
    if not ratios:
        return []
    told = f"{judgement.sent.words} {', '.join(ratios)}"
    if judgement.sent_policy != judgement.policy:
        told += f" ({judgement.sent_policy} compared with {judgement.policy})"
    return [told]


def _balance_words(plan: list[BatchFigures], others: dict[str, list[BatchFigures]]) -> str:
    def straggler(figures: list[BatchFigures]) -> str:
        return " / ".join(f"{one.metrics.straggler_mean:.3f}" for one in figures)

    told = ", ".join(f"{name} {straggler(figures)}" for name, figures in others.items())
    beside = f" ({told})" if told else ""
    return f"busiest rank of a batch {straggler(plan)} times the mean load{beside}"


def fact_lines(judgement: Judgement, policies: Sequence[str]) -> Iterator[str]:
    """Yield one line for each fact that explains the figures, or is not in them.

    ``policies`` are those that are shown.
    """
    yield (
        f"{judgement.num_tokens:,} tokens of {judgement.num_sequences:,} sequences, "
        f"{judgement.num_layers} MoE layers, top-{judgement.top_k}, "
        f"{judgement.num_ranks} ranks"
    )
    judged = full_batches_note(judgement.shapes, judgement.num_tokens, judgement.num_ranks)
    if judged is not None:
        yield judged
    engine, wire = judgement.serving.engine, judgement.wire
    if engine is not None:
        ways = (wire.dispatch, wire.combine)
        dispatch, combine = (f"{way.exchange} in {way.element}" for way in ways)
        yield f"{engine.name}: dispatch {dispatch}, combine {combine}"
        yield f"under fixed, {wire.effect('fixed').reason}"
    if wire.has_replicas:
        yield f"replica choice: {wire.replica_choice}"
    if judgement.sent is not None:
        policy, sent_policy = judgement.policy, judgement.sent_policy
        beside = "" if policy == sent_policy else f" under {policy}"
        for name, ratio in judgement.ratios.items():
            yield (
                f"under {sent_policy}, {judgement.sent.words}: "
                f"the plan has {ratio.words(name + beside)}"
            )
    if "follow" in policies:
        yield (
            "follow also sends the keys and values of every layer to all other "
            f"{judgement.num_ranks - 1} ranks: not counted"
        )
    if "token" in policies:
        moved = 2 * (judgement.num_ranks - 1) / judgement.num_ranks
        yield (
            f"token also moves {moved:.2f} hidden states per token and layer in the "
            "reduce-scatter and all-gather of attention-TP: not counted"
        )
