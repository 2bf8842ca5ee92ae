"""A replay that sent other bytes, or computed something else, is refused by name."""

import dataclasses

import numpy as np
import pytest

from placer.errors import VerificationError
from placer.replay.outcome import ReplayedRun, ReplayOutcome, link_bytes
from placer.report.replay import rows

SENT = np.arange(32, dtype=np.int64).reshape(2, 4, 4)
APART = SENT * ~np.eye(4, dtype=np.bool_)
RUN = ReplayedRun(
    placement="plan",
    exchange="placer-dedup",
    dispatch=SENT,
    combine=SENT,
    predicted_dispatch=APART,
    predicted_combine=APART,
    described=np.zeros_like(SENT),
    gathered=np.zeros_like(SENT),
    keys_and_values=np.zeros_like(SENT),
    error=1e-7,
    differently_routed=0,
    num_tokens=3,
    ranks_per_node=2,
    seconds=None,
)


def outcome(run: ReplayedRun) -> ReplayOutcome:
    return ReplayOutcome(
        runs=(run,),
        num_passes=1,
        batch_size=4,
        sequence_length=8,
        num_ranks=4,
        num_nodes=2,
        dtype="float32",
        device="cpu",
        tolerance=1e-5,
        warnings=(),
    )


def test_what_a_rank_keeps_is_not_compared() -> None:
    assert RUN.as_predicted
    outcome(RUN).require_verified()


@pytest.mark.parametrize("way", ["dispatch", "combine"])
def test_one_byte_too_many_between_two_ranks_is_refused(way: str) -> None:
    more = SENT.copy()
    more[1, 2, 3] += 1
    run = dataclasses.replace(RUN, **{way: more})
    assert not run.as_predicted
    with pytest.raises(VerificationError, match=r"sent 745 bytes.*predicted 744"):
        outcome(run).require_verified()


def test_the_same_bytes_over_another_link_are_refused() -> None:
    other = SENT.copy()
    other[0, 0, 1], other[0, 0, 2] = SENT[0, 0, 2], SENT[0, 0, 1]
    assert not dataclasses.replace(RUN, dispatch=other).as_predicted


def test_other_outputs_are_refused() -> None:
    run = dataclasses.replace(RUN, error=2e-5, differently_routed=7)
    with pytest.raises(VerificationError, match=r"an error of 2.0e-05.*1.0e-05; 7 choices"):
        outcome(run).require_verified()


def test_outputs_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(VerificationError, match="an error of nan"):
        outcome(dataclasses.replace(RUN, error=float("nan"))).require_verified()


def test_bytes_are_told_by_link() -> None:
    """By hand: pairs (0, 1), (1, 0), (2, 3), (3, 2) are inside a node."""
    fast = sum(
        int(SENT[layer, a, b])
        for layer in range(2)
        for a, b in [(0, 1), (1, 0), (2, 3), (3, 2)]
    )
    assert link_bytes(SENT, 2) == (fast, int(APART.sum()) - fast)
    told = RUN.to_json()
    assert told["dispatch_fast_bytes"] == told["predicted"]["dispatch_fast_bytes"] == fast
    assert told["kept_bytes"] == 2 * int((SENT - APART).sum())
    assert rows(outcome(RUN))[0][2] == round(fast / 6, 1)


def test_a_link_carries_what_its_busiest_rank_sends_or_receives() -> None:
    """By hand, ranks 0, 1 and 2, 3 on a node: two layers with one message each."""
    sent = np.zeros((2, 4, 4), dtype=np.int64)
    sent[0, 0, 1], sent[0, 3, 1], sent[0, 2, 1] = 7, 10, 5
    sent[1, 2, 3], sent[1, 2, 0] = 4, 9
    nothing = np.zeros_like(sent)
    run = dataclasses.replace(RUN, dispatch=sent, combine=nothing, described=sent)
    assert run.busiest_bytes() == (2 * (7 + 4), 2 * (15 + 9))
