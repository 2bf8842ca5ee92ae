"""Ids never seen take the row of their nearest neighbour in a real checkpoint file."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from placer.errors import PlacerError
from placer.simulation import contiguous
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
    with CheckpointEmbeddings(folder) as embeddings:
        assert embeddings.num_rows == 4
        found = nearest_seen(embeddings, np.array([0, 1]), np.array([2, 3]))
    assert found.tolist() == [1, 0]


def test_agrees_with_a_full_search_over_many_blocks(tmp_path):
    """2,500 ids are read in three blocks; the oracle holds all of them at once."""
    rng = np.random.default_rng(0)
    folder = write_checkpoint(tmp_path / "model", rng.normal(size=(2_500, 8)))
    seen = np.sort(rng.permutation(2_500)[:700])
    unseen = np.setdiff1d(np.arange(2_500), seen)
    with CheckpointEmbeddings(folder) as embeddings:
        rows = embeddings.rows(0, 2_500).astype(np.float64)
        found = nearest_seen(embeddings, seen, unseen)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit[unseen] @ unit[seen].T
    chosen = cosine[np.arange(len(unseen)), found]
    assert np.allclose(chosen, cosine.max(axis=1), atol=1e-6)


def test_a_zero_row_and_no_unseen_id_are_served(tmp_path):
    folder = write_checkpoint(tmp_path / "model", [[1.0, 0.0], [0.0, 0.0]])
    with CheckpointEmbeddings(folder) as embeddings:
        assert nearest_seen(embeddings, np.array([0]), np.array([1])).tolist() == [0]
        none = np.array([], dtype=np.int64)
        assert nearest_seen(embeddings, np.array([0, 1]), none).tolist() == []


def test_a_table_gives_unseen_ids_their_neighbours_rows(tmp_path, make_chunk):
    """50 ids are seen; id 50 + n has the embedding of id n, so it takes its row."""
    rows = np.random.default_rng(1).normal(size=(50, 16))
    folder = write_checkpoint(tmp_path / "model", np.vstack([rows, rows]))
    with CheckpointEmbeddings(folder) as embeddings:
        table = build_table(
            contiguous((8,) * 3, 4), make_chunk(), vocab_size=100, embeddings=embeddings
        )
    for values in (table.token_rank.T, table.token_confidence.T, table.request_score):
        assert np.array_equal(values[50:], values[:50])


def test_an_embedding_that_is_too_short_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "model", [[1.0], [2.0]])
    with (
        CheckpointEmbeddings(folder) as embeddings,
        pytest.raises(PlacerError, match="has 2 rows, but the vocabulary has token id 7"),
    ):
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
    with pytest.raises(PlacerError, match="cannot be read"):
        CheckpointEmbeddings(tmp_path)
