"""The cost model, computed by hand; and for which bandwidth a plan pays."""

import json
from dataclasses import replace

import numpy as np
import pytest

from placer.errors import PlacerError, UsageError
from placer.placement import Placement
from placer.placement.reference import contiguous
from placer.serving.homes import BatchShape
from placer.simulation.batch_figures import BatchOptions, batch_steps
from placer.simulation.cost import (
    BreakEven,
    CostModel,
    ExpertShape,
    LayerTimes,
    PredictedTime,
    break_even,
    cost_model,
    find_expert_shape,
)
from placer.target.engine import Engine, Transfer
from placer.target.hardware import Hardware, Link, known_hardware
from placer.trace import Chunk

SLOW_GPU = Hardware(
    name="toy",
    bf16_flops=1e6,
    fp8_flops=2e6,
    memory_bandwidth=1e5,
    fast=Link(bandwidth=1000, latency=0.5),
    slow=Link(bandwidth=100, latency=2.0),
)
#: 3 x 10 x 20 = 600 weights of two bytes.
SMALL_EXPERT = ExpertShape(hidden_size=10, intermediate_size=20)
BF16 = Transfer(exchange="per-rank", element="bf16")


def model_of(num_nodes=1, expert=SMALL_EXPERT, hardware=SLOW_GPU):
    return CostModel(
        hardware=hardware,
        expert=expert,
        dispatch=BF16,
        combine=BF16,
        num_nodes=num_nodes,
    )


def one_batch(rows, sequence_ids):
    return Chunk(
        experts=(np.array(rows, dtype=np.uint8),),
        sequence_ids=np.array(sequence_ids, dtype=np.int32),
        positions=np.zeros(len(rows), dtype=np.int32),
    )


