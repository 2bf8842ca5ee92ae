"""A wrong data file of a family is refused with the field, the value and the remedy."""

import tomllib
from importlib import resources
from pathlib import Path

import pytest

from placer.errors import PlacerError
from placer.model.architecture import read_architecture
from placer.model.tensor_layout import TensorKind

FILES = sorted(
    Path(str(resources.files("placer.model") / "architectures")).glob("*.toml"),
    key=lambda path: path.name,
)
GOOD = """
model_types = ["mine"]
[config]
top_k = ["moe_k"]
[tensors]
block = ["model.layers.{layer}.mlp"]
expert = ["experts.{expert}.{name}"]
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('["mine"]', '"mine"', 'model_types is "mine", expected a list'),
        ('["mine"]', "[]", r"model_types is \[\], expected a list of length >= 1"),
        ('["mine"]', "[3]", r"model_types\[0\] is 3, expected a text"),
        ("model_types", "model_type", "lacks model_types|unknown field model_type"),
        ("top_k", "topk", "config has the unknown field topk"),
        ('["moe_k"]', '"moe_k"', 'config.top_k is "moe_k", expected a list'),
        ('["moe_k"]', '[""]', r'config.top_k\[0\] is ""'),
        ("top_k", 'layers = "some"\ntop_k', 'config.layers is "some", allowed are all, '),
        ("top_k", 'grouped_if = ["a"]\ntop_k', r"config.grouped_if is .*a.*, expected"),
        ("block", "blocks", "tensors (lacks block|has the unknown field blocks)"),
        ("{layer}", "0", r'tensors.block\[0\] is "model.layers.0.mlp"'),
        ("{expert}", "0", r'tensors.expert\[0\] is "experts.0.{name}"'),
        ("[tensors]", '[modules]\nrouter = "gate"\n[tensors]', 'modules.router is "gate"'),
        ("[tensors]", "[names]\n[tensors]", "has the unknown field names"),
        ("[config]", "[[config]]", "config is .*, expected an object"),
        ("[config]", "[config", "is not valid TOML"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(PlacerError, match=f"^mine.toml:? .*{said}") as caught:
        read_architecture(GOOD.replace(old, new).encode(), "mine.toml")
    if "TOML" not in said:
        assert caught.value.hint == "correct placer/model/architectures/mine.toml"


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_what_a_file_says_is_what_is_read(path: Path) -> None:
    """The oracle is the plain TOML: no list is lost or moved to another field."""
    plain = tomllib.loads(path.read_text(encoding="utf-8"))
    read = read_architecture(path.read_bytes(), path.name)
    assert list(read.model_types) == plain["model_types"]
    config = plain.get("config", {})
    assert read.layers == config.pop("layers", "all")
    assert read.nested_in == config.pop("nested_in", None)
    assert list(read.grouped_if or ()) == config.pop("grouped_if", [])
    assert {name: list(read.config[name]) for name in config} == config
    tensors = plain.get("tensors", {})
    assert (read.layout is None) == (not tensors)
    if read.layout is not None:
        assert list(read.layout.blocks) == tensors["block"]
        for kind in (TensorKind.EXPERT, TensorKind.STACKED, TensorKind.BIAS):
            assert list(read.layout.rules[kind]) == tensors.get(kind, [])
