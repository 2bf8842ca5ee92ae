"""The homes of a running model: those of the table, whatever slots experts have."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from placer.errors import PlacerError
from placer.placement import Placement
from placer.replay.token_shuffle import TokenShuffle
from placer.serving.homes import Batches
from placer.table import Table, build_table
from placer.table.homes import TableHomes
from placer.trace import Chunk

ROWS = [[5, 0, 3, 6, 1, 2, 7, 4], [1, 4, 0, 7, 2, 6, 3, 5], [7, 6, 5, 4, 3, 2, 1, 0]]


class Called(nn.Module):
    """A model that is only called."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


@pytest.fixture
def placement() -> Placement:
    return Placement.from_json(ROWS, (8, 8, 8), num_ranks=4, num_nodes=1)


@pytest.fixture
def table(placement: Placement, make_chunk: Callable[..., Chunk]) -> Table:
    return build_table(placement, make_chunk(), vocab_size=50, with_combined=True)


def of_a_pass(tokens: Chunk, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots and ranks of the first 40 tokens, and weights that fall."""
    experts = tokens.experts[layer][:40]
    slots = torch.from_numpy(np.argsort(ROWS[layer])[experts])
    return slots, slots // 2, torch.tensor([[0.7, 0.3]]).expand(40, 2)


def test_homes_are_those_of_the_table(
    table: Table,
    placement: Placement,
    make_chunk: Callable[..., Chunk],
) -> None:
    tokens = make_chunk(seed=3)
    model, shuffle = Called(), TokenShuffle(table, placement)
    shuffle.watch(model)
    model(input_ids=torch.from_numpy(tokens.token_ids[:40]).reshape(4, 10))
    fixed = np.repeat(np.arange(4), 10)
    homes = TableHomes(table, tokens.token_ids[:40], fixed)
    for layer, chosen in enumerate(tokens.experts):
        slots, ranks, weights = of_a_pass(tokens, layer)
        expected = homes.best(layer).equal(Batches.of(np.arange(40), 40))
        found = shuffle.homes(layer, slots, ranks, weights)
        assert found.tolist() == expected.tolist()
        homes.served(ranks.numpy().T, chosen[:40].T)


def test_slots_that_are_not_the_logical_experts_are_refused(
    table: Table,
    make_chunk: Callable[..., Chunk],
) -> None:
    tokens = make_chunk(seed=3)
    model, shuffle = Called(), TokenShuffle(table)
    shuffle.watch(model)
    model(input_ids=torch.from_numpy(tokens.token_ids[:40]).reshape(4, 10))
    with pytest.raises(PlacerError, match="needs logical experts") as error:
        shuffle.homes(0, *of_a_pass(tokens, 0))
    assert error.value.hint == "give the plan's placement: TokenShuffle(table, placement)"


def test_a_forward_pass_must_have_been_seen(table: Table) -> None:
    none = torch.zeros((1, 2), dtype=torch.int64)
    with pytest.raises(PlacerError, match="no forward pass"):
        TokenShuffle(table).homes(0, none, none, torch.ones((1, 2)))