def time_of(placement, tokens, cost):
    size = tokens.num_tokens // placement.num_ranks
    size = -(-tokens.num_tokens // placement.num_ranks)
    shape = BatchShape(tokens_per_rank=size, batching="decode")
    options = BatchOptions(policy="fixed", exchanges=(cost.dispatch.exchange,) * 2)
    return batch_steps(placement, tokens, shape, options).figures(cost).time


def test_a_layer_on_one_node_by_hand():
    """Two ranks with experts 0, 1 and 2, 3; the tokens are at home on 0, 1, 0, 1.

    Rank 0 serves 6 pairs with 2 experts: arithmetic 6 x 2 x 600 / 1e6 = 7.2 ms, reading
    2 x 1200 bytes / 1e5 = 24 ms, the longer. It receives tokens 1 and 3 and sends token 2:
    2 copies x 20 bytes / 1000 = 40 ms.
    """
    tokens = one_batch([[0, 1], [0, 1], [0, 2], [0, 3]], [0, 1, 2, 3])
    found = time_of(contiguous((4,), 2), tokens, model_of())
    assert found.compute == pytest.approx(0.024)
    assert found.dispatch == pytest.approx(0.5 + 0.040)
    assert found.combine == pytest.approx(0.5 + 0.040)
    assert found.latency == 1.0
    assert found.transfer == pytest.approx(0.080)
    assert found.total == pytest.approx(0.024 + 1.08)
    assert found.overlapped == pytest.approx(1.08)
    assert found.to_json()["total_us"] == pytest.approx(1_104_000)


def test_arithmetic_counts_where_it_is_the_longer():
    """300 pairs of one expert: 300 x 1200 / 1e6 = 0.36 s, reading it 12 ms."""
    tokens = one_batch([[0]] * 300, [0] * 300)
    found = time_of(contiguous((2,), 2), tokens, model_of())
    assert found.compute == pytest.approx(0.36)
    quantised = model_of(expert=replace(SMALL_EXPERT, weight_bytes=1))
    assert time_of(contiguous((2,), 2), tokens, quantised).compute == pytest.approx(0.18)


def test_the_slow_link_decides_between_nodes():
    """Four ranks on two nodes, one token at home on rank 0 that visits 1, 2 and 3.

    One fast copy (20 bytes / 1000) beside two slow ones (40 bytes / 100), for each of the
    four tokens of the batch that it stands for.
    """
    found = time_of(contiguous((4,), 4, 2), one_batch([[1, 2, 3]], [0]), model_of(2))
    assert found.dispatch == pytest.approx(2.0 + 4 * 0.4)
    assert found.latency == 4.0


def test_the_busiest_rank_and_not_the_mean_decides():
    """One expert on each of four ranks: all tokens on one rank take four times as long."""
    even = one_batch([[0], [1], [2], [3]] * 50, np.arange(200))
    one = one_batch([[0]] * 200, np.arange(200))
    cost = model_of()
    placement = contiguous((4,), 4)
    assert time_of(placement, one, cost).compute == pytest.approx(
        4 * time_of(placement, even, cost).compute
    )


def predicted(compute, transfer):
    return PredictedTime(
        compute=compute,
        dispatch=transfer / 2 + 1,
        combine=transfer / 2 + 1,
        latency=2.0,
        total=compute + transfer + 2,
        total_p95=0,
        overlapped=0,
    )


@pytest.mark.parametrize(
    ("plan", "other", "pays", "bandwidth"),
    [
        # 3 s more computation for 6 s less transfer at 1000 bytes/s: pays below 2000.
        (predicted(5, 2), predicted(2, 8), "below", 2000),
        # 1 s less computation for 4 s more transfer: only with links 4 times as fast.
        (predicted(1, 6), predicted(2, 2), "above", 4000),
        (predicted(1, 1), predicted(2, 2), "always", None),
        (predicted(2, 1), predicted(2, 2), "always", None),
        (predicted(2, 2), predicted(2, 2), "never", None),
        (predicted(3, 3), predicted(2, 2), "never", None),
        (predicted(3, 2), predicted(2, 2), "never", None),
        # Differences of less than a second.
        (predicted(1.5, 1.5), predicted(2, 2), "always", None),
        (predicted(2.5, 2.5), predicted(2, 2), "never", None),
        (predicted(2.5, 1.5), predicted(2, 2), "below", 1000),
        (predicted(1.5, 2.5), predicted(2, 2), "above", 1000),
    ],
)
def test_break_even_by_hand(plan, other, pays, bandwidth):
    found = break_even(plan, other, model_of())
    assert (found.pays, found.bandwidth) == (pays, bandwidth)


def test_a_break_even_is_told_in_gigabytes_per_second():
    found = BreakEven(pays="below", bandwidth=2.3456789e9)
    assert found.words == "is faster below 2.35 GB/s"
    assert found.to_json() == {"pays": "below", "bandwidth_gb_per_s": 2.346}
    assert BreakEven(pays="never", bandwidth=None).to_json() == {
        "pays": "never",
        "bandwidth_gb_per_s": None,
    }


def test_times_of_batches_are_averaged_by_hand():
    """21 batches of two layers: 1 to 21 s of computation, 2 or 4 s each way."""
    layers = [
        LayerTimes(
            compute=np.arange(1.0, 22),
            dispatch=np.full(21, way),
            combine=way * np.ones(21),
            fixed=0.5,
        )
        for way in (2.0, 4.0)
    ]
    found = PredictedTime.of(layers)
    assert (found.compute, found.dispatch, found.combine) == (11, 3, 3)
    assert (found.latency, found.total, found.transfer) == (0.5, 17, 5.5)
    # Of 42 totals, 5 to 25 and 9 to 29, the 39th of 0 to 41, and 0.95 of a second more.
    totals = sorted([*range(5, 26), *range(9, 30)])
    assert found.total_p95 == pytest.approx(totals[38] + 0.95 * (totals[39] - totals[38]))
    longer = [max(n, 2 * way) for way in (2, 4) for n in range(1, 22)]
    assert found.overlapped == pytest.approx(sum(longer) / 42)
    assert replace(found, compute=1.23456e-6).to_json()["compute_us"] == 1.235


def test_a_cost_model_takes_hardware_and_the_size_of_an_expert():
    assert cost_model(None, None, BF16, BF16, 1) is None
    with pytest.raises(UsageError, match="needs the size of an expert"):
        cost_model(SLOW_GPU, None, BF16, BF16, 1)
    assert cost_model(SLOW_GPU, SMALL_EXPERT, BF16, BF16, 1) == model_of()
    assert SMALL_EXPERT.num_bytes == 1200
    # Where the size comes from makes it no other size.
    assert replace(SMALL_EXPERT, assumption="bf16") == SMALL_EXPERT


def test_at_the_break_even_bandwidth_both_take_the_same_time():
    """Serve again with links of exactly that bandwidth.

    Most tokens use 0 and 1, the others 2 and 3: together they are sent less, apart the
    ranks are even.
    """
    tokens = one_batch([[0, 1]] * 60 + [[2, 3]] * 20, np.arange(80))
    together = contiguous((4,), 2, 2)
    placements = together, Placement.from_expert_rank([np.array([0, 1, 0, 1])], 2, 2)
    cost = model_of(2)
    one, other = (time_of(placement, tokens, cost) for placement in placements)
    found = break_even(one, other, cost)
    assert found.pays == "below"
    factor = found.bandwidth / SLOW_GPU.slow.bandwidth
    scaled = replace(
        SLOW_GPU,
        fast=replace(SLOW_GPU.fast, bandwidth=SLOW_GPU.fast.bandwidth * factor),
        slow=replace(SLOW_GPU.slow, bandwidth=SLOW_GPU.slow.bandwidth * factor),
    )
    again = [time_of(p, tokens, model_of(2, hardware=scaled)).total for p in placements]
    assert again[0] == pytest.approx(again[1])


def test_known_hardware_has_sources():
    for name, hardware in known_hardware().items():
        assert hardware.name == name
        assert hardware.source.startswith("https://")
        assert hardware.notes
        assert hardware.fast.bandwidth > hardware.slow.bandwidth
        assert Hardware.named(name) is hardware


def test_b200s_fast_link_reproduces_the_measured_dispatch():
    """TensorRT-LLM's table for 8 ranks: tokens of 14336 bytes per rank, microseconds."""
    link = known_hardware()["b200"].fast
    for tokens, measured in ((2048, 311.8e-6), (1024, 166.3e-6), (512, 89.5e-6)):
        copies = tokens * 8 * 7 / 8
        assert link.latency + copies * 14336 / link.bandwidth == pytest.approx(
            measured, rel=0.05
        )


def test_a_users_hardware_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "bf16_flops = 1e15\nfp8_flops = 2e15\nmemory_bandwidth = 3e12\n"
        "fast = { bandwidth = 4e11, latency = 1e-5 }\n"
        "slow = { bandwidth = 5e10, latency = 2e-5 }\n"
    )
    hardware = Hardware.named(str(path))
    assert (hardware.name, hardware.slow.bandwidth) == ("mine", 5e10)
    assert hardware.flops(2) == 1e15
    assert hardware.flops(0.5) == 2e15


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16_flops = 1e15", "it lacks fp8_flops"),
        ("this is not TOML", "is not valid TOML"),
        (
            "bf16_flops = 0\nfp8_flops = 2e15\nmemory_bandwidth = 3e12\n"
            "fast = { bandwidth = 4e11, latency = 1e-5 }\n"
            "slow = { bandwidth = 5e10, latency = 2e-5 }",
            "bf16_flops is 0, expected a number > 0",
        ),
        (
            "bf16_flops = 1\nfp8_flops = 2e15\nmemory_bandwidth = 3e12\n"
            "fast = { bandwidth = -1, latency = 1e-5 }\n"
            "slow = { bandwidth = 5e10, latency = 2e-5 }",
            "fast.bandwidth is -1, expected a number > 0",
        ),
    ],
)
def test_a_hardware_file_that_cannot_be_meant_is_refused(tmp_path, text, message):
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(PlacerError, match=message):
        Hardware.named(str(path))


