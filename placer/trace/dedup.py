"""Removing repeated tokens of a trace, which make held-out figures too good.

Three kinds. A *shared prefix*: the tokens with which a sequence begins began another one
before, as with a common system prompt; a causal model routes them the same way again, and
an engine with a prefix cache never computes them twice. A *repeated row*: a token that
uses the same experts as another in all layers, in any order. A token of a *warm-up*:
a repeated row in a long run of them, or far too common for real traffic
(:mod:`placer.trace.warm_up`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from placer.arrays import BoolArray, HashArray
from placer.trace.chunk import Chunk
from placer.trace.fold import Fold
from placer.trace.hashing import expert_set_hash, prefix_hash
from placer.trace.header import TraceHeader
from placer.trace.reader import Trace
from placer.trace.rewrite import write_derived
from placer.trace.selection import Selection
from placer.trace.warm_up import warm_up_mask

Kind = Literal["prefixes", "rows", "warm_up"]
KINDS: tuple[Kind, ...] = ("prefixes", "rows", "warm_up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """How much of a trace is repeated.

    Attributes
    ----------
    num_tokens
        Tokens looked at: all, or those outside the fold.
    num_prefix_tokens
        Of those, tokens of a shared prefix.
    num_repeated_rows
        Of those, repeated rows, in a shared prefix or not.
    num_warm_up_tokens
        Of those, tokens of a warm-up.
    num_removed
        Tokens that are of a kind to be removed.
    """

    num_tokens: int
    num_prefix_tokens: int
    num_repeated_rows: int
    num_warm_up_tokens: int
    num_removed: int

    @property
    def prefix_share(self) -> float:
        """Share of the tokens that a shared prefix holds."""
        return self.num_prefix_tokens / self.num_tokens if self.num_tokens else 0.0

    @property
    def row_share(self) -> float:
        """Share of the tokens that are repeated rows."""
        return self.num_repeated_rows / self.num_tokens if self.num_tokens else 0.0

    @property
    def warm_up_share(self) -> float:
        """Share of the tokens that come from a warm-up."""
        return self.num_warm_up_tokens / self.num_tokens if self.num_tokens else 0.0


def dedup_trace(
    trace: Trace,
    out: Path,
    *,
    kinds: tuple[Kind, ...] = KINDS,
    fold: Fold | None = None,
) -> tuple[TraceHeader, Repetition]:
    """Write a trace without repeats; sequence ids and positions are kept.

    Memory holds 12 bytes per token, and 16 per distinct token (up to 26 while sets grow),
    plus one chunk.

    Parameters
    ----------
    trace
        The trace to clean.
    out
        Where to write.
    kinds
        What to remove; the shares of all kinds are counted anyway. Prefixes are found by
        token ids, or by rows where no ids were recorded; from an unknown id or a missing
        position on, nothing of a sequence counts as a prefix.
    fold
        ``None`` keeps the first of equal tokens. With a fold, its sequences are kept whole,
        and other sequences lose the tokens that the fold has: profile on the fold, judge on
        the rest.

    Raises
    ------
    PlacerError
        If the trace is damaged, or nothing would be left.
    """
    search = _Search(trace, fold)

    def parts() -> Iterator[Chunk]:
        for chunk, found in search.chunks():
            removed = np.logical_or.reduce([found[kind] for kind in kinds])
            search.num_removed += int(np.count_nonzero(removed))
            yield chunk.select(~removed)

    made = {
        "source": "dedup",
        "kinds": list(kinds),
        "fold": None if fold is None else str(fold),
    }
    header = write_derived(trace, out, parts(), made)
    return header, search.repetition()


class _Search:
    """Looks for what was there before, chunk by chunk."""

    def __init__(self, trace: Trace, fold: Fold | None) -> None:
        self._trace, self._fold = trace, fold
        self._warm_up = warm_up_mask(trace)
        self._seen: dict[Kind, _Seen] = {"prefixes": _Seen(), "rows": _Seen()}
        self._counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._num_tokens = 0
        self.num_removed = 0

    def chunks(self) -> Iterator[tuple[Chunk, dict[Kind, BoolArray]]]:
        """Yield every chunk with ``[T]`` masks of its repeated tokens."""
        whole = () if self._fold is None else self._trace.chunks(Selection(self._fold))
        for chunk in whole:
            for kind, (hashes, known) in _hashes(chunk).items():
                self._seen[kind].add(hashes[known])
        begin = 0
        for chunk in self._trace.chunks():
            looked_at = np.ones(chunk.num_tokens, dtype=np.bool_)
            if self._fold is not None:
                looked_at = ~self._fold.keep(chunk.sequence_ids)
            self._num_tokens += int(np.count_nonzero(looked_at))
            end = begin + chunk.num_tokens
            found: dict[Kind, BoolArray] = {"warm_up": self._warm_up[begin:end] & looked_at}
            begin = end
            for kind, (hashes, known) in _hashes(chunk).items():
                repeated = np.zeros(chunk.num_tokens, dtype=np.bool_)
                repeated[known] = self._seen[kind].contains(hashes[known])
                if self._fold is None:
                    # Unknown tokens do not count as the first of equal ones.
                    repeated[known] |= ~_first(hashes[known])
                    self._seen[kind].add(hashes[known])
                found[kind] = repeated & looked_at
            for kind, mask in found.items():
                self._counts[kind] += int(np.count_nonzero(mask))
            yield chunk, found

    def repetition(self) -> Repetition:
        """Return what was found in the chunks so far."""
        return Repetition(
            num_tokens=self._num_tokens,
            num_prefix_tokens=self._counts["prefixes"],
            num_repeated_rows=self._counts["rows"],
            num_warm_up_tokens=self._counts["warm_up"],
            num_removed=self.num_removed,
        )


class _Seen:
    """A set of hashes, in sorted runs each more than twice as long as the next.

    One sorted array would be copied for every chunk, in a time quadratic in the trace's
    length; here a hash is copied once for every doubling (as in a log-structured merge
    tree: O'Neil et al. 1996).
    """

    def __init__(self) -> None:
        self._runs: list[HashArray] = []

    def add(self, hashes: HashArray) -> None:
        """Add hashes ``[T]``."""
        run = np.unique(hashes[~self.contains(hashes)])
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")
        if len(run):
            self._runs.append(run)

    def contains(self, hashes: HashArray) -> BoolArray:
        """Return ``[T]``: whether each hash is in the set."""
        found = np.zeros(len(hashes), dtype=np.bool_)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            found |= run[place] == hashes
        return found


def _hashes(chunk: Chunk) -> dict[Kind, tuple[HashArray, BoolArray]]:
    """Return for each kind ``[T]`` hashes, and where they are known."""
    rows = expert_set_hash(chunk)
    _, starts, lengths = np.unique(
        chunk.sequence_ids, return_index=True, return_counts=True
    )
    if chunk.token_ids is None:
        words, unknown = rows, np.zeros(chunk.num_tokens, dtype=np.int64)
    else:
        words = chunk.token_ids.astype(np.uint64)
        unknown = (chunk.token_ids < 0).astype(np.int64)
    # A token that follows a gap has a context of which a part is not here.
    unknown += chunk.positions != np.arange(chunk.num_tokens) - np.repeat(starts, lengths)
    before = np.concatenate([[0], np.cumsum(unknown)])
    known = before[1:] == np.repeat(before[starts], lengths)
    return {
        "prefixes": (prefix_hash(words, starts), known),
        "rows": (rows, np.ones(chunk.num_tokens, dtype=np.bool_)),
    }


def _first(hashes: HashArray) -> BoolArray:
    """Return ``[T]``: whether a hash occurs here for the first time."""
    first = np.zeros(len(hashes), dtype=np.bool_)
    first[np.unique(hashes, return_index=True)[1]] = True
    return first
