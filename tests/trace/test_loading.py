"""A model that transformers cannot load is named, with the reason."""

import shutil
import tomllib
from pathlib import Path

import pytest

from placer.errors import PlacerError
from placer.trace.loading import load_causal_model

ROOT = Path(__file__).parents[2]


def test_a_shard_that_was_cut_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    for shard in (tmp_path / "model").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(PlacerError, match=r"cannot load .*model: .*not fully covered"):
        load_causal_model(tmp_path / "model", dtype="float32", device="cpu")


def test_a_transformers_whose_routers_would_be_misread_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the oldest that the package asks for."""
    monkeypatch.setattr("transformers.__version__", "5.14.1")
    with pytest.raises(PlacerError, match=r"5\.14\.1 is too old") as told:
        load_causal_model(tiny_model, dtype="float32", device="cpu")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = project["optional-dependencies"]["record"]
    assert told.value.hint == f"pip install --upgrade '{wanted}'"
    monkeypatch.setattr("transformers.__version__", "5.15.0.dev0")
    assert load_causal_model(tiny_model, dtype="float32", device="cpu")
