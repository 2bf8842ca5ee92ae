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


def test_layers_of_a_file_without_a_model_must_be_those_of_the_other(
    whole: ModelSpec,
) -> None:
    """Equal shapes are not enough where both name the model's own layers."""

    def unbound(ids: tuple[int, ...] | None) -> ModelSpec:
        return ModelSpec(num_experts=(8,) * 5, top_k=0, layer_ids=ids)

    for ids in (None, (0, 1, 2, 3, 4)):
        assert "by shape only" in str(
            require_same_model(unbound(ids), "MAP", whole, "TRACE")
        )
    for ids in ((3, 4, 5, 6, 7), (1, 0, 2, 3, 4)):
        for one, other in ((unbound(ids), whole), (whole, unbound(ids))):
            with pytest.raises(UsageError, match=r"where one has layer \d, the other has"):
                require_same_model(one, "MAP", other, "TRACE")
