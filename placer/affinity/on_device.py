"""Counting affinity with torch, on a GPU or another device: the integers equal NumPy's.

Pairs are counted by products of matrices of zeros and ones, which say whether a token uses
an expert. The sums are whole numbers no greater than the tokens of a block, which float32
holds exactly: they are the same in any order, with TF32 too. Blocks add up in int64. To add
to int64 counts one by one would be exact as well, but many tokens add to few counts, and
would wait for one another.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from placer.affinity.affinity import Affinity
from placer.affinity.sparse import SparseCounts
from placer.affinity.sums import PairwiseSum, Rows
from placer.arrays import AnyArray, IntArray
from placer.model import ModelSpec
from placer.trace import Chunk

# Tokens whose matrices are held at a time: with 512 experts one takes 128 MiB.
_BLOCK_TOKENS = 65_536


class DeviceCounts:
    """Counts that stay on a device until they are needed.

    Parameters
    ----------
    model
        Shape of the routing.
    device
        Where to count.
    rows
        As for :func:`count_affinity`. Only these counts wait for the device; the rest is
        queued there while the next chunk is read.
    """

    def __init__(self, model: ModelSpec, device: torch.device, rows: Rows = "none") -> None:
        sizes = model.num_experts

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.model = model
        self.device = device
        self.num_chunks = 0
        self.num_tokens = 0
        self.load = [zeros(size) for size in sizes]
        self.transition = [zeros(*pair) for pair in itertools.pairwise(sizes)]
        self.coactivation = [zeros(size, size) for size in sizes]
        self._token_rows = None if rows == "none" else _rows_of(len(sizes))
        self._sequence_rows = _rows_of(len(sizes)) if rows == "sequences" else None

    def add(self, chunk: Chunk) -> None:
        """Count the tokens of a chunk.

        Raises
        ------
        PlacerError
            If the chunk is not of the model.
        """
        # On a GPU an id out of range would end the process.
        chunk.require_within(self.model)
        self.num_chunks += 1
        self.num_tokens += chunk.num_tokens
        experts = [self._sent(chosen) for chosen in chunk.experts]
        for begin in range(0, chunk.num_tokens, _BLOCK_TOKENS):
            block = slice(begin, begin + _BLOCK_TOKENS)
            self._add_block([chosen[block] for chosen in experts])
        if chunk.token_ids is None:
            self._token_rows = None
        for ids, rows in (
            (chunk.token_ids, self._token_rows),
            (chunk.sequence_ids, self._sequence_rows),
        ):
            if ids is not None and rows is not None:
                self._add_rows(ids, experts, rows)

    def _sent(self, ids: AnyArray) -> torch.Tensor:
        """Return ids on the device as int64; one byte each is enough to send."""
        sent = torch.from_numpy(
            np.ascontiguousarray(ids, dtype=None if ids.dtype == np.uint8 else np.int32)
        )
        if self.device.type == "cuda":
            sent = sent.pin_memory()
        return sent.to(self.device, non_blocking=True).to(torch.int64)

    def _add_block(self, experts: list[torch.Tensor]) -> None:
        before = None
        for layer, chosen in enumerate(experts):
            shape = (len(chosen), self.model.num_experts[layer])
            uses = torch.zeros(shape, dtype=torch.float32, device=self.device)
            uses.scatter_(1, chosen, 1.0)
            self.load[layer] += uses.sum(dim=0).to(torch.int64)
            self.coactivation[layer] += (uses.T @ uses).to(torch.int64)
            if before is not None:
                self.transition[layer - 1] += (before.T @ uses).to(torch.int64)
            before = uses

    def _add_rows(
        self,
        ids: AnyArray,
        experts: list[torch.Tensor],
        rows: list[PairwiseSum[SparseCounts]],
    ) -> None:
        """Count experts per row id ``[T]``; a negative one is unknown and left out."""
        num_rows = int(ids.max(initial=-1)) + 1
        row = self._sent(ids)
        known = row >= 0
        for chosen, size, total in zip(experts, self.model.num_experts, rows, strict=True):
            keys, counts = torch.unique(
                row[known, None] * size + chosen[known], return_counts=True
            )
            place, columns = np.divmod(keys.cpu().numpy(), size)
            total.add(
                SparseCounts.from_entries(
                    place, columns, counts.cpu().numpy(), num_rows, size
                )
            )

    def affinity(self, provenance: Mapping[str, Any]) -> Affinity | None:
        """Return the counts, ``None`` where there is no chunk."""
        if not self.num_chunks:
            return None
        return Affinity(
            model=self.model,
            num_tokens=self.num_tokens,
            provenance=provenance,
            load=_to_host(self.load),
            transition=_to_host(self.transition),
            # A choice goes with itself in the product.
            coactivation=_to_host(
                [
                    pairs - torch.diag(load)
                    for pairs, load in zip(self.coactivation, self.load, strict=True)
                ]
            ),
            token_expert=_summed(self._token_rows),
            sequence_expert=_summed(self._sequence_rows),
        )


def count_on_device(
    chunks: Iterable[Chunk],
    model: ModelSpec,
    provenance: Mapping[str, Any],
    *,
    device: torch.device,
    rows: Rows = "none",
) -> Affinity | None:
    """Count chunks on a device; ``None`` where there is no chunk."""
    counts = DeviceCounts(model, device, rows)
    for chunk in chunks:
        counts.add(chunk)
    return counts.affinity(provenance)


def _rows_of(num_layers: int) -> list[PairwiseSum[SparseCounts]]:
    return [PairwiseSum() for _ in range(num_layers)]


def _to_host(counts: list[torch.Tensor]) -> tuple[IntArray, ...]:
    return tuple(one.cpu().numpy() for one in counts)


def _summed(
    rows: list[PairwiseSum[SparseCounts]] | None,
) -> tuple[SparseCounts, ...] | None:
    if rows is None:
        return None
    found = tuple(total for one in rows if (total := one.result()) is not None)
    return found or None
