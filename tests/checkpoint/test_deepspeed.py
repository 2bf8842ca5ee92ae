"""A permuted DeepSpeed-MoE checkpoint is the same function on every rank, and comes back.

The files are laid out as ``DeepSpeedEngine._save_moe_checkpoint`` lays them out; the oracle
loads them rank by rank as ``load_moe_state_dict`` does, and runs the layers.
"""

import argparse
import json
import os
import random
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from placer.checkpoint import deepspeed
from placer.checkpoint.deepspeed import export_deepspeed, restore_deepspeed
from placer.checkpoint.verify_deepspeed import verify_deepspeed
from placer.cli.main import main
from placer.errors import PlacerError, SourceChangedError, VerificationError
from placer.model import ModelSpec
from placer.placement import Placement

WritePlan = Callable[..., Path]
HIDDEN, WIDTH, MP_RANKS = 8, 12, 2
# Pyramid-residual: layers differ in experts.
NUM_EXPERTS = (4, 8)
MODULES = ("transformer.layers.1.mlp", "transformer.layers.3.mlp")


def name_of(layer: int, expert: int, mp: int) -> str:
    return f"layer_{layer}_expert_{expert}_mp_rank_{mp:02d}_model_states.pt"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder of a tag: two MoE layers, two model-parallel ranks."""
    torch.manual_seed(0)
    folder = tmp_path / "saved" / "global_step10"
    folder.mkdir(parents=True)
    (tmp_path / "saved" / "latest").write_text("global_step10")
    gates = {}
    for module, size in zip(MODULES, NUM_EXPERTS, strict=True):
        gates[f"{module}.deepspeed_moe.gate.wg.weight"] = torch.randn(size, HIDDEN)
        gates[f"{module}.mlp.fc.weight"] = torch.randn(HIDDEN, HIDDEN)
        gates[f"{module}.coefficient.weight"] = torch.randn(2, HIDDEN)
    for mp in range(MP_RANKS):
        module = {"embed.weight": torch.randn(10, HIDDEN)} | gates
        state = {"module": module, "num_experts": list(NUM_EXPERTS), "global_steps": 10}
        torch.save(state, folder / f"mp_rank_{mp:02d}_model_states.pt")
        for layer, (prefix, size) in enumerate(zip(MODULES, NUM_EXPERTS, strict=True)):
            for expert in range(size):
                key = f"{prefix}.deepspeed_moe.experts.deepspeed_experts.{expert}"
                tensors = {
                    f"{key}.dense_h_to_4h.weight": torch.randn(WIDTH, HIDDEN),
                    f"{key}.dense_4h_to_h.weight": torch.randn(HIDDEN, WIDTH),
                }
                torch.save(tensors, folder / name_of(layer, expert, mp))
    (folder / "zero_to_fp32.py").write_text("# comes along\n")
    # Written even where there is no optimizer.
    torch.save({"optimizer": None}, folder / "expp_rank_0_mp_rank_00_optim_states.pt")
    return folder


def make_plan(write_plan: WritePlan, sizes: tuple[int, ...], seed: int = 0) -> Path:
    rows = []
    for size in sizes:
        row = list(range(size))
        random.Random(seed).shuffle(row)
        rows.append(row)
    placement = Placement.from_json(rows, sizes, num_ranks=2, num_nodes=1)
    return write_plan(ModelSpec(num_experts=sizes, top_k=2), placement)


@pytest.fixture
def plan(write_plan: WritePlan) -> Path:
    return make_plan(write_plan, NUM_EXPERTS)


def run(folder: Path, layer: int, mp: int, tokens: torch.Tensor) -> torch.Tensor:
    """Top 2 of a layer whose experts two ranks load, each its consecutive half."""
    main_file = torch.load(folder / f"mp_rank_{mp:02d}_model_states.pt", weights_only=True)
    prefix, size = MODULES[layer], NUM_EXPERTS[layer]
    gate = main_file["module"][f"{prefix}.deepspeed_moe.gate.wg.weight"]
    weights, chosen = torch.softmax(tokens @ gate.T, dim=1).topk(2, dim=1)
    out = torch.zeros_like(tokens)
    for rank in range(2):
        for local in range(size // 2):
            expert = rank * (size // 2) + local
            state = torch.load(folder / name_of(layer, expert, mp), weights_only=True)
            local_state = {
                key.replace(
                    f"deepspeed_experts.{expert}.", f"deepspeed_experts.{local}."
                ): v
                for key, v in state.items()
            }
            key = f"{prefix}.deepspeed_moe.experts.deepspeed_experts.{local}"
            up = local_state[f"{key}.dense_h_to_4h.weight"]
            down = local_state[f"{key}.dense_4h_to_h.weight"]
            share = (weights * (chosen == expert)).sum(dim=1, keepdim=True)
            out += share * (torch.relu(tokens @ up.T) @ down.T)
    return out


def test_the_layers_compute_the_same_on_every_model_parallel_rank(
    checkpoint: Path, plan: Path, tmp_path: Path
) -> None:
    report = export_deepspeed(plan, checkpoint, tmp_path / "out")
    assert (report.num_layers, report.num_expert_files, report.num_gates) == (2, 24, 4)
    tokens = torch.randn(50, HIDDEN)
    for layer in range(2):
        for mp in range(MP_RANKS):
            before = run(checkpoint, layer, mp, tokens)
            after = run(tmp_path / "out", layer, mp, tokens)
            assert torch.allclose(before, after, atol=1e-6)
            assert before.abs().max() > 0.1
    assert (tmp_path / "out" / "zero_to_fp32.py").exists()


def test_arguments_and_random_states_of_megatron_come_along(
    checkpoint: Path, plan: Path, tmp_path: Path
) -> None:
    path = checkpoint / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=True)
    state["args"] = argparse.Namespace(num_experts=[4], lr=0.1)
    state["rng_state"] = [{"np_rng_state": np.random.RandomState(3).get_state()}]
    torch.save(state, path)
    export_deepspeed(plan, checkpoint, tmp_path / "out")
    found = torch.load(tmp_path / "out" / path.name, weights_only=False)
    assert found["args"] == state["args"]
    old, new = (one["rng_state"][0]["np_rng_state"] for one in (state, found))
    assert old[0] == new[0]
    assert np.array_equal(old[1], new[1])


def everything(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*_model_states.pt")):
        value = torch.load(path, weights_only=True)
        for key, tensor in value.get("module", value).items():
            found[f"{path.name}/{key}"] = tensor
    return found


def test_only_experts_and_gates_change_and_the_inverse_undoes_it(
    checkpoint: Path, plan: Path, tmp_path: Path
) -> None:
    export_deepspeed(plan, checkpoint.parent, tmp_path / "out")
    before, after = everything(checkpoint), everything(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(".deepspeed_moe." in key for key in changed)
    restore_deepspeed(tmp_path / "out", tmp_path / "back")
    back = everything(tmp_path / "back")
    assert back.keys() == before.keys()
    assert all(torch.equal(back[key], before[key]) for key in before)
    assert not (tmp_path / "back" / "placer.json").exists()
    export_deepspeed(plan, checkpoint, tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_verify_counts_all_tensors_and_finds_a_change(
    checkpoint: Path, plan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_deepspeed(plan, checkpoint, out)
    assert verify_deepspeed(checkpoint, out, plan) == len(everything(out))
    for name in (name_of(1, 3, 0), "mp_rank_01_model_states.pt"):
        value = torch.load(out / name, weights_only=True)
        tensors = value.get("module", value)
        key = max(tensors)
        tensors[key] = tensors[key] + 1
        kept = (out / name).read_bytes()
        torch.save(value, out / name)
        with pytest.raises(
            VerificationError, match="differs from the original under the plan"
        ):
            verify_deepspeed(checkpoint, out, plan)
        (out / name).write_bytes(kept)
    (out / name_of(1, 3, 0)).unlink()
    with pytest.raises(PlacerError, match="lacks layer_1_expert_3_mp_rank_00"):
        verify_deepspeed(checkpoint, out, plan)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("expp_rank_0_mp_rank_00_optim_states.pt", "optimizer states"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "optimizer states"),
        ("expert_0_mp_rank_00_model_states.pt", "one file holds all layers of an expert"),
        ("layer_00-model_states.pt", "pipeline-parallel checkpoint"),
        ("layer_03-model_00-model_states.pt", "pipeline-parallel checkpoint"),
        ("other_states.pt", "belongs to no expert"),
    ],
)
def test_what_cannot_be_permuted_is_refused_with_the_reason(
    checkpoint: Path, plan: Path, tmp_path: Path, name: str, match: str
) -> None:
    torch.save({"optimizer": {"state": {0: torch.ones(2)}}}, checkpoint / name)
    refused(plan, checkpoint, tmp_path, match)


def refused(plan: Path, checkpoint: Path, tmp_path: Path, match: str) -> None:
    with pytest.raises(PlacerError, match=match) as caught:
        export_deepspeed(plan, checkpoint, tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_damaged_and_foreign_files_are_refused(
    checkpoint: Path, plan: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    main_file = checkpoint / "mp_rank_01_model_states.pt"
    good = torch.load(main_file, weights_only=True)
    gate = f"{MODULES[0]}.deepspeed_moe.gate.wg.weight"

    def save_main(change: dict[str, object], module: dict[str, torch.Tensor]) -> None:
        torch.save(good | {"module": good["module"] | module} | change, main_file)

    save_main({"optimizer": {"state": {0: 1}}}, {})
    refused(plan, checkpoint, tmp_path, "optimizer states")
    save_main({}, {gate: torch.zeros(3, HIDDEN)})
    refused(plan, checkpoint, tmp_path, "its number of rows is not that of the experts, 4")
    save_main({}, {gate.replace("weight", "bias"): torch.zeros(4)})
    refused(plan, checkpoint, tmp_path, "wg.bias cannot be classified")
    save_main({"client": Path("x")}, {})
    refused(plan, checkpoint, tmp_path, "weights_only: it holds pathlib")
    save_main({}, {})
    torch.save(
        {"a.deepspeed_moe.experts.deepspeed_experts.9.w": torch.zeros(1)},
        checkpoint / name_of(0, 1, 0),
    )
    refused(plan, checkpoint, tmp_path, "does not belong to expert 1")
    (checkpoint / name_of(0, 1, 0)).unlink()
    refused(plan, checkpoint, tmp_path, "lacks layer_0_expert_1_mp_rank_00")
    refused(
        plan, tmp_path / "saved" / "nothing", tmp_path, "not a DeepSpeed-MoE checkpoint"
    )
    (tmp_path / "saved" / "latest").write_text("../elsewhere")
    refused(plan, tmp_path / "saved", tmp_path, "not a folder next to it")


def test_a_plan_of_another_shape_is_refused(
    checkpoint: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    refused(
        make_plan(write_plan, (4, 4)), checkpoint, tmp_path, r"\[4, 4\] .* has \[4, 8\]"
    )


def test_the_command_line_exports_verifies_and_restores(
    checkpoint: Path, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    for words in (
        ["export", "deepspeed", str(plan), str(checkpoint), "--out", out],
        ["verify", str(checkpoint), out, str(plan)],
        ["export", "deepspeed", out, "--inverse", "--out", str(tmp_path / "back")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0, capsys.readouterr().err
    assert "tensors equal bit for bit" in capsys.readouterr().out
    record = tmp_path / "out" / "placer.json"
    value = json.loads(record.read_text())
    assert "unchecked" not in capsys.readouterr().err
    record.write_text(json.dumps(value | {"permutation": [[0] * 4, list(range(8))]}))
    with pytest.raises(PlacerError, match="permutation does not fit"):
        restore_deepspeed(tmp_path / "out", tmp_path / "again")
    with pytest.raises(PlacerError, match="already permuted"):
        export_deepspeed(plan, tmp_path / "out", tmp_path / "again")


def edit_record(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the record as its author could: its own hash no longer shows it."""
    path = folder / "placer.json"
    value = json.loads(path.read_text()) | {"sha256": None}
    change(value)
    path.write_text(json.dumps(value))


