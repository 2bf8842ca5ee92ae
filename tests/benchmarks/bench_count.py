"""Counting speed: all counts of ``placer affinity`` beside a bare loop of bincount."""

import statistics
import time

import numpy as np

from placer.affinity import count_affinity
from placer.model import ModelSpec
from placer.trace import Chunk

TOKENS, LAYERS, TOP_K, EXPERTS = 65_536, 26, 6, 64
ROUNDS = 5


def chunk(seed: int) -> Chunk:
    rng = np.random.default_rng(seed)
    return Chunk(
        experts=tuple(
            rng.permuted(np.tile(np.arange(EXPERTS, dtype=np.uint8), (TOKENS, 1)), axis=1)[
                :, :TOP_K
            ].copy()
            for _ in range(LAYERS)
        ),
        sequence_ids=np.repeat(np.arange(TOKENS // 256), 256).astype(np.int32),
        positions=np.tile(np.arange(256), TOKENS // 256).astype(np.int32),
    )


def plain_transitions(tokens: Chunk) -> list[np.ndarray]:
    """The yardstick: nothing but one bincount per pair of columns."""
    found = []
    for first, second in zip(tokens.experts, tokens.experts[1:], strict=False):
        counts = np.zeros(EXPERTS * EXPERTS, np.int64)
        for a in range(TOP_K):
            for b in range(TOP_K):
                keys = first[:, a].astype(np.intp) * EXPERTS + second[:, b]
                counts += np.bincount(keys, minlength=EXPERTS * EXPERTS)
        found.append(counts)
    return found


def test_counting_speed() -> None:
    tokens = chunk(0)
    model = ModelSpec(num_experts=(EXPERTS,) * LAYERS, top_k=TOP_K)
    ratios, seconds = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        expected = plain_transitions(tokens)
        middle = time.perf_counter()
        counted = count_affinity([tokens], model, {}, with_rows=False)
        ended = time.perf_counter()
        ratios.append((ended - middle) / (middle - began))
        seconds.append(ended - middle)
    for one, other in zip(counted.transition, expected, strict=True):
        assert (one.ravel() == other).all()
    print(
        f"\ncounting load, transitions and co-activation, {TOKENS:,} tokens x {LAYERS} "
        f"layers x top {TOP_K} of {EXPERTS}: {TOKENS / statistics.median(seconds):,.0f} "
        f"tokens/s on one core, {statistics.median(ratios):.2f} times the time of a bare "
        "bincount loop over the transitions alone"
    )
