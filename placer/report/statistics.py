"""A few figures of a trace, an affinity and a table.

Legend of the shapes: T tokens, L MoE layers, E logical experts of a layer, D domains.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from placer.affinity.information import mutual_information as mutual_information

# Named here for the reports and notebooks that show it with the other figures.
from placer.arrays import AnyArray, FloatArray, HashArray, IntArray
from placer.table import Table
from placer.trace import Chunk, Trace
from placer.trace.hashing import sequence_hash, token_hash


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceStatistics:
    """A trace, counted in one pass.

    Attributes
    ----------
    trace
        The trace itself.
    load
        L arrays ``[D, E]`` int64: (token, expert) pairs per domain and expert; D is 1
        where the trace has no domains.
    domain_tokens, domain_sequences
        ``[D]``: tokens and sequences of each domain.
    sequence_lengths
        ``[S]`` int64: tokens of each sequence.
    tensors
        Names of the recorded tensors, without their layer.
    num_known_tokens, num_distinct_tokens
        Tokens whose vocabulary id is known, and how many ids they are.
    num_decode_tokens
        Tokens of the decode phase, or ``None`` where phases were not recorded.
    num_repeated_tokens
        Tokens whose experts in all layers are those of an earlier token.
    num_repeated_sequences
        Sequences that repeat an earlier one, token for token, in all layers.
    """

    trace: Trace
    load: tuple[IntArray, ...]
    domain_tokens: IntArray
    domain_sequences: IntArray
    sequence_lengths: IntArray
    tensors: tuple[str, ...]
    num_known_tokens: int
    num_distinct_tokens: int
    num_decode_tokens: int | None
    num_repeated_tokens: int
    num_repeated_sequences: int

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, ``all`` where the trace has none."""
        return self.trace.header.domains or ("all",)

    @classmethod
    def of(cls, trace: Trace) -> Self:
        """Count a trace.

        Raises
        ------
        PlacerError
            If a chunk is damaged, or names a domain that the header does not.
        """
        counter = _Counter(trace)
        for chunk in trace.chunks():
            counter.add(chunk)
        tokens = np.concatenate(counter.token_hashes)
        sequences = np.concatenate(counter.sequence_hashes)
        return cls(
            trace=trace,
            load=tuple(counter.load),
            domain_tokens=counter.domain_tokens,
            domain_sequences=counter.domain_sequences,
            sequence_lengths=np.concatenate(counter.lengths),
            tensors=tuple(sorted(counter.tensors)),
            num_known_tokens=counter.num_known,
            num_distinct_tokens=len(counter.distinct),
            num_decode_tokens=counter.num_decode if "phase" in counter.tensors else None,
            num_repeated_tokens=len(tokens) - len(np.unique(tokens)),
            num_repeated_sequences=len(sequences) - len(np.unique(sequences)),
        )


class _Counter:
    """Sums over the chunks of a trace."""

    def __init__(self, trace: Trace) -> None:
        self.num_domains = max(len(trace.header.domains), 1)
        self.load = [
            np.zeros((self.num_domains, size), dtype=np.int64)
            for size in trace.model.num_experts
        ]
        self.domain_tokens = np.zeros(self.num_domains, dtype=np.int64)
        self.domain_sequences = np.zeros(self.num_domains, dtype=np.int64)
        self.lengths: list[IntArray] = []
        self.token_hashes: list[HashArray] = []
        self.sequence_hashes: list[HashArray] = []
        self.tensors: set[str] = set()
        self.distinct: IntArray = np.zeros(0, dtype=np.int64)
        self.num_known = 0
        self.num_decode = 0

    def add(self, chunk: Chunk) -> None:
        """Count one chunk, which holds whole sequences."""
        domain = self._domains(chunk)
        starts = np.flatnonzero(np.diff(chunk.sequence_ids, prepend=-1))
        self.lengths.append(np.diff(starts, append=chunk.num_tokens))
        self.domain_tokens += np.bincount(domain, minlength=self.num_domains)
        self.domain_sequences += np.bincount(domain[starts], minlength=self.num_domains)
        for load, ids in zip(self.load, chunk.experts, strict=True):
            cell = domain[:, None] * load.shape[1] + ids
            load += np.bincount(cell.ravel(), minlength=load.size).reshape(load.shape)
        tokens = token_hash(chunk)
        self.token_hashes.append(tokens)
        self.sequence_hashes.append(sequence_hash(tokens, starts))
        self.tensors |= {name.partition(".")[0] for name in chunk.tensors()}
        if chunk.token_ids is not None:
            known = chunk.token_ids[chunk.token_ids >= 0]
            self.num_known += len(known)
            self.distinct = np.union1d(self.distinct, known)
        if chunk.phase is not None:
            self.num_decode += int(np.count_nonzero(chunk.phase))

    def _domains(self, chunk: Chunk) -> IntArray:
        if chunk.domain_ids is None:
            return np.zeros(chunk.num_tokens, dtype=np.int64)
        return chunk.domain_ids.astype(np.int64)


def skew(load: AnyArray) -> FloatArray:
    """Return ``[E]``: load of each expert of a layer over the mean (0 without load)."""
    mean = load.mean()
    ratio: FloatArray = load / mean if mean else np.zeros(len(load))
    return ratio


def distinct_rows(table: Table) -> IntArray:
    """Return the first token id of every distinct row of a table, ascending.

    Ids that the trace never showed share one row, or copy that of a neighbour, so a table
    has far fewer rows of its own than ids.
    """
    columns = np.concatenate(
        [
            np.ascontiguousarray(values.T).view(np.uint8).reshape(table.vocab_size, -1)
            for values in (table.token_rank, table.token_confidence)
        ],
        axis=1,
    )
    as_words = columns.view(np.dtype((np.void, columns.shape[1]))).ravel()
    _, first = np.unique(as_words, return_index=True)
    return np.sort(first)
