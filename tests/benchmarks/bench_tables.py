"""Token shuffling beside the forward pass that it serves, and the size of a large table."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from placer.demo.road import shipped_model
from placer.model import ModelSpec
from placer.placement.reference import contiguous
from placer.shuffle import ShuffleTable
from placer.table import Table, build_table
from placer.trace import Chunk, Trace
from placer.trace.loading import load_model

RANKS = 8
TOKENS, LENGTH = 8192, 256
NOWHERE = np.zeros(TOKENS, dtype=np.int64)
ROUNDS = 15
SEEDS = range(5)
# Aimed at: this share of a layer's forward pass, or this time.
SHARE, NANOSECONDS = 0.01, 50
# DeepSeek-V2: MoE layers, vocabulary, routed experts, top-k.
LAYERS, VOCABULARY, EXPERTS, TOP_K = 60, 102_400, 160, 6


@pytest.fixture(scope="module")
def trace() -> Chunk:
    return Trace(shipped_model().parent / "traces" / "final").read()


def drawn(trace: Chunk, seed: int) -> Chunk:
    """Draw whole sequences of 256 tokens, 8,192 in all."""
    ids, lengths = np.unique(trace.sequence_ids, return_counts=True)
    full = ids[lengths == LENGTH]
    chosen = np.random.default_rng(seed).choice(full, TOKENS // LENGTH, replace=False)
    return trace.select(np.isin(trace.sequence_ids, chosen))


def ordered(home: np.ndarray) -> np.ndarray:
    """Return the tokens by home: of bytes, NumPy sorts in linear time."""
    order: np.ndarray = np.argsort(home.astype(np.uint8), kind="stable")
    return order


def plain_seconds(table: ShuffleTable, tokens: Chunk) -> list[float]:
    """Time look-up, order and the majority ranks that later layers need, per layer."""
    assert tokens.token_ids is not None
    history: list[np.ndarray] = []
    took = []
    for layer, experts in enumerate(tokens.experts):
        began = time.perf_counter()
        home, _ = table.homes(layer, tokens.token_ids, history, NOWHERE)
        ordered(home)
        history.append(table.majority_ranks(layer, experts))
        took.append(time.perf_counter() - began)
    return took


def combined_seconds(table: ShuffleTable, tokens: Chunk) -> list[float]:
    """The same by the combined rule, which needs no majority ranks."""
    assert tokens.token_ids is not None
    took = []
    for layer in range(len(tokens.experts)):
        began = time.perf_counter()
        past = tokens.experts[:layer]
        home, _ = table.combined_homes(layer, tokens.token_ids, past, NOWHERE)
        ordered(home)
        took.append(time.perf_counter() - began)
    return took


def layer_seconds(model: Any, batch: torch.Tensor) -> list[float]:
    """Time each decoder layer in one forward pass."""
    began: list[float] = []
    took: list[float] = []
    hooks = []
    for layer in model.model.layers:
        hooks += [
            layer.register_forward_pre_hook(lambda *_: began.append(time.perf_counter())),
            layer.register_forward_hook(
                lambda *_: took.append(time.perf_counter() - began[-1])
            ),
        ]
    with torch.inference_mode():
        model.model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return took


def test_shuffling_beside_a_layer(trace: Chunk, tmp_path: Path) -> None:
    directory = shipped_model()
    model, _ = load_model(directory, dtype="auto", device="cpu")
    spec = ModelSpec.from_checkpoint(directory)
    assert spec.vocab_size is not None
    placement = contiguous(spec.num_experts, RANKS)
    build_table(placement, trace, vocab_size=spec.vocab_size, with_combined=True).write(
        tmp_path / "table"
    )
    table = ShuffleTable.read(tmp_path / "table")
    last = f"combined rule, {spec.num_layers - 1} past layers"
    shares: dict[str, list[float]] = {}
    per_token: dict[str, list[float]] = {}
    for seed in SEEDS:
        tokens = drawn(trace, seed)
        batch = torch.tensor(tokens.token_ids).long().view(-1, LENGTH)
        plain, combined, layers = [], [], []
        for _ in range(ROUNDS):
            plain.append(plain_seconds(table, tokens))
            combined.append(combined_seconds(table, tokens))
            layers += layer_seconds(model, batch)
        layer = statistics.median(layers)
        print(f"\nseed {seed}: forward pass of a layer {1e3 * layer:.1f} ms")
        for name, took in {
            "plain rule": np.median(plain, axis=0).mean(),
            "combined rule": np.median(combined, axis=0).mean(),
            last: np.median(combined, axis=0)[-1],
        }.items():
            shares.setdefault(name, []).append(float(took / layer))
            per_token.setdefault(name, []).append(float(1e9 * took / TOKENS))
            print(
                f"  {name}: look up and order {TOKENS:,} tokens in a layer in "
                f"{1e6 * took:.0f} us, {per_token[name][-1]:.1f} ns per token, "
                f"{took / layer:.2%} of it"
            )
    print(f"medians over the seeds (aimed at: {NANOSECONDS} ns per token, or {SHARE:.0%})")
    for name, found in per_token.items():
        print(
            f"  {name}: {statistics.median(found):.1f} ns per token, "
            f"{statistics.median(shares[name]):.2%}"
        )


def test_a_table_of_the_size_of_deepseek_v2(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = (EXPERTS,) * LAYERS
    lookback = 4
    histories = (LAYERS, RANKS**lookback)

    def ranks(*shape: int) -> np.ndarray:
        return rng.integers(RANKS, size=shape, dtype=np.uint8)

    def rates(*shape: int) -> np.ndarray:
        return rng.random(shape, dtype=np.float32).astype(np.float16)

    table = Table(
        model=ModelSpec(num_experts=sizes, top_k=TOP_K),
        num_ranks=RANKS,
        num_nodes=1,
        lookback=lookback,
        token_rank=ranks(LAYERS, VOCABULARY),
        token_confidence=rates(LAYERS, VOCABULARY),
        history_rank=ranks(*histories),
        history_confidence=rates(*histories),
        request_score=rates(VOCABULARY, RANKS),
        expert_rank=ranks(LAYERS, EXPERTS),
    )
    path = tmp_path / "table"
    table.write(path)
    held = ShuffleTable.read(path)
    tokens = Chunk(
        experts=tuple(
            rng.integers(EXPERTS, size=(TOKENS, TOP_K), dtype=np.uint8) for _ in sizes
        ),
        sequence_ids=np.zeros(TOKENS, np.int32),
        positions=np.arange(TOKENS, dtype=np.int32),
        token_ids=rng.integers(VOCABULARY, size=TOKENS, dtype=np.int32),
    )
    took = np.median([plain_seconds(held, tokens) for _ in range(ROUNDS)], axis=0).mean()
    print(
        f"\n{LAYERS} x {VOCABULARY:,} ids, {RANKS} ranks: "
        f"{path.stat().st_size / 1e6:.1f} MB on disk (25 are aimed at); "
        f"{1e9 * took / TOKENS:.1f} ns per token and layer"
    )
