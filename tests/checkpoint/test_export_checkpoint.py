"""An exported checkpoint is the same function, and its inverse the same bytes."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from placer.checkpoint.export import export_checkpoint, prepare_export, prepare_restore
from placer.checkpoint.writing import ExportOptions
from placer.errors import PlacerError, UsageError, VerificationError
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.run.parallel import Backend

MakePlan = Callable[..., Path]


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


def test_tasks_of_ray_write_the_same_bytes(
    ray_cluster: None,
    tiny_sharded_model: Path,
    make_plan: MakePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The workers' directory is another, and the paths are relative."""
    plan = make_plan(tiny_sharded_model)
    export_checkpoint(plan, tiny_sharded_model, tmp_path / "here")
    monkeypatch.chdir(tiny_sharded_model.parent)
    relative = Path(tiny_sharded_model.name)
    out = Path(os.path.relpath(tmp_path / "ray"))
    export_checkpoint(plan, relative, out, ExportOptions(backend=Backend(name="ray")))
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "here")
    with pytest.raises(UsageError, match="Ray chooses the number"):
        ExportOptions(backend=Backend(name="ray"), num_workers=2)


def test_a_shard_that_ends_early_stops_the_tasks_of_ray(
    ray_cluster: None, tiny_sharded_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_sharded_model, source)
    job = prepare_export(make_plan(tiny_sharded_model), source)
    shard = sorted(source.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-64])
    with pytest.raises(PlacerError):
        job.write(tmp_path / "out", ExportOptions(backend=Backend(name="ray")))
    assert not (tmp_path / "out").exists()


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
    prepare_restore(tmp_path / "out").write(tmp_path / "back")
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
    prepare_restore(tmp_path / "out").write(tmp_path / "back")
    assert hashes(tmp_path / "back") == before


def refused(plan: Path, model: Path, out: Path, match: str) -> PlacerError:
    with pytest.raises(PlacerError, match=match) as caught:
        export_checkpoint(plan, model, out)
    assert not out.exists()
    assert not list(out.parent.glob(f"*{out.name}?*"))
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
    refused(plan, odd, out, "lacks up_proj of expert 2")

    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    assert "df -h" in refused(plan, tiny_model, out, "0 bytes free").hint


