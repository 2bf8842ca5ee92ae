"""The contents of what placer reads and writes, as facts, tables and charts.

Legend of the shapes: L MoE layers, E logical experts of a layer, R ranks, V token ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from placer.affinity import Affinity, count_affinity
from placer.arrays import AnyArray, IntArray
from placer.model import ModelSpec
from placer.placement import Plan
from placer.report.artifact import Artifact
from placer.report.beside import Beside, beside_recorded
from placer.report.chart import Section
from placer.report.checkpoint import Checkpoint
from placer.report.counts_charts import charts_of_counts
from placer.report.headline import (
    headline_of_affinity,
    headline_of_checkpoint,
    headline_of_table,
    headline_of_trace,
    information,
)
from placer.report.other_charts import chart_of_bytes, charts_of_table
from placer.report.plan_summary import model_facts, summarize_plan
from placer.report.results_report import summarize_result
from placer.report.statistics import TraceStatistics, distinct_rows, skew
from placer.report.summary import Summary
from placer.table import Table

_QUANTILES = (0.1, 0.5, 0.9)
# Those with most tokens are drawn.
_MOST_DOMAINS = 5


def summarize(artifact: Artifact) -> Summary:
    """Return what an artifact holds, and what a page draws of it."""
    match artifact:
        case TraceStatistics():
            return _summarize_trace(artifact)
        case Affinity():
            return _summarize_affinity(artifact)
        case Plan():
            return summarize_plan(beside_recorded(artifact, {}))
        case Beside():
            return summarize_plan(artifact)
        case Table():
            return _summarize_table(artifact)
        case Checkpoint():
            return _summarize_checkpoint(artifact)
    return summarize_result(artifact)


def _summarize_trace(statistics: TraceStatistics) -> Summary:
    trace, lengths = statistics.trace, statistics.sequence_lengths
    with_ids = "token_ids" in statistics.tensors
    facts = model_facts(trace.model) | {
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
    counted = count_affinity(trace.chunks(), trace.model, {})
    choices = [("all tokens", tuple(load))]
    if len(statistics.domains) > 1:
        most = np.argsort(-statistics.domain_tokens, kind="stable")[:_MOST_DOMAINS]
        choices += [
            (
                f"domain {statistics.domains[number]}",
                tuple(by_domain[number] for by_domain in statistics.load),
            )
            for number in most
        ]
    return Summary(
        kind="trace",
        headline=headline_of_trace(statistics, counted),
        facts=facts,
        sections=sections,
        charts=charts_of_counts(choices, counted),
    )


def _summarize_affinity(affinity: Affinity) -> Summary:
    bits = information(affinity)
    facts = model_facts(affinity.model) | {
        "num_tokens": affinity.known_tokens,
        "loads_alone": not affinity.has_links,
        "token_expert_pairs": int(sum(load.sum() for load in affinity.load)),
        "transition_pairs": int(sum(pairs.sum() for pairs in affinity.transition)),
        "coactivated_pairs": int(sum(pairs.sum() for pairs in affinity.coactivation)) // 2,
        "mutual_information_bits": float(np.mean(bits)) if bits else None,
        "num_token_ids": _used_rows(affinity.token_expert),
        "num_sequences": _used_rows(affinity.sequence_expert),
        "provenance": dict(affinity.provenance),
    }
    layers = _load_section(
        affinity.model,
        affinity.load,
        {"mutual information with the next layer (bits)": [*bits, None]}
        if affinity.has_links
        else {},
    )
    return Summary(
        kind="affinity",
        headline=headline_of_affinity(affinity),
        facts=facts,
        sections=(layers,),
        charts=charts_of_counts([("all tokens", affinity.load)], affinity),
    )


def _summarize_table(table: Table) -> Summary:
    chance = 1 / table.num_ranks
    tokens = table.token_confidence[:, distinct_rows(table)]
    histories = table.history_confidence[table.lookback :]
    facts = model_facts(table.model) | {
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
    return Summary(
        kind="table",
        headline=headline_of_table(table),
        facts=facts,
        sections=(layers,),
        charts=charts_of_table(table),
    )


def _summarize_checkpoint(checkpoint: Checkpoint) -> Summary:
    facts = model_facts(checkpoint.model) | {
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
    return Summary(
        kind="checkpoint",
        headline=headline_of_checkpoint(checkpoint),
        facts=facts,
        sections=(groups,),
        charts=(chart_of_bytes(checkpoint),),
    )


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
