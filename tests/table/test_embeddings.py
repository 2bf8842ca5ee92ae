"""Ids never seen take the row of their nearest neighbour in a real checkpoint file."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from placer.errors import PlacerError
from placer.placement.reference import contiguous
from placer.table import build_table
from placer.table.embeddings import CheckpointEmbeddings, nearest_seen


def write_checkpoint(folder, rows, name="model.embed_tokens.weight", *, sharded=False):
    """A checkpoint that holds nothing but an embedding, in bfloat16."""
    folder.mkdir(exist_ok=True)
    file = "model-00001-of-00001.safetensors" if sharded else "model.safetensors"
    save_file({name: torch.as_tensor(rows, dtype=torch.bfloat16)}, folder / file)
    if sharded:
        index = {"weight_map": {name: file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
def test_neighbours_by_cosine_not_by_distance(tmp_path, sharded):
    """Ids 0 and 1 are seen. Id 2 points along id 1 but is much longer; id 3 along id 0."""
    rows = [[1.0, 0.0], [0.0, 1.0], [3.0, 90.0], [0.5, 0.125]]
    folder = write_checkpoint(tmp_path / "model", rows, sharded=sharded)
    embeddings = CheckpointEmbeddings(folder)
    assert embeddings.num_rows == 4
    found = nearest_seen(embeddings, np.array([0, 1]), np.array([2, 3]))
    assert found.tolist() == [1, 0]


def test_agrees_with_a_full_search_over_many_blocks(tmp_path):
    """2,500 ids are read in three blocks; the oracle holds all of them at once."""
    rng = np.random.default_rng(0)
    folder = write_checkpoint(tmp_path / "model", rng.normal(size=(2_500, 8)))
    seen = np.sort(rng.permutation(2_500)[:700])
    unseen = np.setdiff1d(np.arange(2_500), seen)
    embeddings = CheckpointEmbeddings(folder)
    rows = embeddings.rows(0, 2_500).astype(np.float64)
    found = nearest_seen(embeddings, seen, unseen)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit[unseen] @ unit[seen].T
    chosen = cosine[np.arange(len(unseen)), found]
    assert np.allclose(chosen, cosine.max(axis=1), atol=1e-6)


def test_a_zero_row_and_no_unseen_id_are_served(tmp_path):
    folder = write_checkpoint(tmp_path / "model", [[1.0, 0.0], [0.0, 0.0]])
    embeddings = CheckpointEmbeddings(folder)
    assert nearest_seen(embeddings, np.array([0]), np.array([1])).tolist() == [0]
    none = np.array([], dtype=np.int64)
    assert nearest_seen(embeddings, np.array([0, 1]), none).tolist() == []


def test_a_table_gives_unseen_ids_their_neighbours_rows(tmp_path, make_chunk):
    """50 ids are seen; id 50 + n has the embedding of id n, so it takes its row."""
    rows = np.random.default_rng(1).normal(size=(50, 16))
    folder = write_checkpoint(tmp_path / "model", np.vstack([rows, rows]))
    table = build_table(
        contiguous((8,) * 3, 4),
        make_chunk(),
        vocab_size=100,
        embeddings=CheckpointEmbeddings(folder),
        unseen="nearest",
    )
    for values in (table.token_rank.T, table.token_confidence.T, table.request_score):
        assert np.array_equal(values[50:], values[:50])


def test_an_embedding_that_is_too_short_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "model", [[1.0], [2.0]])
    embeddings = CheckpointEmbeddings(folder)
    with pytest.raises(PlacerError, match="has 2 rows, but the vocabulary has token id 7"):
        nearest_seen(embeddings, np.array([0]), np.array([7]))


def test_a_checkpoint_without_an_embedding_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "model", [[1.0]], name="lm_head.weight")
    with pytest.raises(PlacerError, match="no embedding tensor") as error:
        CheckpointEmbeddings(folder)
    assert "model.embed_tokens.weight" in error.value.hint


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(PlacerError, match=r"neither model\.safetensors") as error:
        CheckpointEmbeddings(tmp_path)
    assert "--embeddings MODEL" in error.value.hint


def test_an_index_that_points_outside_is_refused(tmp_path):
    index = {"weight_map": {"model.embed_tokens.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PlacerError, match="is a path"):
        CheckpointEmbeddings(tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(PlacerError, match="does not fit"):
        CheckpointEmbeddings(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_those_that_torch_reads(tmp_path, dtype):
    rows = torch.randn(1_500, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    name = "model.embed_tokens.weight"
    save_file(
        {"lm_head.weight": rows[:3].clone(), name: rows}, tmp_path / "model.safetensors"
    )
    found = CheckpointEmbeddings(tmp_path).rows(1_020, 1_030)
    assert np.array_equal(found, rows[1_020:1_030].float().numpy())


@pytest.mark.parametrize("values", [torch.ones(4), torch.ones(4, 2, dtype=torch.int8)])
def test_an_embedding_of_no_known_type_is_refused(tmp_path, values):
    save_file({"model.embed_tokens.weight": values}, tmp_path / "model.safetensors")
    with pytest.raises(PlacerError, match="expected BF16, F16, F32 of two dimensions"):
        CheckpointEmbeddings(tmp_path)


def test_parts_of_the_seen_ids_find_the_same_and_bound_the_memory(tmp_path):
    """16 MiB of float32; with 1 MiB for seen rows no more than 12 MiB are held."""
    rng = np.random.default_rng(0)
    folder = write_checkpoint(tmp_path / "model", rng.normal(size=(16_384, 256)))
    seen = np.sort(rng.permutation(16_384)[:8_000])
    unseen = np.setdiff1d(np.arange(16_384), seen)
    embeddings = CheckpointEmbeddings(folder)
    whole, whole_peak = traced(lambda: nearest_seen(embeddings, seen, unseen))
    parts, parts_peak = traced(lambda: nearest_seen(embeddings, seen, unseen, 2**20))
    assert np.array_equal(whole, parts)
    assert whole_peak > 32 * 2**20
    assert parts_peak < 12 * 2**20


def traced(work):
    """Return what ``work`` returns, and the most bytes that NumPy held meanwhile."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_of_equally_near_ids_the_lowest_wins_across_parts(tmp_path):
    folder = write_checkpoint(tmp_path / "model", [[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
    embeddings = CheckpointEmbeddings(folder)
    seen, unseen = np.array([0, 1]), np.array([2])
    assert nearest_seen(embeddings, seen, unseen, seen_bytes=1).tolist() == [0]