def edit_state(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "mp_rank_00_model_states.pt"
    value = torch.load(path, weights_only=True)
    change(value)
    torch.save(value, path)


def swap_first(value: dict) -> None:
    row = value["permutation"][0]
    row[0], row[1] = row[1], row[0]


def forget_a_hash(value: dict) -> None:
    del value["file_sha256"][min(value["file_sha256"])]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: edit_record(f, swap_first), r"permutation\[0\] is"),
        (lambda f: edit_record(f, lambda v: v.update(plan_sha256="0" * 64)), "is of the"),
        (lambda f: (f / "placer.json").unlink(), "has no placer.json"),
        (lambda f: edit_state(f, lambda v: v.update(global_steps=11)), "global_steps"),
        (lambda f: edit_state(f, lambda v: v.update(global_steps=True)), "global_steps"),
        (lambda f: edit_state(f, lambda v: v.update(more=1)), "more"),
        (lambda f: edit_state(f, lambda v: v["num_experts"].reverse()), "num_experts"),
        (lambda f: (f / "zero_to_fp32.py").write_text("# goes along\n"), "zero_to_fp32"),
        (lambda f: (f / "more.txt").write_text(""), "has more.txt"),
        (lambda f: (f / "zero_to_fp32.py").unlink(), "lacks zero_to_fp32"),
        (lambda f: (f / "mp_rank_01_model_states.pt").unlink(), "lacks mp_rank_01"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe is not a file"),
        (
            lambda f: edit_record(f, forget_a_hash),
            "placer.json has no SHA-256 of expp_rank",
        ),
    ],
)
def test_every_file_and_field_is_compared(
    change: Callable[[Path], object],
    reason: str,
    checkpoint: Path,
    plan: Path,
    tmp_path: Path,
) -> None:
    export_deepspeed(plan, checkpoint, tmp_path / "out")
    verify_deepspeed(checkpoint, tmp_path / "out", plan)
    change(tmp_path / "out")
    with pytest.raises(PlacerError, match=reason):
        verify_deepspeed(checkpoint, tmp_path / "out", plan)


