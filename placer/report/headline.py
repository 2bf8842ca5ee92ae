"""What a report says first: a verdict, a few numbers, and what misleads.

Every number of a headline is also in the tables that ``placer inspect --json`` prints.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placer.affinity import Affinity
from placer.affinity.information import information_by_chance, mutual_information
from placer.planning.engine_options import loads_map
from placer.report.beside import Beside, Judged
from placer.report.chart import CONTIGUOUS, EPLB, PLACER
from placer.report.checkpoint import Checkpoint
from placer.report.statistics import TraceStatistics, distinct_rows, skew
from placer.table import Table

# Less of a difference than this is none.
_SAME = 0.0005
# The share of a link that may come from few tokens alone, without a word.
_FEW_TOKENS = 0.2
# A trace shows loads, locality and traffic of each rank.
_ON_A_TRACE = "placer inspect PLAN TRACE --html REPORT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A number of the top screen.

    Attributes
    ----------
    title, unit
        What it is, in words.
    before, after
        ``before`` is the contiguous placement's; ``None`` where nothing came before.
    """

    title: str
    unit: str
    after: float
    before: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {
            "title": self.title,
            "unit": self.unit,
            "before": self.before,
            "after": self.after,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The top screen.

    Attributes
    ----------
    verdict
        One or two sentences.
    tiles
        Up to three numbers.
    misleading
        A sentence on each thing that makes the figures say less than they seem to.
    next
        The command to run next, or ``None``.
    """

    verdict: str
    tiles: tuple[Tile, ...]
    misleading: tuple[str, ...] = ()
    next: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {
            "verdict": self.verdict,
            "tiles": [tile.to_json() for tile in self.tiles],
            "misleading": list(self.misleading),
            "next": self.next,
        }


#: What sentences call the placements that a plan is judged against.
REFERENCES = {CONTIGUOUS: "the contiguous placement", EPLB: "EPLB with as many slots"}


def change(ours: float, theirs: float) -> str:
    """Return how much one number is of another: ``12.9 % less than``."""
    if not theirs:
        return "as much as" if not ours else "more than"
    share = ours / theirs - 1
    if abs(share) < _SAME:
        return "as much as"
    return f"{abs(share):.1%} ".replace("%", " %") + (
        "less than" if share < 0 else "more than"
    )


def busiest_rank(ours: float, others: Mapping[str, float]) -> str:
    """Say how busy the busiest rank of a plan is, and that of other placements."""
    than = ", ".join(
        f"{'EPLB' if name == EPLB else name} {over_mean(load)}"
        for name, load in others.items()
    )
    return (
        f"Over all tokens, its busiest rank has {over_mean(ours)} more load than the mean"
        + (f" ({than})." if than else ".")
    )


def enumerated(parts: Sequence[str]) -> str:
    """Return ``one, two and three``."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def over_mean(ratio: float) -> str:
    """Return the load of the busiest rank over the mean as a percentage."""
    return f"{100 * (ratio - 1):.1f} %"


def headline_of_plan(beside: Beside) -> Headline:
    """Return what a plan changes, against contiguous and EPLB."""
    placed = beside.plan.placement
    slots = [len(row) / placed.num_ranks for row in placed.physical_to_logical_map]
    memory = Tile(
        title="Memory: experts that each rank holds",
        unit="slots per rank and layer, mean over layers",
        before=float(np.mean(placed.num_experts)) / placed.num_ranks,
        after=float(np.mean(slots)),
    )
    own, base = beside.judged.get(PLACER), beside.judged.get(CONTIGUOUS)
    if own is None:
        return Headline(
            verdict=f"This plan places the experts of {placed.num_layers} MoE layers on "
            f"{placed.num_ranks} ranks. It holds no measurement.",
            tiles=(memory,),
            misleading=tuple(_misleading(beside)),
            next=_ON_A_TRACE,
        )
    tiles = []
    if beside.sent is not None and own.sent is not None:
        tiles.append(
            Tile(
                title=f"What is sent: {beside.sent.words.replace(' sent', '')}",
                unit="per token and layer",
                before=None if base is None else base.sent,
                after=own.sent,
            )
        )
    tiles.append(
        Tile(
            title="Busiest rank",
            unit="times the mean load over all tokens, mean over layers",
            before=None if base is None else base.imbalance,
            after=own.imbalance,
        )
    )
    return Headline(
        verdict=_plan_verdict(beside, own),
        tiles=(*tiles, memory),
        misleading=tuple(_misleading(beside)),
        next=_ON_A_TRACE if beside.served is None else None,
    )


def _plan_verdict(beside: Beside, own: Judged) -> str:
    titles = REFERENCES | {name: name for name in beside.other_plans}
    others = {n: beside.judged[n] for n in titles if n in beside.judged}
    begin = f"On {beside.tokens}, "
    if beside.sent is None or own.sent is None:
        sent = f"{begin}every placement sends the same."
    else:
        parts = [
            f"{change(own.sent, one.sent)} {titles[name]}"
            for name, one in others.items()
            if one.sent is not None
        ]
        told = enumerated(parts) or f"{own.sent:.3f} per token and layer"
        sent = f"{begin}this plan sends {told} ({beside.sent.words})."
    load = " " + busiest_rank(
        own.imbalance, {name: one.imbalance for name, one in others.items()}
    )
    moved = "".join(
        f" To change from {name} to it, ranks load {others[name].moved:,} experts."
        for name in beside.other_plans
    )
    return sent + load + moved


def _misleading(beside: Beside) -> Iterator[str]:
    plan, solver = beside.plan, beside.plan.solver
    yield from (f"{text[0].upper()}{text[1:]}." for text in beside.warnings)
    if beside.tokens is not None and not beside.is_heldout:
        yield (
            "Not held out: the plan was solved on these tokens, or does not say on which. "
            "The figures may be too good."
        )
    caps = solver.eplb_caps
    missed = {*solver.relaxed_layers, *solver.above_eplb_layers}
    if missed:
        asked = "EPLB's load" if caps is not None else f"{plan.max_imbalance:g}"
        yield (
            f"Load cap missed on the profile in {len(missed)} of "
            f"{plan.placement.num_layers} MoE layers (the cap is {asked})."
        )
    own, engine = beside.judged.get(PLACER), plan.engine
    given = plan.provenance.get("max_imbalance_given", True) and solver.status != "imported"
    if (
        beside.is_heldout
        and own is not None
        and given
        and own.imbalance > plan.max_imbalance
    ):
        yield (
            f"Load cap missed on these tokens: the busiest rank has {own.imbalance:.3f} "
            f"times the mean load, the cap is {plan.max_imbalance:g}."
        )
    replicas = plan.placement.has_replicas
    if engine is not None and replicas and not loads_map(engine, plan.model):
        yield (
            f"{engine.name} loads no map of this model, so it cannot serve the plan's "
            "replicas."
        )


def headline_of_trace(statistics: TraceStatistics, affinity: Affinity) -> Headline:
    """Return how uneven and how linked the experts of a trace are."""
    header, model = statistics.trace.header, statistics.trace.model
    return _headline_of_counts(
        f"{header.num_tokens:,} tokens of {header.num_sequences:,} sequences, "
        f"{model.num_layers} MoE layers.",
        affinity,
        header.num_tokens,
        _trace_doubts(statistics),
    )


def headline_of_affinity(affinity: Affinity) -> Headline:
    """Return how uneven and how linked the experts of an affinity file are."""
    known = affinity.known_tokens
    whole = f"{known:,} tokens, " if known else ""
    return _headline_of_counts(
        f"{whole}{affinity.model.num_layers} MoE layers.", affinity, known, ()
    )


def _headline_of_counts(
    begin: str, affinity: Affinity, tokens: int | None, doubts: tuple[str, ...]
) -> Headline:
    busiest = float(np.mean([skew(load).max() for load in affinity.load]))
    verdict = (
        f"{begin} The busiest expert of a layer has {busiest:.2f} times the mean load."
    )
    tiles = [
        Tile(title="Busiest expert", unit="times the mean, mean over layers", after=busiest)
    ]
    if tokens is not None:
        tiles.insert(0, Tile(title="Recorded", unit="tokens", after=tokens))
    bits = information(affinity)
    if bits:
        mean = float(np.mean(bits))
        verdict += (
            f" An expert of a token gives {mean:.3f} bits about one of its experts in the "
            "next layer (0: no link)."
        )
        by_chance = float(np.mean([information_by_chance(p) for p in affinity.transition]))
        if by_chance > _FEW_TOKENS * mean:
            doubts += (
                f"Few tokens for so many experts: layers without any link would show "
                f"{by_chance:.3f} bits too.",
            )
        tiles.append(
            Tile(
                title="Link to the next layer",
                unit="bits of mutual information, mean over layers",
                after=mean,
            )
        )
    return Headline(
        verdict=verdict,
        tiles=tuple(tiles),
        misleading=doubts,
        next="placer advise TRACE --gpus-per-node M",
    )


def _trace_doubts(statistics: TraceStatistics) -> tuple[str, ...]:
    repeated, total = statistics.num_repeated_tokens, statistics.trace.header.num_tokens
    if repeated * 10 < total:
        return ()
    return (
        f"{repeated:,} of {total:,} tokens repeat the experts of another token in all "
        "layers: text that occurs twice makes held-out figures too good. See placer trace "
        "dedup.",
    )


def information(affinity: Affinity) -> list[float]:
    """Return the mutual information of each layer with the next, in bits."""
    return [mutual_information(pairs) for pairs in affinity.transition]


def headline_of_table(table: Table) -> Headline:
    """Return how sure a table is of the home of a token."""
    rows = table.token_confidence[:, distinct_rows(table)].astype(np.float32)
    median, chance = float(np.median(rows)), 1 / table.num_ranks
    return Headline(
        verdict=f"A token's home in this table is expected to serve {median:.1%} of its "
        f"experts (median over token ids and layers). A random home serves "
        f"{chance:.1%}.".replace("%", " %"),
        tiles=(
            Tile(
                title="Experts served at home",
                unit="share, median over distinct token rows and layers",
                before=chance,
                after=median,
            ),
        ),
    )


def headline_of_checkpoint(checkpoint: Checkpoint) -> Headline:
    """Return how much of a checkpoint a placement reorders."""
    moved = sum(
        group.num_bytes
        for name, group in checkpoint.groups.items()
        if name in ("experts", "router")
    )
    whole = max(checkpoint.num_bytes, 1)
    wrote = "wrote" if checkpoint.record is not None else "did not write"
    size, unit = (whole / 1e9, "GB") if whole >= 1e9 else (whole / 1e6, "MB")
    return Headline(
        verdict=f"A placement reorders {moved / whole:.1%} of this checkpoint's "
        f"{size:,.1f} {unit}: its experts and routers. placer {wrote} it.".replace(
            "%", " %"
        ),
        tiles=(
            Tile(title="Checkpoint", unit="bytes", after=checkpoint.num_bytes),
            Tile(
                title="Experts and routers", unit="share of the bytes", after=moved / whole
            ),
        ),
    )
