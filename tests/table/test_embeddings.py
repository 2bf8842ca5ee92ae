"""The embedding of a checkpoint, read from real files."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from placer.errors import PlacerError
from placer.table.embeddings import CheckpointEmbeddings, require_rows


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
def test_rows_are_found_with_and_without_an_index(tmp_path, sharded):
    rows = [[1.0, -2.0], [0.5, 4.0]]
    folder = write_checkpoint(tmp_path / "model", rows, sharded=sharded)
    assert CheckpointEmbeddings(folder).rows(0, 2).tolist() == rows


def test_an_embedding_that_is_too_short_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "model", [[1.0], [2.0]])
    embeddings = CheckpointEmbeddings(folder)
    with pytest.raises(PlacerError, match="has 2 rows, but the vocabulary has token id 7"):
        require_rows(embeddings, 7)


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
