"""What ranks do in each batch, against messages written out one by one."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_oracle import PlainLayer, majority

from placer.errors import UsageError
from placer.placement import Placement
from placer.placement.reference import contiguous
from placer.serving import layer_serving
from placer.serving.homes import Batches, BatchShape, batch_shapes, parse_tokens_per_rank
from placer.simulation import simulate
from placer.simulation.batch_figures import (
    BatchFigures,
    BatchOptions,
    batch_steps,
    filled_warning,
    full_batches_note,
)
from placer.simulation.steps import layer_steps
from placer.target.engine import EXCHANGES
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


def plain_steps(placement, tokens, batches, policy, exchanges):
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
                out = messages(exchanges[0], served[t], homes[t], num_ranks, per_node)
                back = messages(exchanges[1], served[t], backs[t], num_ranks, per_node)
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
    shape = BatchShape(
        batching=draw(st.sampled_from(["decode", "prefill"])),
        tokens_per_rank=draw(st.integers(1, max(1, num_tokens // num_ranks))),
    )
    return placement, tokens, Batches.of_shape(shape, tokens.sequence_ids, num_ranks)


def decode(tokens_per_rank: int) -> BatchShape:
    return BatchShape(tokens_per_rank=tokens_per_rank, batching="decode")


def figures_of(placement, tokens, shape, options) -> BatchFigures:
    return batch_steps(placement, tokens, shape, options).figures()


COUNTED = st.sampled_from(["per-expert", "per-rank", "per-node", "all-gather"])


@settings(max_examples=60, deadline=None)
@given(problems(), st.tuples(COUNTED, COUNTED), st.sampled_from(["fixed", "follow"]))
def test_every_copy_is_counted_where_it_is_sent_and_received(problem, exchanges, policy):
    placement, tokens, batches = problem
    steps = layer_steps(
        placement,
        tokens,
        batches,
        policy=policy,
        exchanges=exchanges,
        replica_choice="local-first",
    )
    expected, weight = (
        plain_steps(placement, tokens, batches, policy, exchanges),
        batches.weight,
    )
    for found, layer in zip(steps, expected, strict=True):
        for batch, (pairs, active, sent) in enumerate(layer):
            for rank in range(placement.num_ranks):
                assert found.pairs[batch, rank] == pytest.approx(weight * pairs[rank])
                assert found.activated[batch, rank] == active[rank]
                for way in ("dispatch", "combine"):
                    for link in ("fast", "slow"):
                        copies = getattr(getattr(found, way), link)
                        for end in ("sent", "received"):
                            value = getattr(copies, end)[batch, rank]
                            counted = weight * sent[way, link, end, rank]
                            assert value == pytest.approx(counted)


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
        every = batches.size * batches.weight * top_k * (num_ranks - 1) / num_ranks
        assert total == pytest.approx([every] * batches.num_full)


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(1, 3))
def test_per_rank_figures_are_those_of_simulate(problem, times):
    """One batch of all tokens, each of which may stand for several."""
    placement, tokens, _ = problem
    per_rank = -(-tokens.num_tokens // placement.num_ranks) * times
    options = BatchOptions(policy="fixed", replica_choice="local-first")
    found = figures_of(placement, tokens, decode(per_rank), options).metrics
    known = simulate(
        placement, tokens, batch_size=tokens.num_tokens, replica_choice="local-first"
    )["fixed"]
    assert found.batch_size == per_rank * placement.num_ranks
    assert found.straggler_mean == pytest.approx(known.straggler_mean)
    assert found.bottleneck_copies_per_token == pytest.approx(
        known.bottleneck_rank_copies_per_token
    )
    sent = found.dispatch_fast_copies_per_token + found.dispatch_slow_copies_per_token
    assert sent == pytest.approx(known.remote_rank_copies_per_token)
    assert found.dispatch_slow_copies_per_token == pytest.approx(
        known.crossing_rank_copies_per_token
    )


def test_a_batch_of_more_tokens_than_the_trace_has_is_filled_by_repeating_them(make_chunk):
    """Twice the tokens: twice the pairs and copies, and as many activated experts."""
    tokens, placement = make_chunk(), contiguous((8,) * 3, 4)
    per_rank = tokens.num_tokens // 4
    assert per_rank * 4 == tokens.num_tokens
    options = BatchOptions(policy="fixed")
    for batching in ("decode", "prefill"):
        once, twice = (
            batch_steps(
                placement,
                tokens,
                BatchShape(tokens_per_rank=size, batching=batching),
                options,
            ).layers
            for size in (per_rank, 2 * per_rank)
        )
        for one, two in zip(once, twice, strict=True):
            assert (two.pairs == 2 * one.pairs).all()
            assert (two.dispatch.fast.sent == 2 * one.dispatch.fast.sent).all()
            assert (two.combine.fast.received == 2 * one.combine.fast.received).all()
            assert (two.activated == one.activated).all()


def test_batches_that_the_trace_does_not_fill_are_told():
    shapes = batch_shapes((10, 20, 4000))
    assert filled_warning(shapes[:2], 100, 4) is None
    told = filled_warning(shapes, 79, 4)
    assert told.startswith(
        "79 tokens do not fill batches of 80 and 16,000, so tokens are repeated"
    )


def test_tokens_that_fill_no_whole_batch_are_told():
    """On 4 ranks 90 tokens are two batches of 40 or one of 80, and none of 16,000."""
    shapes = batch_shapes((10, 20, 4000))
    assert full_batches_note(shapes, 80, 4) is None
    assert full_batches_note(shapes, 90, 4) == (
        "figures per batch are of full batches only. These are 2 of "
        "10 tokens per rank (80 of 90 tokens); 1 of 20 tokens per rank (80 of 90 tokens)"
    )


def test_stragglers_and_activated_experts_by_hand():
    """Two ranks of two experts; batches of two tokens, one of each sequence.

    Pairs of the batches: (0, 1) and (1, 0); (2, 3) and (0, 2). Max/mean pairs: 2, 3/2.
    Activated on the busiest rank: 2, 2.
    """
    rows = [[0, 1], [2, 3], [1, 0], [0, 2]]
    tokens = Chunk(
        experts=(np.array(rows, dtype=np.uint8),),
        sequence_ids=np.array([0, 0, 1, 1], dtype=np.int32),
        positions=np.array([0, 1, 0, 1], dtype=np.int32),
    )
    options = BatchOptions(policy="fixed")
    found = figures_of(contiguous((4,), 2), tokens, decode(1), options)
    assert found.metrics.straggler_mean == pytest.approx(7 / 4)
    assert found.metrics.straggler_p95 == pytest.approx(1.975)
    assert found.metrics.activated_experts_mean == 2
    assert found.metrics.activated_experts_p95 == 2
    assert found.metrics.num_batches == 2
    assert found.time is None


def test_prefill_takes_each_ranks_sequences_one_after_another():
    """Sequences 0 to 3 of lengths 2, 3, 2, 1 on two ranks: queues 0 0 2 2 and 1 1 1 3."""
    ids = np.repeat([0, 1, 2, 3], [2, 3, 2, 1])
    prefill, decoding = (
        Batches.of_shape(BatchShape(tokens_per_rank=2, batching=one), ids, 2)
        for one in ("prefill", "decode")
    )
    assert ids[prefill.order].tolist() == [0, 1, 0, 1, 2, 1, 2, 3]
    assert (prefill.num_full, prefill.weight) == (2, 1)
    assert ids[decoding.order].tolist() == [0, 1, 2, 3, 0, 1, 2, 1]


def test_batches_below_1024_tokens_per_rank_are_those_of_decoding():
    drawn = {one.tokens_per_rank: one.batching for one in batch_shapes((4096, 64, 1023))}
    assert drawn == {64: "decode", 1023: "decode", 4096: "prefill"}
    assert [one.batching for one in batch_shapes((1024,))] == ["prefill"]
    forced = batch_shapes((64, 4096), "prefill")
    assert [one.batching for one in forced] == ["prefill", "prefill"]
    assert [one.tokens_per_rank for one in batch_shapes()] == [64, 256, 4096]


@pytest.mark.parametrize("text", ["", "64,", "64,x", "-1", "6.5"])
def test_sizes_that_are_no_whole_numbers_are_refused(text):
    with pytest.raises(UsageError, match="not a list of whole numbers") as error:
        parse_tokens_per_rank(text)
    assert "--tokens-per-rank 64,256,4096" in error.value.hint
    assert parse_tokens_per_rank("64, 256") == (64, 256)
    assert parse_tokens_per_rank(None) == (64, 256, 4096)


def test_what_is_not_known_is_refused(make_chunk):
    tokens = make_chunk()
    with pytest.raises(UsageError, match="--batching warmup is not known"):
        batch_shapes((64,), "warmup")
    with pytest.raises(UsageError, match="--tokens-per-rank must be positive"):
        batch_shapes((0,))
    with pytest.raises(UsageError, match="a batch has at least one token"):
        Batches.of(tokens.sequence_ids, 0)
    with pytest.raises(UsageError, match="policy token cannot be served"):
        options = BatchOptions(policy="token")
        batch_steps(contiguous((8,) * 3, 4), tokens, decode(16), options)


def test_all_exchanges_are_counted(make_chunk):
    tokens = make_chunk()
    for exchange in EXCHANGES:
        options = BatchOptions(policy="fixed", exchanges=(exchange, exchange))
        found = figures_of(contiguous((8,) * 3, 4, 2), tokens, decode(16), options).metrics
        assert found.dispatch_slow_copies_per_token > 0
        assert found.combine_fast_copies_per_token > 0


@pytest.mark.parametrize("choice", ["local-first", "hash", "cover"])
@pytest.mark.parametrize("exchange", ["per-expert", "per-rank", "per-node", "padded"])
def test_no_figure_depends_on_the_blocks_of_tokens(
    make_chunk, monkeypatch, choice, exchange
):
    """Blocks of 7 tokens, which cut batches and sequences, count what one block counts."""
    tokens = make_chunk()
    row = np.array([*range(8), 0, 3, 5, 1])
    placement = Placement(
        physical_to_logical_map=(row,) * 3, num_experts=(8,) * 3, num_ranks=4, num_nodes=2
    )
    options = BatchOptions(
        policy="follow", exchanges=(exchange, "per-rank"), replica_choice=choice
    )

    def figures():
        batches = batch_steps(placement, tokens, decode(10), options).figures()
        return batches, simulate(placement, tokens, replica_choice=choice, batch_size=90)

    whole = figures()
    monkeypatch.setattr(layer_serving, "_BLOCK_TOKENS", 7)
    assert len(list(layer_serving.blocks(tokens.num_tokens))) > 50
    assert figures() == whole


def test_256_ranks_are_one_node(make_chunk):
    """A byte holds their numbers, but not how many they are."""
    tokens = make_chunk(num_experts=(256,) * 2)
    placement, options = contiguous((256,) * 2, 256), BatchOptions(policy="fixed")
    found = figures_of(placement, tokens, decode(1), options).metrics
    known = simulate(placement, tokens)["fixed"]
    assert found.dispatch_slow_copies_per_token == 0
    assert found.num_batches == 1
    ours = batch_steps(placement, tokens, decode(1), options)
    sent = sum(float(step.dispatch.fast.sent.sum()) for step in ours.layers)
    assert 0 < sent / (2 * 256) <= 2 >= known.remote_rank_copies_per_token
