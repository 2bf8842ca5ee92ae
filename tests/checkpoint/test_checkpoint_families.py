"""Every family's checkpoint, permuted, is the same model, and its inverse the same bytes.

The oracle is transformers: it loads both directories as it loads any other.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from placer.checkpoint.export import export_checkpoint, prepare_restore
from placer.checkpoint.verify import verify
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement import Placement
from placer.report.checkpoint import Checkpoint
from tests.families import (
    FAMILIES,
    SMALL,
    VISION,
    build,
    build_vision,
    legal_rows,
    oracle,
    randomise,
)

WritePlan = Callable[..., Path]
# Of the largest logit; float32, where experts are added up in another order.
TOLERANCE = 1e-5


def plan_of(rows: list[list[int]], model: ModelSpec, write_plan: WritePlan) -> Path:
    placement = Placement.from_json(rows, model.num_experts, num_ranks=4, num_nodes=1)
    return write_plan(model, placement)


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def run(
    directory: Path, load: type[Any] = AutoModelForCausalLM
) -> tuple[torch.Tensor, list[list[set[int]]]]:
    """Logits, and per MoE layer the experts of every token, of a directory as loaded."""
    model, info = load.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids).logits
    called = oracle(model, ids)
    return logits, [called[name] for name in sorted(called, key=number)]


def number(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


@pytest.fixture(autouse=True)
def letters_are_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have no tokenizer."""

    def load(directory: Path, **_: str) -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return model.eval(), lambda text, verbose: {
            "input_ids": [ord(c) % 60 for c in text]
        }

    monkeypatch.setattr("placer.checkpoint.verify.load_model", load)


def check(model: Path, load: type[Any], write_plan: WritePlan, tmp_path: Path) -> None:
    """Export at random, compare what is loaded, restore."""
    spec = ModelSpec.from_checkpoint(model)
    rows = legal_rows(spec, seed=3)
    plan = plan_of(rows, spec, write_plan)
    export_checkpoint(plan, model, tmp_path / "out")
    (before, asked), (after, asked_then) = run(model, load), run(tmp_path / "out", load)
    assert (before - after).abs().max() <= TOLERANCE * before.abs().max()
    assert len(asked) == len(asked_then) == spec.num_layers
    for row, old, new in zip(rows, asked, asked_then, strict=True):
        assert [{row[e] for e in chosen} for chosen in new] == old
    assert verify(model, tmp_path / "out", plan, [], 0).num_tensors > 0
    if load is AutoModelForCausalLM:
        report = verify(model, tmp_path / "out", plan, ["any text of 20 tokens"], 20)
        assert report.num_tokens == 20
        assert report.num_ties < 5
    prepare_restore(tmp_path / "out").write(tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(model)
    groups = Checkpoint.read(model).groups
    weights = 2 if spec.model_type == "nemotron_h" else 3  # not gated
    size = sum(spec.num_experts) * weights * 4 * SMALL["hidden_size"] * 16
    assert groups["experts"].num_bytes >= size
    assert groups["router"].num_tensors >= spec.num_layers


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_permuted_checkpoint_is_the_same_model(
    model_type: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    randomise(build(model_type)).save_pretrained(tmp_path / "model")
    check(tmp_path / "model", AutoModelForCausalLM, write_plan, tmp_path)


@pytest.mark.parametrize("model_type", sorted(VISION))
def test_the_permuted_vision_language_checkpoint_is_the_same_model(
    model_type: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    build_vision(model_type).save_pretrained(tmp_path / "model")
    check(tmp_path / "model", AutoModelForImageTextToText, write_plan, tmp_path)


@pytest.mark.parametrize("model_type", ["deepseek_v4", "mixtral", "qwen3_moe"])
def test_the_names_that_transformers_has_in_memory_are_known_too(
    model_type: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    model = randomise(build(model_type))
    model.save_pretrained(tmp_path / "model", save_original_format=False)
    check(tmp_path / "model", AutoModelForCausalLM, write_plan, tmp_path)


def test_zero_experts_are_refused_with_the_reason(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    """LongCat's router picks among experts that are none, behind the real ones."""
    spec = ModelSpec(num_experts=(8, 8), top_k=2)
    plan = plan_of(legal_rows(spec, seed=0), spec, write_plan)
    model = tmp_path / "model"
    CONFIG_MAPPING["longcat_flash"]().save_pretrained(model)
    with pytest.raises(PlacerError, match="also picks zero experts"):
        export_checkpoint(plan, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
