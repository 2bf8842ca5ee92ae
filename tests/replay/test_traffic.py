"""The counter sees what any code hands to torch.distributed."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

from placer.replay.traffic import TrafficCounter

HIDDEN = 6

pytestmark = pytest.mark.usefixtures("one_rank")


def send(rows: torch.Tensor) -> None:
    dist.all_to_all_single(torch.empty_like(rows), rows, [len(rows)], [len(rows)])


def counter() -> TrafficCounter:
    return TrafficCounter(num_layers=2, num_ranks=1, hidden_size=HIDDEN)


def test_an_exchange_is_told_apart_from_what_describes_it() -> None:
    seen = counter()
    with seen, seen.within(1, "exchange"):
        send(torch.zeros(5, dtype=torch.long))
        send(torch.zeros(3, HIDDEN))
        wait_tensor(all_to_all_single(torch.zeros(2, HIDDEN), [2], [2], dist.group.WORLD))
    found = seen.traffic()
    assert found.described.tolist() == [[0], [5 * 8]]
    assert found.dispatch.tolist() == [[0], [3 * HIDDEN * 4]]
    assert found.combine.tolist() == [[0], [2 * HIDDEN * 4]]


def test_steps_of_a_hierarchy_go_out_and_come_back() -> None:
    seen = counter()
    for _ in range(2):
        with seen, seen.within(0, "exchange"):
            for rows in (1, 2, 3, 4):
                send(torch.zeros(rows, HIDDEN, dtype=torch.bfloat16))
    found = seen.traffic()
    assert found.dispatch.tolist() == [[2 * (1 + 2) * HIDDEN * 2], [0]]
    assert found.combine.tolist() == [[2 * (3 + 4) * HIDDEN * 2], [0]]


def test_all_gathers_and_keys_are_apart() -> None:
    seen = counter()
    rows = torch.zeros(4, HIDDEN)
    with seen:
        with seen.within(0, "exchange"):
            dist.all_gather([torch.empty_like(rows)], rows)
        with seen.within(0, "keys_and_values"):
            send(rows)
        send(rows)  # outside any layer: a collective of somebody else
    found = seen.traffic()
    size = 4 * HIDDEN * 4
    assert (found.gathered.sum(), found.keys_and_values.sum()) == (size, size)
    assert found.dispatch.sum() == found.combine.sum() == 0


def test_the_word_of_an_all_reduce_describes_and_collectives_are_kept_in_order() -> None:
    seen = counter()
    send(torch.zeros(9, HIDDEN))  # before the counter
    with seen:
        with seen.within(0, "exchange"):
            dist.all_reduce(torch.tensor(3), dist.ReduceOp.MAX)
            send(torch.zeros(2, HIDDEN))
            send(torch.zeros(2, HIDDEN))
        rows = torch.zeros(4)
        dist.all_gather([torch.empty_like(rows)], rows)  # outside any layer
    assert seen.traffic().described.tolist() == [[8], [0]]
    assert [(one.operation, one.num_bytes.tolist()) for one in seen.collectives()] == [
        ("all_gather", [8]),
        ("all_to_all", [2 * HIDDEN * 4]),
        ("all_to_all", [2 * HIDDEN * 4]),
        ("all_gather", [16]),
    ]