def test_a_write_that_fails_midway_leaves_nothing(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    plan = make_plan(tiny_model)
    monkeypatch.setattr("os.fsync", full)
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


def test_out_inside_the_model_is_refused(tiny_model: Path, make_plan: MakePlan) -> None:
    """The source is only read."""
    with pytest.raises(UsageError, match="is inside the input"):
        export_checkpoint(make_plan(tiny_model), tiny_model, tiny_model / "out")


def test_an_existing_out_is_not_overwritten(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(PlacerError, match="already exists"):
        export_checkpoint(make_plan(tiny_model), tiny_model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_plan_bound_to_no_checkpoint_matches_by_shape_with_a_warning(
    tiny_model: Path, write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [[7, 6, 5, 4, 3, 2, 1, 0], [1, 0, 3, 2, 5, 4, 7, 6]]
    placement = Placement.from_json(rows, (8, 8), num_ranks=2, num_nodes=1)
    plan = write_plan(ModelSpec(num_experts=(8, 8), top_k=2), placement)
    report = export_checkpoint(plan, tiny_model, tmp_path / "out")
    assert "match by shape only" in report.warning
    record = json.loads((tmp_path / "out" / "placer.json").read_text())
    assert record["permutation"] == rows
    assert record["layer_ids"] == [1, 3]
    assert record["source_fingerprint"] == ModelSpec.from_checkpoint(tiny_model).fingerprint


@pytest.mark.parametrize(
    ("engine", "target"),
    [
        (None, "sglang"),
        ("sglang-deepep", "sglang"),
        ("trtllm-allgather", "trtllm"),
        ("vllm-agrs", None),
    ],
)
def test_replicas_are_refused_with_the_way_out(
    engine: str | None,
    target: str | None,
    tiny_model: Path,
    write_plan: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """What the plan was solved for stays; a map is offered if its engine reads it."""
    rows = [[0, 1, 2, 3, 4, 4, 5, 6, 7, 0]] * 2
    placement = Placement.from_json(rows, (8, 8), num_ranks=2, num_nodes=2)
    spec = ModelSpec.from_checkpoint(tiny_model)
    told = {"fold": "not 0/3"} | ({} if engine is None else {"engine": engine})
    plan = write_plan(spec, placement, **told)
    error = refused(plan, tiny_model, tmp_path / "out", "cannot hold replicas")
    served_by = "" if engine is None else f" --engine {engine}"
    again = (
        f"placer solve TRACE{served_by} --nodes 2 --gpus-per-node 1 --redundant-experts 0 "
        "--not-fold 0/3 --out NEW"
    )
    assert again in error.hint
    assert ("placer export" in error.hint) == (target is not None)
    assert target is None or f"placer export {target} {plan} {tiny_model} " in error.hint


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.safetensors",
        "original/model.safetensors",
        "metal/model.bin",
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "onnx/model.onnx_data",
        "model.ckpt",
        "weights.npz",
        "model.data-00000-of-00001",
        "consolidated.safetensors.index.json",
    ],
)
def test_what_is_not_served_is_left_out_by_name(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path, name: str
) -> None:
    """Weights in it would not be permuted; a folder of it goes as a whole."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"\0\1weights")
    beside = (copy / name).with_name("describes.json")
    beside.write_text("{}")
    served = {"tokenizer.model": b"\0\1", "vision.png": b"\x89\0", "LICENSE": b"text"}
    for other, content in served.items():
        (copy / other).write_bytes(content)
    job = prepare_export(make_plan(tiny_model), copy)
    in_folder = "/" in name
    expected = {name, *([str(beside.relative_to(copy))] if in_folder else [])}
    assert {str(path) for path in job.source.left_out} == expected
    job.write(tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()
    assert (tmp_path / "out" / "describes.json").exists() != in_folder
    assert (
        served.items()
        <= {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}.items()
    )


def test_a_second_file_of_the_same_tensors_is_refused(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    shutil.copyfile(copy / "model.safetensors", copy / "other.safetensors")
    refused(make_plan(tiny_model), copy, tmp_path / "out", "both .* hold")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "folder"])
def test_a_link_out_of_the_checkpoint_is_refused(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path, name: str
) -> None:
    copy, secret = tmp_path / "copy", tmp_path / "secret"
    shutil.copytree(tiny_model, copy)
    if (copy / name).exists():
        (copy / name).rename(secret)
    else:
        secret.mkdir()
    (copy / name).symlink_to(secret)
    error = refused(make_plan(tiny_model), copy, tmp_path / "out", f"{name} is a link")
    assert "cp -rL" in error.hint


def test_a_snapshot_of_the_hugging_face_cache_is_exported(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    """There every file is a link to ``blobs``; the export holds files."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in tiny_model.iterdir():
        shutil.copyfile(path, blobs / f"hash-of-{path.name}")
        (snapshot / path.name).symlink_to(
            os.path.relpath(blobs / f"hash-of-{path.name}", snapshot)
        )
    plan = make_plan(tiny_model)
    export_checkpoint(plan, snapshot, tmp_path / "out")
    export_checkpoint(plan, tiny_model, tmp_path / "same")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "same")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_what_git_keeps_is_not_copied(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "clone")
    (tmp_path / "clone" / ".git").mkdir()
    (tmp_path / "clone" / ".git" / "object.bin").write_bytes(b"large")
    export_checkpoint(make_plan(tiny_model), tmp_path / "clone", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "placer.json",
        *(path.name for path in tiny_model.iterdir()),
    }


def test_numbers_written_oddly_are_refused(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    """``experts.07`` would be renamed as if it were ``experts.7``, and not back."""
    odd = tmp_path / "odd"
    shutil.copytree(tiny_model, odd)
    tensors = load_file(odd / "model.safetensors")
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    tensors[name.replace(".7.", ".07.")] = tensors.pop(name)
    save_file(tensors, odd / "model.safetensors")
    refused(make_plan(tiny_model), odd, tmp_path / "out", "experts.07.* be classified")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.expert_bias",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.1.mlp.experts.8.up_proj.weight",
    ],
)
def test_nothing_beside_experts_and_routers_is_guessed(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path, name: str
) -> None:
    """A bias without a rule, experts of a dense layer, an expert too many."""
    odd = tmp_path / "odd"
    shutil.copytree(tiny_model, odd)
    tensors = load_file(odd / "model.safetensors")
    save_file(tensors | {name: torch.zeros(8)}, odd / "model.safetensors")
    refused(make_plan(tiny_model), odd, tmp_path / "out", f"{name} cannot be classified")


def restored(directory: Path, out: Path, match: str, kind: type[PlacerError]) -> None:
    with pytest.raises(kind, match=match) as caught:
        prepare_restore(directory).write(out)
    assert caught.value.hint
    assert not out.exists()
    assert not list(out.parent.glob(f"*{out.name}?*"))


def test_a_changed_export_is_not_restored(
    tiny_sharded_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    """One flipped bit is found where hashes were asked for, another header always."""
    out = tmp_path / "out"
    options = ExportOptions(with_hashes=True)
    export_checkpoint(make_plan(tiny_sharded_model), tiny_sharded_model, out, options)
    assert prepare_restore(out).write(tmp_path / "good").unchecked == ()
    assert hashes(tmp_path / "good") == hashes(tiny_sharded_model)
    shard = min(out.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    match = f"{shard.name} restored from .* is not the original: SHA-256"
    restored(out, tmp_path / "back", match, VerificationError)
    length = int.from_bytes(raw[:8], "little")
    header = dict(reversed(json.loads(raw[8 : 8 + length]).items()))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    shard.write_bytes(raw[:8] + text + raw[8 + length :])
    match = f"{shard.name} .* not the original: SHA-256 of its header"
    restored(out, tmp_path / "back", match, VerificationError)


def test_a_damaged_record_is_refused(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    export_checkpoint(make_plan(tiny_model), tiny_model, out)
    path = out / "placer.json"
    good = json.loads(path.read_text())
    short = {name: good[name][:1] for name in ("permutation", "inverse")}
    for change, match in (
        ({"schema_version": 3}, "written by a newer placer"),
        ({"source_fingerprint": "0" * 64}, "another model"),
        ({"source_fingerprint": "0"}, 'source_fingerprint is "0", expected'),
        (short, "another model"),
        ({"permutation": [[0] * 8] * 2}, r"permutation\[0\] is not a permutation"),
        ({"inverse": [list(range(8))] * 2}, "do not match"),
        ({"permutation": [["a"]]}, r'permutation\[0\]\[0\] is "a"'),
        ({"permutation": 3}, "permutation is 3, expected a list"),
        ({"header_bytes": {"model.safetensors": "9"}}, r'safetensors is "9"'),
        ({"source_sha256": None}, "source_sha256 is null, expected an object"),
        ({"shard_bytes": {"model.safetensors": 9}}, "not the original: size"),
        ({"header_sha256": {}}, "not the original: SHA-256 of its header"),
    ):
        path.write_text(json.dumps(good | {"sha256": None} | change))
        restored(out, back, match, PlacerError)
    path.write_text(json.dumps(good | {"placer": "0.0"}))
    restored(out, back, "was changed after it was written", PlacerError)
    del good["header_bytes"]
    path.write_text(json.dumps(good))
    restored(out, back, "header_bytes", PlacerError)
    restored(tiny_model, back, "is a checkpoint, not an exported checkpoint", PlacerError)
