"""Tokens follow their experts only through layers whose every part is known."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AttentionInterface

from placer.errors import PlacerError
from placer.model import Architecture, ModelSpec
from placer.replay.follow import FollowRun, why_not_follow
from placer.replay.kinds import FOLLOW
from placer.replay.sharding import ExpertsModule, experts_modules
from placer.run.documents import read_json
from tests.families import build


def experts_of(model: Any, folder: Path) -> list[ExpertsModule]:
    model.save_pretrained(folder)
    architecture = Architecture.of(read_json(folder / "config.json", "config"), folder)
    return experts_modules(model, architecture, ModelSpec.from_checkpoint(folder))


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("afmoe", {}, "layer 0 has post_mlp_layernorm"),
        ("jamba", {}, "layer 0 has mamba"),
        ("lfm2_moe", {}, "layer 0 has ffn_norm"),
        ("deepseek_v32", {}, "the attention of layer 0 has indexer"),
        ("granitemoe", {"residual_multiplier": 0.22}, "a residual_multiplier of 0.22"),
    ],
)
def test_a_layer_that_does_more_is_refused(
    tmp_path: Path,
    one_rank: dist.ProcessGroup,
    model_type: str,
    options: dict[str, Any],
    reason: str,
) -> None:
    model = build(model_type, **options)
    experts = experts_of(model, tmp_path / "model")
    assert reason in (why_not_follow(model, experts) or "")
    with pytest.raises(PlacerError, match=r"cannot move to their experts: .*layer 0"):
        FollowRun(
            model,
            experts,
            slot_rank=(),
            local_slot=(),
            group=one_rank,
            counter=None,
            watch=lambda *_: None,
        )


@pytest.mark.parametrize(
    "model_type", ["deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "qwen3_moe"]
)
def test_layers_of_attention_and_a_block_are_taken(tmp_path: Path, model_type: str) -> None:
    model = build(model_type)
    assert why_not_follow(model, experts_of(model, tmp_path)) is None


def test_the_model_is_afterwards_as_before(
    tmp_path: Path, one_rank: dist.ProcessGroup
) -> None:
    """On one rank tokens stay, and what was installed is gone afterwards."""
    model = build("qwen3_moe")
    experts = experts_of(model, tmp_path / "model")
    everything = torch.arange(8)
    run = FollowRun(
        model,
        experts,
        slot_rank=[torch.zeros_like(everything)] * len(experts),
        local_slot=[everything] * len(experts),
        group=one_rank,
        counter=None,
        watch=lambda *_: None,
    )
    ids = torch.arange(10).reshape(2, 5)
    before = model.config._attn_implementation
    with torch.no_grad():
        expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        with pytest.raises(KeyboardInterrupt), run.installed():
            found = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            raise KeyboardInterrupt
        again = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert run.place.tolist() == list(range(10))
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(again, expected)
    assert model.config._attn_implementation == before
    assert FOLLOW not in AttentionInterface().valid_keys()
