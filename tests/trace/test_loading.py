"""A model that transformers cannot load is named, with the reason."""

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from placer.checkpoint.export import export_checkpoint
from placer.cli.main import main
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


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    tiny_model: Path,
    make_plan: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By record, and by verify of logits; ids that the model embeds are taken."""
    model, text = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "text.txt"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"added{number}" for number in range(60)])
    tokenizer.save_pretrained(model)
    export_checkpoint(make_plan(model), model, tmp_path / "exported")
    text.write_text("one two added50 three " * 20)
    lines = (
        f"record {model} --corpus {text} --out {tmp_path / 'trace'}",
        f"verify {model} {tmp_path / 'exported'} {make_plan(model)} --corpus {text}",
    )
    for line in lines:
        with pytest.raises(SystemExit) as ended:
            main(line.split())
        said = capsys.readouterr().err
        assert ended.value.code == 1
        assert f"the tokenizer of {model} gives token id 3" in said
        assert "the model embeds only 320 ids" in said
    assert not (tmp_path / "trace").exists()
    text.write_text("one two added0 three " * 20)
    with pytest.raises(SystemExit) as ended:
        main(lines[0].split())
    assert ended.value.code == 0
