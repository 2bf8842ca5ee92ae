"""Exchanges on three ranks with batches of all sizes, against experts that are all here."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from placer.errors import PlacerError
from placer.placement.reference import contiguous
from placer.replay.exchanges import (
    DedupExchange,
    PaddedExchange,
    PerNodeExchange,
    ShuffleExchange,
)
from placer.replay.token_shuffle import TokenShuffle
from placer.replay.traffic import TrafficCounter
from placer.table import build_table
from placer.trace import Chunk

NUM_RANKS, SLOTS, TOP_K, HIDDEN = 3, 2, 4, 5  # more experts per token than a rank holds
#: Tokens of each rank: none anywhere, none on some, one, and as they come.
SIZES = [(0, 0, 0), (0, 1, 0), (7, 0, 3), (4, 5, 6)]
EXCHANGES = {
    "dedup": DedupExchange,
    "padded": PaddedExchange,
    "nodes of one rank": partial(PerNodeExchange, ranks_per_node=1),
    "one node": partial(PerNodeExchange, ranks_per_node=NUM_RANKS),
}


class Experts(nn.Module):
    """Matrices, as transformers calls them; some of its kernels fail on no rows, too."""

    def __init__(self, matrices: torch.Tensor) -> None:
        super().__init__()
        self.matrices, self.num_experts = matrices, len(matrices)

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        if not len(hidden):
            raise ValueError("experts were called without tokens")
        each = torch.einsum("nh,nkhg->nkg", hidden, self.matrices[ids])
        return (each * weights[..., None]).sum(1)


def batch(seed: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return hidden states, ids (int32, as some routers choose) and weights."""
    made = torch.Generator().manual_seed(seed)
    scores = torch.rand(size, NUM_RANKS * SLOTS, generator=made)
    weights, ids = scores.topk(TOP_K)
    hidden = torch.randn(size, HIDDEN, generator=made)
    return hidden.to(dtype), ids.to(torch.int32), weights.to(dtype)


def expected_copies(ids: torch.Tensor, rank: int) -> list[int]:
    """Copies that a rank's tokens make leave it, by receiver; written out with sets."""
    sent: Counter[int] = Counter()
    for chosen in ids.tolist():
        sent.update({slot // SLOTS for slot in chosen} - {rank})
    return [sent[other] for other in range(NUM_RANKS)]


def every_batch(rank: int, store: Path) -> None:
    """Run on each rank: every exchange on every batch, shared and not."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_RANKS
    )
    mesh = init_device_mesh("cpu", (NUM_RANKS, 1), mesh_dim_names=("ep", "tp"))
    together, alone = mesh["ep"], mesh["tp"]
    matrices = torch.randn(
        NUM_RANKS * SLOTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(9)
    )
    mine = slice(rank * SLOTS, (rank + 1) * SLOTS)
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        whole, held = Experts(matrices.to(dtype)), Experts(matrices[mine].to(dtype))
        for name, exchange in EXCHANGES.items():
            served = exchange(held, ep_mesh=together, tp_mesh=alone)
            for sizes in SIZES:
                given = batch(rank, sizes[rank], dtype)
                counter = TrafficCounter(
                    num_layers=1, num_ranks=NUM_RANKS, hidden_size=HIDDEN
                )
                with counter, counter.within(0, "exchange"):
                    found = served(*given)
                compare(found, whole, given, close)
                if name != "padded":
                    sent = counter.traffic().dispatch[0]
                    sent[rank] = 0
                    copies = expected_copies(given[1], rank)
                    assert sent.tolist() == [n * HIDDEN * dtype.itemsize for n in copies]
            shared = exchange(held, ep_mesh=together, tp_mesh=together)
            for size in (0, 1, 2, 7):
                given = batch(size, size, dtype)
                compare(shared(*given), whole, given, close)
    dist.barrier()
    dist.destroy_process_group()


def compare(
    found: torch.Tensor, whole: Experts, given: tuple[torch.Tensor, ...], close: float
) -> None:
    hidden, ids, weights = given
    assert (found.shape, found.dtype) == (hidden.shape, hidden.dtype)
    if len(hidden):
        expected = whole(hidden, ids.long(), weights)
        assert torch.allclose(found, expected, rtol=close, atol=10 * close)


def test_batches_of_all_sizes_are_served(tmp_path: Path) -> None:
    spawn(every_batch, (tmp_path / "store",), nprocs=NUM_RANKS)


def test_what_an_exchange_cannot_do_is_refused(one_rank: dist.ProcessGroup) -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("ep", "tp"))
    meshes = {"ep_mesh": mesh["ep"], "tp_mesh": mesh["tp"]}
    experts = Experts(torch.zeros(6, HIDDEN, HIDDEN))
    with pytest.raises(PlacerError, match="1 ranks do not divide into nodes of 2"):
        PerNodeExchange(experts, **meshes, ranks_per_node=2)
    hidden, ids, weights = batch(0, 3, torch.float32)
    with pytest.raises(PlacerError, match="no gradients"):
        DedupExchange(experts, **meshes)(hidden.requires_grad_(), ids, weights)


def test_a_table_of_another_plan_is_refused(
    one_rank: dist.ProcessGroup, make_chunk: Callable[..., Chunk]
) -> None:
    chunk = make_chunk(num_experts=(6, 6))
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("ep", "tp"))
    meshes = {"ep_mesh": mesh["ep"], "tp_mesh": mesh["tp"]}
    experts = Experts(torch.zeros(6, HIDDEN, HIDDEN))
    for_one, for_two = (
        TokenShuffle(build_table(contiguous((6, 6), number, 1), chunk, vocab_size=50))
        for number in (1, 2)
    )
    with pytest.raises(PlacerError, match="for 2 ranks, the model runs on 1"):
        ShuffleExchange(experts, **meshes, shuffle=for_two)
    with pytest.raises(PlacerError, match="more MoE layers than the table, 2"):
        for _ in range(3):
            ShuffleExchange(experts, **meshes, shuffle=for_one)
