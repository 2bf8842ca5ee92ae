"""An exported checkpoint is the same function, and its inverse the same bytes."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from placer.checkpoint.export import export_checkpoint, restore_checkpoint
from placer.checkpoint.verify import verify
from placer.errors import PlacerError, VerificationError
from placer.plan import Plan

MakePlan = Callable[..., Path]
TEXTS = ["def add(one, two):\n    return one + two\n" * 8]


def hashes(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(params=["tiny_model", "tiny_sharded_model"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_greedy_text_of_the_export_is_that_of_the_original(
    model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    """The oracle is transformers itself, in float32."""
    export_checkpoint(make_plan(model), model, tmp_path / "out")
    old = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    prompts = torch.randint(0, 300, (4, 6), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompts)
    before = old.generate(prompts, attention_mask=mask, **options)
    after = new.generate(prompts, attention_mask=mask, **options)
    assert torch.equal(before, after)


def test_expert_and_router_move_together(
    model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan_path = make_plan(model)
    export_checkpoint(plan_path, model, tmp_path / "out")
    plan = Plan.read(plan_path)
    old, new = ({} for _ in range(2))
    for tensors, folder in ((old, model), (new, tmp_path / "out")):
        for shard in folder.glob("*.safetensors"):
            tensors.update(load_file(shard))
    assert old.keys() == new.keys()
    for n, layer in enumerate(plan.model.layer_ids):
        row = plan.placement.physical_to_logical_map[n].tolist()
        prefix = f"model.layers.{layer}.mlp"
        for e, source in enumerate(row):
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = f"{prefix}.experts.{{}}.{part}.weight"
                assert torch.equal(new[name.format(e)], old[name.format(source)])
            router = f"{prefix}.gate.weight"
            assert torch.equal(new[router][e], old[router][source])
    assert any(not torch.equal(old[name], new[name]) for name in old)


def test_inverse_restores_every_file_bit_for_bit(
    model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    before = hashes(model)
    export_checkpoint(make_plan(model), model, tmp_path / "out")
    restore_checkpoint(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == before
    assert hashes(model) == before, "the source is never touched"


def test_inverse_keeps_a_header_formatted_by_hand(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    """Spaces, order and padding of a foreign writer's header survive the round trip."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    path = model / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(dict(reversed(header.items())), indent=1).encode()
    text = text.ljust(len(text) + 24, b" ")
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    before = hashes(model)
    export_checkpoint(make_plan(model), model, tmp_path / "out")
    restore_checkpoint(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == before


def test_verify_passes_an_export_and_counts_what_it_compared(
    model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(model)
    export_checkpoint(plan, model, tmp_path / "out")
    report = verify(model, tmp_path / "out", plan, TEXTS, 64)
    assert report.num_tensors == sum(len(load_file(p)) for p in model.glob("*.safetensors"))
    assert report.num_tokens == 64
    assert report.max_logit_difference <= report.tolerance
    assert report.num_routed_pairs == 64 * 2 * 2
    assert report.num_ties == 0


def corrupt(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_verify_finds_one_flipped_bit(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(tiny_model)
    export_checkpoint(plan, tiny_model, tmp_path / "out")
    name = "model.layers.3.mlp.experts.5.up_proj.weight"

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(torch.uint8).view(-1)[7] ^= 1

    corrupt(tmp_path / "out", flip)
    with pytest.raises(VerificationError, match=name) as caught:
        verify(tiny_model, tmp_path / "out", plan, TEXTS, 64)
    assert caught.value.exit_code == 5


def test_verify_finds_swapped_router_rows(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(tiny_model)
    export_checkpoint(plan, tiny_model, tmp_path / "out")
    name = "model.layers.1.mlp.gate.weight"

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][[1, 0, 2, 3, 4, 5, 6, 7]].contiguous()

    corrupt(tmp_path / "out", swap)
    with pytest.raises(VerificationError, match=name):
        verify(tiny_model, tmp_path / "out", plan, TEXTS, 64)


def test_running_the_models_finds_what_tensors_alone_would_not(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tensor check out of the way, routing is what differs first."""
    plan = make_plan(tiny_model)
    export_checkpoint(plan, tiny_model, tmp_path / "out")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.gate.weight"
        tensors[name] = tensors[name].flip(0).contiguous()

    corrupt(tmp_path / "out", swap)
    monkeypatch.setattr("placer.checkpoint.verify._compare_tensors", lambda *_: (0, 0))
    with pytest.raises(VerificationError, match="MoE layer 0: token 0"):
        verify(tiny_model, tmp_path / "out", plan, TEXTS, 64)


def test_verify_refuses_the_export_of_another_plan(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    export_checkpoint(make_plan(tiny_model, seed=1), tiny_model, tmp_path / "out")
    with pytest.raises(VerificationError, match="from another plan"):
        verify(tiny_model, tmp_path / "out", make_plan(tiny_model, seed=2), TEXTS, 0)


def refused(plan: Path, model: Path, out: Path, match: str) -> PlacerError:
    with pytest.raises(PlacerError, match=match) as caught:
        export_checkpoint(plan, model, out)
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()
    return caught.value


def test_what_cannot_be_exported_leaves_nothing(
    tiny_model: Path,
    tiny_sharded_model: Path,
    make_plan: MakePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, out = make_plan(tiny_model), tmp_path / "out"
    refused(plan, tiny_sharded_model, out, "different models: fingerprint|num_experts")
    refused(plan, tmp_path / "nowhere", out, "does not exist")

    copy = tmp_path / "truncated"
    shutil.copytree(tiny_model, copy)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(plan, copy, out, "is damaged: its tensors end")

    tensors = load_file(tiny_model / "model.safetensors")
    odd = tmp_path / "odd"
    shutil.copytree(tiny_model, odd)
    extra = {"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(2)}
    save_file(tensors | extra, odd / "model.safetensors")
    refused(plan, odd, out, "mlp.experts.gate_up_proj cannot be classified")

    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, odd / "model.safetensors")
    refused(plan, odd, out, "lacks up_proj.weight of expert 2")

    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    assert "df -h" in refused(plan, tiny_model, out, "0 bytes free").hint


def test_a_write_that_fails_midway_leaves_nothing(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    plan = make_plan(tiny_model)
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(plan, tiny_model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [plan.name]


def test_an_index_that_reaches_outside_is_refused(
    tiny_sharded_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_sharded_model, copy)
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../secret.safetensors"
    path.write_text(json.dumps(index))
    refused(make_plan(tiny_sharded_model), copy, tmp_path / "out", r"\.\./secret")


def test_an_export_is_not_exported_again(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(tiny_model)
    export_checkpoint(plan, tiny_model, tmp_path / "out")
    error = refused(plan, tmp_path / "out", tmp_path / "twice", "already permuted")
    assert "--inverse" in error.hint