def test_unknown_hardware_lists_what_is_known():
    with pytest.raises(UsageError, match="--hardware h300 is not known") as error:
        Hardware.named("h300")
    assert "h200" in error.value.hint
    with pytest.raises(PlacerError, match="does not exist"):
        Hardware.named("nowhere.toml")


def test_the_size_of_an_expert_comes_from_the_checkpoint_or_the_user(tiny_model):
    """The tiny Qwen3-MoE: hidden 32, experts of width 16."""
    assert find_expert_shape(tiny_model, None, None, 2.0) == ExpertShape(
        hidden_size=32, intermediate_size=16
    )
    assert find_expert_shape(tiny_model, None, None, None).weight_bytes == 4  # float32
    assert find_expert_shape(None, 10, 20, 1.0).num_weights == 600
    assert find_expert_shape(None, 10, None, 2.0) is None
    for width, weight_bytes in ((-1, 2.0), (20, 0.0), (20, np.nan), (20, np.inf)):
        with pytest.raises(UsageError, match="must be positive"):
            find_expert_shape(None, 10, width, weight_bytes)


def test_experts_whose_weights_alone_are_quantised_compute_in_bf16(tiny_model, tmp_path):
    """In a batch whose arithmetic takes longer than reading: half as fast as in fp8."""
    config = json.loads((tiny_model / "config.json").read_text())
    times = {}
    for method in ("fp8", "gptq"):
        config["quantization_config"] = {"quant_method": method, "bits": 8}
        (tmp_path / "config.json").write_text(json.dumps(config))
        cost = model_of(expert=find_expert_shape(tmp_path, None, None, None))
        tokens = one_batch([[0]] * 3000, [0] * 3000)
        times[method] = time_of(contiguous((2,), 2), tokens, cost).compute
    assert times["gptq"] == pytest.approx(2 * times["fp8"])


@pytest.mark.parametrize(
    ("name", "weight_bytes", "told"),
    [
        (None, 2, "weights are bf16"),
        ("sglang-none", 2, "weights are bf16"),
        (
            "sglang-deepep",
            1,
            "weights are fp8 (bytes each: 1), as sglang-deepep dispatches",
        ),
    ],
)
def test_weights_that_nobody_sized_are_those_of_the_engine_and_it_is_said(
    name, weight_bytes, told
):
    engine = None if name is None else Engine.named(name)
    found = find_expert_shape(None, 10, 20, None, engine)
    assert found.weight_bytes == weight_bytes
    assert told in found.assumption
    assert find_expert_shape(None, 10, 20, 2.0, engine).assumption is None
