"""Every family's checkpoint, permuted, is the same model, and its inverse the same bytes.

The oracle is transformers: it loads both directories as it loads any other.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from placer.checkpoint.export import export_checkpoint, restore_checkpoint
from placer.checkpoint.verify import verify
from placer.model import ModelSpec
from placer.plan import Placement
from tests.families import FAMILIES, build, legal_rows, oracle, randomise

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


def run(directory: Path) -> tuple[torch.Tensor, list[list[set[int]]]]:
    """Logits, and per MoE layer the experts of every token, of a directory as loaded."""
    model, info = AutoModelForCausalLM.from_pretrained(
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


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_permuted_checkpoint_is_the_same_model(
    model_type: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    randomise(build(model_type)).save_pretrained(model)
    spec = ModelSpec.from_checkpoint(model)
    rows = legal_rows(spec, seed=3)
    plan = plan_of(rows, spec, write_plan)
    export_checkpoint(plan, model, tmp_path / "out")
    (before, asked), (after, asked_then) = run(model), run(tmp_path / "out")
    assert (before - after).abs().max() <= TOLERANCE * before.abs().max()
    assert len(asked) == len(asked_then) == spec.num_layers
    for row, old, new in zip(rows, asked, asked_then, strict=True):
        assert [{row[e] for e in chosen} for chosen in new] == old
    assert verify(model, tmp_path / "out", plan, [], 0).num_tensors > 0
    restore_checkpoint(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(model)
