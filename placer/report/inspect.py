"""The contents of a trace, affinity, plan, table or checkpoint, as facts and tables.

Legend of the shapes: L MoE layers, E logical experts of a layer, R ranks, V token ids.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placer.affinity import Affinity
from placer.arrays import AnyArray, IntArray
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.placement.placement import rank_load
from placer.report.artifact import Artifact
from placer.report.checkpoint import Checkpoint
from placer.report.comparison import comparison_table
from placer.report.statistics import (
    TraceStatistics,
    distinct_rows,
    mutual_information,
    skew,
)
from placer.simulation.sent import Wire
from placer.table import Table

_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A table: its title, columns and rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What an artifact holds.

    Attributes
    ----------
    kind
        ``trace``, ``affinity``, ``plan``, ``table`` or ``checkpoint``.
    facts
        One value per name.
    sections
        Tables, such as one row per MoE layer.
    """

    kind: str
    facts: Mapping[str, Any]
    sections: tuple[Section, ...]

    def flat_facts(self) -> dict[str, Any]:
        """Return the facts, those of an object under dotted names."""
        return dict(_flat(self.facts))

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON values: rows as objects, tables by their title."""
        return {
            "kind": self.kind,
            "facts": dict(self.facts),
            "tables": {
                section.title: [
                    dict(zip(section.columns, row, strict=True)) for row in section.rows
                ]
                for section in self.sections
            },
        }


def summarize(artifact: Artifact, load: Sequence[IntArray] | None = None) -> Summary:
    """Return what an artifact holds.

    Parameters
    ----------
    artifact
        What to look at.
    load
        L arrays ``[E]``: for a plan, the pairs per expert whose rank loads are counted.
    """
    match artifact:
        case TraceStatistics():
            return _summarize_trace(artifact)
        case Affinity():
            return _summarize_affinity(artifact)
        case Plan():
            return _summarize_plan(artifact, load)
        case Table():
            return _summarize_table(artifact)
        case Checkpoint():
            return _summarize_checkpoint(artifact)


def _summarize_trace(statistics: TraceStatistics) -> Summary:
    trace, lengths = statistics.trace, statistics.sequence_lengths
    with_ids = "token_ids" in statistics.tensors
    facts = _model_facts(trace.model) | {
        "num_tokens": trace.header.num_tokens,
        "num_sequences": trace.header.num_sequences,
        "tokens_per_sequence": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "max": int(lengths.max()),
        },
        "num_decode_tokens": statistics.num_decode_tokens,
        "recorded": list(statistics.tensors),
        "experts_by_weight": trace.header.experts_by_weight,
        "unknown_token_ids": trace.header.num_tokens - statistics.num_known_tokens
        if with_ids
        else None,
        "distinct_token_ids": statistics.num_distinct_tokens if with_ids else None,
        "repeated_tokens": statistics.num_repeated_tokens,
        "repeated_sequences": statistics.num_repeated_sequences,
        "num_chunks": len(trace.header.chunks),
        "sha256": trace.sha256,
        "provenance": dict(trace.header.provenance),
    }
    load = [by_domain.sum(axis=0) for by_domain in statistics.load]
    domains = Section(
        title="domains",
        columns=("domain", "sequences", "tokens", "share of tokens"),
        rows=tuple(
            (name, int(sequences), int(tokens), float(tokens) / trace.header.num_tokens)
            for name, sequences, tokens in zip(
                statistics.domains,
                statistics.domain_sequences,
                statistics.domain_tokens,
                strict=True,
            )
        ),
    )
    layers = _load_section(trace.model, load)
    sections = (domains, layers) if trace.header.domains else (layers,)
    return Summary(kind="trace", facts=facts, sections=sections)


def _summarize_affinity(affinity: Affinity) -> Summary:
    information = [mutual_information(pairs) for pairs in affinity.transition]
    facts = _model_facts(affinity.model) | {
        "num_tokens": affinity.known_tokens,
        "loads_alone": not affinity.has_links,
        "token_expert_pairs": int(sum(load.sum() for load in affinity.load)),
        "transition_pairs": int(sum(pairs.sum() for pairs in affinity.transition)),
        "coactivated_pairs": int(sum(pairs.sum() for pairs in affinity.coactivation)) // 2,
        "mutual_information_bits": float(np.mean(information)) if information else None,
        "num_token_ids": _used_rows(affinity.token_expert),
        "num_sequences": _used_rows(affinity.sequence_expert),
        "provenance": dict(affinity.provenance),
    }
    layers = _load_section(
        affinity.model,
        affinity.load,
        {"mutual information with the next layer (bits)": [*information, None]}
        if affinity.has_links
        else {},
    )
    return Summary(kind="affinity", facts=facts, sections=(layers,))


def _summarize_plan(plan: Plan, load: Sequence[IntArray] | None) -> Summary:
    placement, solver = plan.placement, plan.solver
    # An imported map says nothing of what a solve decides.
    is_solved = solver.status != "imported"
    rows = placement.physical_to_logical_map
    moved = [
        float(
            (
                placement.expert_rank(n) != np.arange(size) * placement.num_ranks // size
            ).mean()
        )
        for n, size in enumerate(placement.num_experts)
    ]
    facts = _model_facts(plan.model) | {
        "num_ranks": placement.num_ranks,
        "num_nodes": placement.num_nodes,
        "slots_per_rank": _one_or_list([len(row) // placement.num_ranks for row in rows]),
        "redundant_experts": _one_or_list(
            [len(row) - size for row, size in zip(rows, placement.num_experts, strict=True)]
        ),
        "policy": plan.policy if is_solved else None,
        "exchange": plan.exchange if is_solved else None,
        "max_imbalance": plan.max_imbalance if is_solved else None,
        "status": solver.status,
        "objective": solver.objective if is_solved else None,
        "objective_name": solver.objective_name if is_solved else None,
        "bound": solver.bound,
        "gap": solver.gap,
        "bound_method": solver.bound_method if is_solved else None,
        "pairs_gap": None if solver.pairs is None else solver.pairs.gap,
        "seed": solver.seed if is_solved else None,
        "reproducible": solver.reproducible if is_solved else None,
        "experts_off_contiguous_rank": float(np.mean(moved)),
        "provenance": dict(plan.provenance),
    }
    relaxed = Section(
        title="layers whose load cap was relaxed",
        columns=("layer", "max/mean rank load"),
        rows=tuple((int(n), value) for n, value in solver.relaxed_layers.items()),
    )
    relaxed_receive = Section(
        title="layers whose cap on received copies was relaxed",
        columns=("layer", "copies per token to the busiest rank, times R"),
        rows=tuple((int(n), value) for n, value in solver.relaxed_receive_layers.items()),
    )
    sections = _metric_sections(plan)
    sections += [one for one in (relaxed, relaxed_receive) if one.rows]
    if load is not None:
        sections.append(_rank_load_section(placement, load))
    return Summary(kind="plan", facts=facts, sections=tuple(sections))


def _rank_load_section(placement: Placement, load: Sequence[IntArray]) -> Section:
    """Return one row per MoE layer: max/mean rank load, and what makes the busiest rank so.

    Experts are shown with their share of that rank's load, the largest first: as many as
    have most of it, at most five.
    """
    rows = []
    for layer, counts in enumerate(load):
        loads = rank_load(placement, layer, counts)
        ratio = skew(loads)
        busiest = int(ratio.argmax())
        held = placement.holds(layer)
        served = counts * held[:, busiest] / held.sum(axis=1)
        share = served / max(float(loads[busiest]), 1.0)
        order = np.argsort(-share, kind="stable")
        largest = order[: min(int(np.searchsorted(share[order].cumsum(), 0.5)) + 1, 5)]
        rows.append(
            (
                layer,
                float(ratio.max()),
                float(ratio.min()),
                busiest,
                " ".join(map(str, np.flatnonzero(held[:, busiest]))),
                " ".join(f"{expert} ({share[expert]:.0%})" for expert in largest),
            )
        )
    return Section(
        title="rank load per MoE layer",
        columns=(
            *("layer", "max/mean", "min/mean", "busiest rank"),
            *("experts there", "most of its load"),
        ),
        rows=tuple(rows),
    )


def _metric_sections(plan: Plan) -> list[Section]:
    """Compare the plan with its baselines, and its profile with held-out tokens."""
    profile, heldout = plan.metrics["profile"], plan.metrics["heldout"]
    own = heldout or profile
    if own is None:
        return []
    judged = "held-out sequences" if heldout else "the profile (no sequences were held out)"
    columns, rows = comparison_table(
        {**plan.metrics["baselines"], "placer": own},
        list(own),
        Wire.of(plan, plan.engine),
    )
    beside = Section(
        title=f"on {judged}", columns=columns, rows=tuple(tuple(row) for row in rows)
    )
    if not heldout:
        return [beside]
    both = Section(
        title=f"profile and held out, policy {plan.policy}",
        columns=("metric", "profile", "held out"),
        rows=tuple(
            (name, value, heldout[plan.policy].get(name))
            for name, value in profile[plan.policy].items()
        ),
    )
    return [beside, both]


def _summarize_table(table: Table) -> Summary:
    chance = 1 / table.num_ranks
    tokens = table.token_confidence[:, distinct_rows(table)]
    histories = table.history_confidence[table.lookback :]
    facts = _model_facts(table.model) | {
        "num_ranks": table.num_ranks,
        "num_nodes": table.num_nodes,
        "num_token_ids": table.vocab_size,
        "num_distinct_token_rows": tokens.shape[1],
        "lookback": table.lookback,
        "num_histories": int(table.history_rank.shape[1]),
        "chance": chance,
        "median_token_confidence": _median(tokens),
        "median_history_confidence": _median(histories),
        "has_token_score": table.token_score is not None,
        "has_combined_rule": table.combined is not None,
        "plan_sha256": table.plan_sha256,
        "trace_sha256": table.trace_sha256,
        "tokenizer_sha256": table.tokenizer_sha256,
        "provenance": dict(table.provenance),
    }
    names = [f"{what} {q:.0%}" for what in ("token", "history") for q in _QUANTILES]
    layers = Section(
        title="confidence, quantiles over distinct token rows and over histories",
        columns=("layer", *names),
        rows=tuple(
            (
                layer,
                *_quantiles(tokens[layer]),
                *(
                    _quantiles(table.history_confidence[layer])
                    if layer >= table.lookback
                    else [None] * len(_QUANTILES)
                ),
            )
            for layer in range(table.model.num_layers)
        ),
    )
    return Summary(kind="table", facts=facts, sections=(layers,))


def _summarize_checkpoint(checkpoint: Checkpoint) -> Summary:
    facts = _model_facts(checkpoint.model) | {
        "num_shards": checkpoint.num_shards,
        "num_bytes": checkpoint.num_bytes,
        "left_out_by_export": [path.as_posix() for path in checkpoint.left_out],
        "exported_by_placer": checkpoint.record is not None,
    }
    if checkpoint.record is not None:
        facts["plan_sha256"] = checkpoint.record.get("plan_sha256")
        facts["exported_with"] = checkpoint.record.get("placer")
    groups = Section(
        title="tensors",
        columns=("group", "tensors", "dtype", "bytes", "share"),
        rows=tuple(
            (
                name,
                group.num_tensors,
                ", ".join(group.dtypes) or "-",
                group.num_bytes,
                group.num_bytes / max(checkpoint.num_bytes, 1),
            )
            for name, group in checkpoint.groups.items()
        ),
    )
    return Summary(kind="checkpoint", facts=facts, sections=(groups,))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the plain values inside an object, under dotted names."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        for number, part in enumerate(value):
            yield from _flat(part, f"{name}.{number}")
    else:
        yield name, value


def _model_facts(model: ModelSpec) -> dict[str, Any]:
    return {
        "model": model.id,
        "model_type": model.model_type,
        "fingerprint": model.fingerprint,
        "num_layers": model.num_layers,
        "num_experts": _one_or_list(model.num_experts),
        "top_k": model.top_k or None,
    }


def _load_section(
    model: ModelSpec,
    loads: Sequence[IntArray],
    more: Mapping[str, Sequence[object]] | None = None,
) -> Section:
    """Return one row per MoE layer: how unevenly its experts are used."""
    more = more or {}
    rows = []
    for layer, load in enumerate(loads):
        ratio = skew(load)
        rows.append(
            (
                layer,
                None if model.layer_ids is None else model.layer_ids[layer],
                len(load),
                float(ratio.max()),
                float(ratio.min()),
                int(np.count_nonzero(load == 0)),
                *(values[layer] for values in more.values()),
            )
        )
    columns = ("layer", "model layer", "experts", "busiest/mean", "idlest/mean", "unused")
    return Section(title="load per MoE layer", columns=(*columns, *more), rows=tuple(rows))


def _used_rows(rows: Sequence[Any] | None) -> int | None:
    """Return how many ids of sparse rows were counted at all."""
    return None if rows is None else int(np.count_nonzero(np.diff(rows[0].indptr)))


def _median(values: AnyArray) -> float | None:
    return float(np.median(values.astype(np.float32))) if values.size else None


def _quantiles(values: AnyArray) -> tuple[float, ...]:
    return tuple(float(q) for q in np.quantile(values.astype(np.float32), _QUANTILES))


def _one_or_list(values: Sequence[int]) -> int | list[int]:
    """Shorten the counts of a uniform model to one figure."""
    return values[0] if len(set(values)) == 1 else list(values)
