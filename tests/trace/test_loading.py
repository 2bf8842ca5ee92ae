"""A model that transformers cannot load is named, with the reason."""

import shutil
from pathlib import Path

import pytest

from placer.errors import PlacerError
from placer.trace.loading import load_causal_model


def test_a_shard_that_was_cut_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    for shard in (tmp_path / "model").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(PlacerError, match=r"cannot load .*model: .*not fully covered"):
        load_causal_model(tmp_path / "model", dtype="float32", device="cpu")