def test_another_model_s_plan_is_refused(
    checkpoint: Path, plan: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    export_deepspeed(plan, checkpoint, tmp_path / "out")
    other = make_plan(write_plan, (4, 4))
    with pytest.raises(PlacerError, match=r"is for \[4, 4\] experts per MoE layer"):
        verify_deepspeed(checkpoint, tmp_path / "out", other)


def test_the_record_holds_the_hash_of_every_file(
    checkpoint: Path, plan: Path, tmp_path: Path
) -> None:
    (checkpoint / "notes").mkdir()
    (checkpoint / "notes" / "placer.json").write_text("{}")
    out = tmp_path / "out"
    export_deepspeed(plan, checkpoint, out)
    files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    own = files.pop("placer.json")
    expected = {name: sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    record = json.loads(own.read_text())
    assert record["file_sha256"] == expected
    for name in ("zero_to_fp32.py", "notes/placer.json"):
        original = (checkpoint / name).read_bytes()
        assert expected[name] == sha256(original).hexdigest()
    value = {name: one for name, one in record.items() if name != "sha256"}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    assert record["sha256"] == sha256(text.encode()).hexdigest()


def test_flipped_bits_of_every_file_are_found(
    checkpoint: Path, plan: Path, tmp_path: Path
) -> None:
    """Padding of an archive too, which no comparison of tensors sees."""
    out = tmp_path / "out"
    export_deepspeed(plan, checkpoint, out)
    rng = random.Random(0)
    for path in sorted(out.iterdir()):
        good = path.read_bytes()
        for _ in range(6):
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(PlacerError):
                verify_deepspeed(checkpoint, out, plan)
            with pytest.raises(PlacerError):
                restore_deepspeed(out, tmp_path / "back")
            assert not (tmp_path / "back").exists()
        path.write_bytes(good)
    verify_deepspeed(checkpoint, out, plan)
    assert restore_deepspeed(out, tmp_path / "back").unchecked == ()


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_record_is_read_and_the_inverse_says_what_it_could_not_check(
    version: int,
    checkpoint: Path,
    plan: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    export_deepspeed(plan, checkpoint, out)
    record = out / "placer.json"
    value = json.loads(record.read_text())
    del value["file_sha256"], value["sha256"]
    record.write_text(json.dumps(value | {"schema_version": version}))
    assert verify_deepspeed(checkpoint, out, plan) == len(everything(out))
    back = str(tmp_path / "back")
    with pytest.raises(SystemExit) as ended:
        main(["export", "deepspeed", str(out), "--inverse", "--out", back, "--json"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert "not checked, because no hash of it was recorded" in said.err
    assert "mp_rank_00_model_states.pt" in said.err
    assert json.loads(said.out)["contents_checked"] is False


@pytest.mark.parametrize("restoring", [False, True])
def test_a_source_that_changes_meanwhile_ends_it(
    restoring: bool,
    checkpoint: Path,
    plan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export_deepspeed(plan, checkpoint, tmp_path / "out")
    source = tmp_path / "out" if restoring else checkpoint
    real = deepspeed._save

    def save(path: Path, value: dict) -> None:
        real(path, value)
        (source / "zero_to_fp32.py").write_text("# changed\n")

    monkeypatch.setattr(deepspeed, "_save", save)
    with pytest.raises(SourceChangedError, match=r"zero_to_fp32\.py changed while"):
        if restoring:
            restore_deepspeed(source, tmp_path / "new")
        else:
            export_deepspeed(plan, source, tmp_path / "new")
    assert not (tmp_path / "new").exists()
