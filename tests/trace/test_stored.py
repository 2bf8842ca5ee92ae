"""Tokens whose experts stay on disk are the tokens that a trace holds."""

import os

import numpy as np
import pytest

from placer.errors import PlacerError, SourceChangedError
from placer.model import ModelSpec
from placer.trace import Chunk, Fold, Selection, StoredTokens, Trace, TraceWriter

MODEL = ModelSpec(num_experts=(8, 300), top_k=2, vocab_size=50)
ONE_LAYER = ModelSpec(num_experts=(8,), top_k=2, vocab_size=50)


def write(directory, *, of_sequences, model=MODEL):
    """Write a trace with a chunk for each list of sequences, three tokens each."""
    rng = np.random.default_rng(0)
    with TraceWriter(directory=directory, model=model, domains=("a", "b")) as writer:
        for sequences in of_sequences:
            number = 3 * len(sequences)
            first = [rng.integers(0, size - 1, number) for size in model.num_experts]
            dtypes = (np.uint8, np.int16)
            writer.append(
                Chunk(
                    experts=tuple(
                        np.stack([one, one + 1], axis=1).astype(dtype)
                        for one, dtype in zip(first, dtypes, strict=False)
                    ),
                    weights=tuple(np.full((number, 2), 0.5, np.float16) for _ in first),
                    token_ids=rng.integers(0, 50, number, np.int32),
                    sequence_ids=np.repeat(np.array(sequences, np.int32), 3),
                    positions=np.tile(np.arange(3, dtype=np.int32), len(sequences)),
                    domain_ids=np.repeat(np.array(sequences, np.uint8) % 2, 3),
                    phase=np.tile(np.array([0, 0, 1], np.uint8), len(sequences)),
                )
            )
        writer.finish()
    return Trace(directory)


@pytest.mark.parametrize(
    "of_sequences", [[[0, 1, 2], [3, 4]], [[3, 4], [0, 2], [1, 5]], [[7]]]
)
@pytest.mark.parametrize(
    "selection",
    [Selection(), Selection(fold=Fold(1, 2)), Selection(phase="decode")],
    ids=["all", "fold", "decode"],
)
def test_they_are_what_is_read_into_memory(tmp_path, of_sequences, selection):
    """Also where chunks are not in the order of their sequences, or one keeps none."""
    trace = write(tmp_path / "trace", of_sequences=of_sequences)
    wanted, found = trace.read(selection), StoredTokens.of(trace, selection)
    assert found.num_tokens == wanted.num_tokens
    assert len(found.experts) == len(wanted.experts)
    for name in ("token_ids", "sequence_ids", "domain_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    for ours, theirs in zip(found.experts, wanted.experts, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(found.experts[1:][0], wanted.experts[1])


def test_a_model_of_one_layer(tmp_path):
    trace = write(tmp_path / "trace", of_sequences=[[0], [1]], model=ONE_LAYER)
    found, wanted = StoredTokens.of(trace), trace.read()
    assert len(found.experts) == 1
    np.testing.assert_array_equal(found.experts[0], wanted.experts[0])


def test_what_is_refused_in_memory_is_refused(tmp_path):
    trace = write(tmp_path / "trace", of_sequences=[[0, 2]])
    with pytest.raises(PlacerError, match="no token is left"):
        StoredTokens.of(trace, Selection(fold=Fold(1, 2)))
    path = tmp_path / "trace" / "chunk-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PlacerError, match="is damaged"):
        StoredTokens.of(trace)


@pytest.mark.parametrize("change", ["content", "other file", "removed"])
def test_a_chunk_that_changes_meanwhile_ends_it(tmp_path, change):
    trace = write(tmp_path / "trace", of_sequences=[[0, 1]])
    tokens = StoredTokens.of(trace)
    path = tmp_path / "trace" / "chunk-00000.safetensors"
    data = path.read_bytes()
    if change == "removed":
        path.unlink()
        with pytest.raises(PlacerError, match="does not exist"):
            tokens.experts[0]
        return
    if change == "other file":
        path.rename(tmp_path / "kept")
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))
    with pytest.raises(SourceChangedError, match="changed while it was read"):
        tokens.experts[0]
