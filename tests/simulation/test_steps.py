"""What ranks do in each batch, against messages written out one by one."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_oracle import PlainLayer, majority

from placer.engine import EXCHANGES
from placer.errors import UsageError
from placer.plan import Placement
from placer.simulation import contiguous, simulate
from placer.simulation.batch_figures import BatchOptions, batch_figures, batch_sizes
from placer.simulation.homes import Batches
from placer.simulation.steps import layer_steps
from placer.trace import Chunk


def messages(exchange, ranks, home, num_ranks, per_node):
    """Return (sender, receiver) of every copy that one token's dispatch sends."""
    node = home // per_node
    if exchange == "per-expert":
        return [(home, rank) for rank in ranks if rank != home]
    if exchange == "per-rank":
        return [(home, rank) for rank in set(ranks) if rank != home]
    if exchange == "all-gather":
        return [(home, rank) for rank in range(num_ranks) if rank != home]
    sent = []
    for other in {rank // per_node for rank in ranks}:
        landing = other * per_node + home % per_node
        if other != node:
            sent.append((home, landing))
        sent += [
            (landing, rank)
            for rank in set(ranks)
            if rank // per_node == other and rank != landing
        ]
    return sent


def plain_steps(placement, tokens, batches, policy, exchange):
    """Per layer: batch -> (pairs per rank, active slots per rank, copies by link)."""
    num_ranks, per_node = placement.num_ranks, placement.ranks_per_node
    _, ordinal = np.unique(tokens.sequence_ids, return_inverse=True)
    homes = (ordinal % num_ranks).tolist()
    for number, row in enumerate(placement.physical_to_logical_map):
        layer = PlainLayer(row.tolist(), num_ranks, placement.num_nodes)
        chosen = tokens.experts[number].tolist()
        served = [
            [layer.serve(t, e, homes[t]) for e in experts]
            for t, experts in enumerate(chosen)
        ]
        backs = [majority(ranks) for ranks in served] if policy == "follow" else homes
        found = []
        for batch in range(batches.num_full):
            members = batches.order[batch * batches.size : (batch + 1) * batches.size]
            pairs, sent = Counter(), Counter()
            active = {rank: set() for rank in range(num_ranks)}
            for t in members.tolist():
                for expert, rank in zip(chosen[t], served[t], strict=True):
                    pairs[rank] += 1
                    active[rank].add(expert)
                out = messages(exchange, served[t], homes[t], num_ranks, per_node)
                back = messages(exchange, served[t], backs[t], num_ranks, per_node)
                for way, pair in [("dispatch", p) for p in out] + [
                    ("combine", p[::-1]) for p in back
                ]:
                    near = pair[0] // per_node == pair[1] // per_node
                    link = "fast" if near else "slow"
                    sent[way, link, "sent", pair[0]] += 1
                    sent[way, link, "received", pair[1]] += 1
            found.append((pairs, {r: len(s) for r, s in active.items()}, sent))
        yield found
        homes = backs


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks, num_nodes = draw(st.sampled_from([(2, 1), (4, 1), (4, 2), (6, 3), (6, 2)]))
    top_k = draw(st.integers(1, 4))
    rows, sizes = [], []
    for _ in range(draw(st.integers(1, 3))):
        size = num_ranks * (-(-top_k // num_ranks) + int(rng.integers(0, 3)))
        own = rng.permutation(size).reshape(num_ranks, -1)
        spare = min(int(rng.integers(0, 2)), size - own.shape[1])
        more = [rng.choice(np.setdiff1d(range(size), r), spare, replace=False) for r in own]
        rows.append(np.hstack([own, np.array(more, dtype=np.int64)]).ravel())
        sizes.append(size)
    lengths = rng.integers(1, 6, draw(st.integers(1, 7)))
    num_tokens = int(lengths.sum())
    tokens = Chunk(
        experts=tuple(
            np.stack([rng.permutation(size)[:top_k] for _ in range(num_tokens)]).astype(
                np.uint8
            )
            for size in sizes
        ),
        sequence_ids=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        positions=np.zeros(num_tokens, dtype=np.int32),
    )
    placement = Placement(
        physical_to_logical_map=tuple(rows),
        num_experts=tuple(sizes),
        num_ranks=num_ranks,
        num_nodes=num_nodes,
    )
    phase = draw(st.sampled_from(["decode", "prefill"]))
    batches = Batches.of_phase(
        phase, tokens.sequence_ids, draw(st.integers(1, 12)), num_ranks
    )
    return placement, tokens, batches


@settings(max_examples=60, deadline=None)
@given(
    problems(),
    st.sampled_from(["per-expert", "per-rank", "per-node", "all-gather"]),
    st.sampled_from(["fixed", "follow"]),
)
def test_every_copy_is_counted_where_it_is_sent_and_received(problem, exchange, policy):
    placement, tokens, batches = problem
    steps = layer_steps(
        placement,
        tokens,
        batches,
        policy=policy,
        exchanges=(exchange, exchange),
        replica_choice="local-first",
    )
    expected = plain_steps(placement, tokens, batches, policy, exchange)
    for found, layer in zip(steps, expected, strict=True):
        for batch, (pairs, active, sent) in enumerate(layer):
            for rank in range(placement.num_ranks):
                assert found.pairs[batch, rank] == pairs[rank]
                assert found.activated[batch, rank] == active[rank]
                for way in ("dispatch", "combine"):
                    for link in ("fast", "slow"):
                        copies = getattr(getattr(found, way), link)
                        for end in ("sent", "received"):
                            value = getattr(copies, end)[batch, rank]
                            assert value == sent[way, link, end, rank]


@settings(max_examples=30, deadline=None)
@given(problems())
def test_a_padded_exchange_is_the_same_for_every_placement(problem):
    """A rank sends k/R copies of each of its tokens to every other rank."""
    placement, tokens, batches = problem
    top_k, num_ranks = tokens.experts[0].shape[1], placement.num_ranks
    options = {"policy": "fixed", "exchanges": ("padded", "padded")}
    options["replica_choice"] = "hash"
    for found in layer_steps(placement, tokens, batches, **options):
        total = found.dispatch.fast.sent.sum(axis=1) + found.dispatch.slow.sent.sum(axis=1)
        every = batches.size * top_k * (num_ranks - 1) / num_ranks
        assert total == pytest.approx([every] * batches.num_full)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_per_rank_figures_are_those_of_simulate(problem):
    """Where all batches are full, the same straggler, bottleneck and copies."""
    placement, tokens, _ = problem
    found = batch_figures(
        placement,
        tokens,
        tokens.num_tokens,
        BatchOptions(policy="fixed", replica_choice="hash"),
    ).metrics
    known = simulate(
        placement, tokens, batch_size=tokens.num_tokens, replica_choice="hash"
    )["fixed"]
    assert found.straggler_mean == pytest.approx(known.straggler_mean)
    assert found.bottleneck_copies_per_token == pytest.approx(
        known.bottleneck_rank_copies_per_token
    )
    sent = found.dispatch_fast_copies_per_token + found.dispatch_slow_copies_per_token
    assert sent == pytest.approx(known.remote_rank_copies_per_token)
    assert found.dispatch_slow_copies_per_token == pytest.approx(
        known.crossing_rank_copies_per_token
    )


def test_stragglers_and_activated_experts_by_hand():
    """Two ranks of two experts; batches (0, 0), (0, 1), (2, 3), (0, 2) of one token each.

    Max/mean pairs: 2, 2, 2, 1. Activated on the busiest rank: 2, 2, 2, 1.
    """
    rows = [[0, 1], [1, 0], [2, 3], [0, 2]]
    tokens = Chunk(
        experts=(np.array(rows, dtype=np.uint8),),
        sequence_ids=np.zeros(4, dtype=np.int32),
        positions=np.arange(4, dtype=np.int32),
    )
    found = batch_figures(contiguous((4,), 2), tokens, 1, BatchOptions(policy="fixed"))
    assert found.metrics.straggler_mean == pytest.approx(7 / 4)
    assert found.metrics.straggler_p95 == 2
    assert found.metrics.activated_experts_mean == pytest.approx(7 / 4)
    assert found.metrics.activated_experts_p95 == 2
    assert found.metrics.num_batches == 4
    assert found.time is None


def test_prefill_takes_each_ranks_sequences_one_after_another():
    """Sequences 0 to 3 of lengths 2, 3, 2, 1 on two ranks: queues 0 0 2 2 and 1 1 1 3."""
    ids = np.repeat([0, 1, 2, 3], [2, 3, 2, 1])
    batches = Batches.of_phase("prefill", ids, 4, 2)
    assert ids[batches.order].tolist() == [0, 1, 0, 1, 2, 1, 2, 3]
    assert batches.num_full == 2
    decode = Batches.of_phase("decode", ids, 4, 2)
    assert ids[decode.order].tolist() == [0, 1, 2, 3, 0, 1, 2, 1]


def test_small_batches_are_reported_in_decoding():
    assert batch_sizes("decode", 4096, 10_000) == [64, 256, 4096]
    assert batch_sizes("decode", 4096, 100) == [64, 100]
    assert batch_sizes("prefill", 4096, 10_000) == [4096]


def test_a_phase_or_policy_that_is_not_known_is_refused(make_chunk):
    tokens = make_chunk()
    with pytest.raises(UsageError, match="--batching warmup is not known"):
        Batches.of_phase("warmup", tokens.sequence_ids, 4, 2)
    with pytest.raises(UsageError, match="policy token cannot be served"):
        batch_figures(contiguous((8,) * 3, 4), tokens, 64, BatchOptions(policy="token"))


def test_all_exchanges_are_counted(make_chunk):
    tokens = make_chunk()
    for exchange in EXCHANGES:
        options = BatchOptions(policy="fixed", exchanges=(exchange, exchange))
        found = batch_figures(contiguous((8,) * 3, 4, 2), tokens, 64, options).metrics
        assert found.dispatch_slow_copies_per_token > 0
        assert found.combine_fast_copies_per_token > 0
