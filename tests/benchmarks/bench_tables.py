"""Token shuffling beside the forward pass that it serves, and the size of a large table."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from placer.demo.road import shipped_model
from placer.model import ModelSpec
from placer.shuffle import ShuffleTable
from placer.simulation.baselines import contiguous
from placer.table import Table, build_table
from placer.trace import Chunk, Trace
from placer.trace.record import load_model

RANKS = 8
TOKENS, LENGTH = 8192, 256
ROUNDS = 15
SEEDS = range(5)
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


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def shuffle_layer(
    table: ShuffleTable, layer: int, tokens: Chunk, history: list[np.ndarray]
) -> np.ndarray:
    """Look up homes, order the tokens by home, note the majority ranks for later layers."""
    assert tokens.token_ids is not None
    home, _ = table.homes(layer, tokens.token_ids, history, np.zeros(TOKENS, np.int64))
    order: np.ndarray = np.argsort(home.astype(np.uint8), kind="stable")
    history.append(table.majority_ranks(layer, tokens.experts[layer]))
    return order


def shuffle_all_combined(table: ShuffleTable, tokens: Chunk) -> None:
    """The same by the combined rule, which needs no majority ranks."""
    assert tokens.token_ids is not None
    nowhere = np.zeros(TOKENS, np.int64)
    for layer in range(len(tokens.experts)):
        past = tokens.experts[:layer]
        home, _ = table.combined_homes(layer, tokens.token_ids, past, nowhere)
        np.argsort(home.astype(np.uint8), kind="stable")


def shuffle_all(table: ShuffleTable, tokens: Chunk) -> None:
    history: list[np.ndarray] = []
    for layer in range(len(tokens.experts)):
        shuffle_layer(table, layer, tokens, history)


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
    shares = []
    combined_shares = []
    for seed in SEEDS:
        tokens = drawn(trace, seed)
        batch = torch.tensor(tokens.token_ids).long().view(-1, LENGTH)
        shuffled, combined, layers = [], [], []
        for _ in range(ROUNDS):
            whole = seconds(lambda: shuffle_all(table, tokens))  # noqa: B023
            shuffled.append(whole / spec.num_layers)
            whole = seconds(lambda: shuffle_all_combined(table, tokens))  # noqa: B023
            combined.append(whole / spec.num_layers)
            layers += layer_seconds(model, batch)
        took, layer = statistics.median(shuffled), statistics.median(layers)
        shares.append(took / layer)
        print(
            f"\nseed {seed}: {1e6 * took:.0f} us to look up and order {TOKENS:,} tokens in "
            f"a layer ({1e9 * took / TOKENS:.1f} ns per token), {took / layer:.2%} of the "
            f"{1e3 * layer:.1f} ms of its forward pass"
        )
        took = statistics.median(combined)
        combined_shares.append(took / layer)
        print(
            f"combined rule: {1e6 * took:.0f} us ({1e9 * took / TOKENS:.1f} ns per token), "
            f"{took / layer:.2%}"
        )
    print(f"median over seeds {statistics.median(shares):.2%} (1 % or 50 ns are aimed at)")
    print(f"combined rule: {statistics.median(combined_shares):.2%}")


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
    took = [seconds(lambda: shuffle_all(held, tokens)) / LAYERS for _ in range(ROUNDS)]
    print(
        f"\n{LAYERS} x {VOCABULARY:,} ids, {RANKS} ranks: "
        f"{path.stat().st_size / 1e6:.1f} MB on disk (25 are aimed at); "
        f"{1e9 * statistics.median(took) / TOKENS:.1f} ns per token and layer"
    )
