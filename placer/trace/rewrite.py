"""Traces made from traces: parts, unions and samples, chunk by chunk."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from placer.arrays import IntArray
from placer.errors import PlacerError, UsageError
from placer.model import Combination
from placer.trace.chunk import Chunk
from placer.trace.header import AGAIN, MAX_DOMAINS, TraceHeader
from placer.trace.reader import Trace
from placer.trace.selection import EVERYTHING, Selection
from placer.trace.writer import TraceWriter
from placer.version import __version__

_OPTIONAL = ("weights", "token_ids", "domain_ids", "phase", "step_ids")


def validate_trace(trace: Trace) -> TraceHeader:
    """Check every chunk: hashes, format, ids, and that chunks fit together.

    All hold the same tensors, and a sequence id is in only one of them.

    Raises
    ------
    PlacerError
        If a chunk is damaged or breaks the format, by name.
    """
    found: list[IntArray] = []
    expected: set[str] = set()
    infos = [info for info in trace.header.chunks if info.num_tokens]
    for info, chunk in zip(infos, trace.chunks(), strict=True):
        ids = np.unique(chunk.sequence_ids)
        if len(ids) != info.num_sequences:
            raise PlacerError(
                f"{trace.directory / info.file} holds {len(ids)} sequences, "
                f"but trace.json says {info.num_sequences}",
                AGAIN,
            )
        names = set(chunk.tensors())
        odd = names ^ (expected or names)
        if odd:
            raise PlacerError(
                f"{trace.directory / info.file} and the chunks before hold different "
                f"tensors: {', '.join(sorted(odd))}",
                AGAIN,
            )
        expected = names
        found.append(ids)
    _require_apart(found, [trace.directory / info.file for info in infos])
    return trace.header


def _require_apart(found: Sequence[IntArray], files: Sequence[Path]) -> None:
    """Refuse a sequence id that two chunks have, given those of each, ascending."""
    if not found:
        return
    ids = np.concatenate(found)
    ordered = np.sort(ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        place = int(np.flatnonzero(ids == twice[0])[1])
        ends = np.cumsum([len(one) for one in found])
        file = files[int(np.searchsorted(ends, place, side="right"))]
        raise PlacerError(
            f"sequence {twice[0]} of {file} is in an earlier chunk too", AGAIN
        )


def split_trace(
    trace: Trace,
    out: Path,
    *,
    selection: Selection = EVERYTHING,
    domain: str | None = None,
    period: str | None = None,
) -> TraceHeader:
    """Write the tokens of a fold, a phase, a domain or a period, or of several.

    Ids and positions are kept.

    Parameters
    ----------
    trace
        The trace to split.
    out
        Where to write.
    selection
        Only these tokens.
    domain
        Only this domain.
    period
        ``K/N``: only period K of N, counted from 0, of about equal tokens, in the order
        in which the trace was recorded. A sequence belongs to the period it begins in.

    Raises
    ------
    UsageError
        If none is given, or the trace has no such domain or period.
    PlacerError
        If no sequence is left, or the trace is damaged.
    """
    if selection == EVERYTHING and domain is None and period is None:
        raise UsageError(
            "nothing to split by",
            "give --fold K/N, --phase NAME, --domain NAME or --period K/N",
        )
    domains = trace.header.domains
    if domain is not None and domain not in domains:
        raise UsageError(
            f"{trace.directory} has no domain {domain!r}",
            f"its domains: {', '.join(domains) or 'none'}",
        )

    def parts() -> Iterator[Chunk]:
        chunks = trace.chunks() if period is None else _period(trace, period)
        for chunk in chunks:
            kept = selection.keep(chunk)
            if domain is not None:
                # Without labels nothing is of the domain.
                labels = chunk.domain_ids
                kept &= labels is not None and labels == domains.index(domain)
            yield chunk.select(kept)

    made = {**selection.to_json(), "domain": domain, "period": period}
    return write_derived(trace, out, parts(), {"source": "split", **made})


def _period(trace: Trace, text: str) -> Iterator[Chunk]:
    number, slash, parts = text.partition("/")
    whole = slash and number.isdecimal() and parts.isdecimal()
    if not whole or not int(number) < int(parts) < 2**31:
        raise UsageError(
            f"a period is K/N with 0 <= K < N, got {text!r}",
            "for example --period 0/2, the first half",
        )
    total, before = trace.header.num_tokens, 0
    for chunk in trace.chunks():
        _, starts, lengths = np.unique(
            chunk.sequence_ids, return_index=True, return_counts=True
        )
        of_sequence = (before + starts) * int(parts) // total
        yield chunk.select(np.repeat(of_sequence == int(number), lengths))
        before += chunk.num_tokens


def sample_trace(trace: Trace, out: Path, num_sequences: int, seed: int) -> TraceHeader:
    """Write this many sequences, drawn at random without replacement; ids are kept.

    Raises
    ------
    UsageError
        If there are not so many, or none are requested.
    """
    ids = np.concatenate([np.unique(chunk.sequence_ids) for chunk in trace.chunks()])
    if not 1 <= num_sequences <= len(ids):
        raise UsageError(
            f"{num_sequences} sequences requested, but {trace.directory} has {len(ids)}",
            f"give --sequences from 1 to {len(ids)}",
        )
    chosen = np.random.default_rng(seed).choice(ids, num_sequences, replace=False)
    parts = (c.select(np.isin(c.sequence_ids, chosen)) for c in trace.chunks())
    made = {"source": "sample", "sequences": num_sequences, "seed": seed}
    return write_derived(trace, out, parts, made)


def merge_traces(
    traces: Sequence[Trace], out: Path, warn: Callable[[str], None] = lambda _: None
) -> TraceHeader:
    """Write all tokens of traces of one model as one trace.

    Sequences are renumbered: those of a later trace follow those of the earlier ones, by
    an offset that the provenance records. What not all traces hold is left out. ``warn``
    takes a warning where one does not say which model or tokenizer it is of.

    Raises
    ------
    UsageError
        If the traces are of different models or tokenizers, or one is given twice.
    PlacerError
        If they have too many domains or sequences in all.
    """
    both = Combination(warn)
    for trace in traces:
        both.add(str(trace.directory), trace.model, trace.tokenizer_sha256)
    if len({trace.sha256 for trace in traces}) < len(traces):
        raise UsageError(
            "one trace is given twice, so its tokens would count twice",
            "give each trace once",
        )
    domains = tuple(dict.fromkeys(d for trace in traces for d in trace.header.domains))
    if len(domains) > MAX_DOMAINS:
        raise PlacerError(
            f"{len(domains)} domains in all, a trace holds at most {MAX_DOMAINS}"
        )
    shared = _shared_fields(traces)
    offsets = [0]
    for trace in traces:
        last = max(int(chunk.sequence_ids[-1]) for chunk in trace.chunks())
        offsets.append(offsets[-1] + last + 1)
    if offsets[-1] > 2**31:
        raise PlacerError(
            f"renumbered, sequence ids go up to {offsets[-1] - 1}, beyond int32",
            "merge fewer traces, or import those with smaller sequence ids",
        )

    def parts() -> Iterator[Chunk]:
        for trace, offset in zip(traces, offsets, strict=False):
            place = np.asarray([domains.index(d) for d in trace.header.domains], np.uint8)
            for chunk in trace.chunks():
                fields: dict[str, Any] = {
                    name: getattr(chunk, name) if name in shared else None
                    for name in _OPTIONAL
                }
                if fields["domain_ids"] is not None:
                    fields["domain_ids"] = place[fields["domain_ids"]]
                ids = (chunk.sequence_ids + np.int64(offset)).astype(np.int32)
                yield replace(chunk, sequence_ids=ids, **fields)

    made = {
        "source": "merge",
        "traces": [
            {"sha256": trace.sha256, "sequence_offset": offset}
            for trace, offset in zip(traces, offsets, strict=False)
        ],
        "tokenizer_sha256": both.tokenizer_sha256,
    }
    by_weight = all(trace.header.experts_by_weight for trace in traces)
    return write_derived(
        traces[0],
        out,
        parts(),
        made,
        model=both.model,
        domains=domains,
        experts_by_weight=by_weight,
    )


def _shared_fields(traces: Sequence[Trace]) -> set[str]:
    shared = set(_OPTIONAL)
    for trace in traces:
        chunk = next(trace.chunks())
        shared &= {name for name in _OPTIONAL if getattr(chunk, name) is not None}
    return shared


def write_derived(
    trace: Trace,
    out: Path,
    chunks: Iterable[Chunk],
    made: dict[str, Any],
    **header: Any,
) -> TraceHeader:
    """Write chunks that were made from ``trace``; ``made`` says how, in the provenance.

    ``header`` is what the header should say differently from the header of ``trace``.

    Raises
    ------
    PlacerError
        If no token is left, or ``out`` exists.
    """
    fields: dict[str, Any] = {
        "model": trace.model,
        "domains": trace.header.domains,
        "experts_by_weight": trace.header.experts_by_weight,
        "provenance": {
            "placer": __version__,
            "trace_sha256": trace.sha256,
            "tokenizer_sha256": trace.tokenizer_sha256,
            **made,
        },
    }
    with TraceWriter(directory=out, **(fields | header)) as writer:
        for chunk in chunks:
            if chunk.num_tokens:
                writer.append(chunk)
        writer.finish()
    return TraceHeader.read(out)
