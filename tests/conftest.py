"""Small real things that many tests share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from placer.model import ModelSpec
from placer.trace import Chunk, Trace, TraceWriter

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared_traces() -> Path:
    """The folder of real router traces, which does not come with the repository."""
    folder = SHARED / "traces"
    if not folder.is_dir():
        pytest.skip("the real traces are not here: no ../shared/traces beside the checkout")
    return folder


@pytest.fixture
def make_chunk() -> Callable[..., Chunk]:
    """Return a builder of random routing in which neighbouring layers are linked."""

    def build(
        *,
        num_tokens: int = 400,
        num_experts: tuple[int, ...] = (8, 8, 8),
        top_k: int = 2,
        num_sequences: int = 8,
        vocab_size: int = 50,
        seed: int = 0,
    ) -> Chunk:
        rng = np.random.default_rng(seed)
        token_ids = rng.integers(vocab_size, size=num_tokens)
        experts = []
        for layer, size in enumerate(num_experts):
            taste = np.random.default_rng(1000 + layer).gumbel(size=(vocab_size, size))
            score = taste[token_ids] + rng.gumbel(size=(num_tokens, size))
            experts.append(np.argsort(-score, axis=1)[:, :top_k].astype(np.uint8))
        sequence_ids = np.sort(rng.integers(num_sequences, size=num_tokens)).astype(
            np.int32
        )
        starts = np.searchsorted(sequence_ids, sequence_ids)
        return Chunk(
            experts=tuple(experts),
            token_ids=token_ids.astype(np.int32),
            sequence_ids=sequence_ids,
            positions=(np.arange(num_tokens) - starts).astype(np.int32),
        )

    return build


@pytest.fixture
def make_trace(tmp_path: Path, make_chunk: Callable[..., Chunk]) -> Callable[..., Trace]:
    """Return a builder of a trace on disk, with the routing of ``make_chunk``."""

    def build(name: str = "trace", **options: object) -> Trace:
        chunk = make_chunk(**options)
        sizes = options.get("num_experts", (8, 8, 8))
        model = ModelSpec(num_experts=sizes, top_k=chunk.experts[0].shape[1])
        with TraceWriter(directory=tmp_path / name, model=model) as writer:
            writer.append(chunk)
            writer.finish()
        return Trace(tmp_path / name)

    return build
