"""Files of one model that hold other layers are told apart from files of two models."""

import json
from pathlib import Path

import pytest

from placer.errors import UsageError
from placer.model import ModelSpec, require_same_model

CONFIG = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 5,
    "num_hash_layers": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 16,
    "vocab_size": 4,
}


@pytest.fixture
def whole(tmp_path: Path) -> ModelSpec:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return ModelSpec.from_checkpoint(tmp_path)


@pytest.mark.parametrize("plan_is_whole", [True, False])
def test_layers_that_one_file_lacks_are_named(
    whole: ModelSpec, plan_is_whole: bool
) -> None:
    part = whole.without_layers([0, 1])
    plan, trace = (whole, part) if plan_is_whole else (part, whole)
    lacks = "TRACE" if plan_is_whole else "PLAN"
    with pytest.raises(UsageError, match=f"one model, but {lacks} lacks .* 0, 1") as caught:
        require_same_model(plan, "PLAN", trace, "TRACE")
    assert "--skip-layers 0,1" in caught.value.hint
    assert require_same_model(part, "PLAN", part, "TRACE") is None


def test_another_model_with_fewer_layers_is_another_model(
    whole: ModelSpec, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 32}))
    other = ModelSpec.from_checkpoint(tmp_path).without_layers([0, 1])
    with pytest.raises(UsageError, match="are of different models"):
        require_same_model(whole, "PLAN", other, "TRACE")
