"""Every rank gets its experts and the rest, bit for bit, and ``verify`` finds any lack."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from placer.checkpoint.ranks import prepare_ranks
from placer.checkpoint.verify_ranks import verify_ranks
from placer.checkpoint.writing import ExportOptions
from placer.cli.main import main
from placer.errors import PlacerError, VerificationError
from placer.model import ModelSpec
from placer.placement import Placement
from tests.checkpoint.test_quantised_layouts import LAYOUTS, permuting_plan, write
from tests.families import build, randomise

WritePlan = Callable[..., Path]
# Replicas of 3, 2, 1, 0 and of 0, 7, 6, 5; no rank has two copies of one.
ROWS = [[0, 1, 2, 3, 4, 5, 6, 7, 3, 2, 1, 0], [7, 6, 5, 0, 4, 3, 2, 1, 0, 7, 6, 5]]


@pytest.fixture(params=["tiny_model", "tiny_sharded_model"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def plan(model: Path, write_plan: WritePlan) -> Path:
    placement = Placement.from_json(ROWS, (8, 8), num_ranks=4, num_nodes=2)
    return write_plan(ModelSpec.from_checkpoint(model), placement)


@pytest.fixture
def tiny_ranks(
    tiny_model: Path, write_plan: WritePlan, tmp_path: Path
) -> tuple[Path, Path]:
    """The plan of one small model, and a directory for each of its four ranks."""
    placement = Placement.from_json(ROWS, (8, 8), num_ranks=4, num_nodes=2)
    plan = write_plan(ModelSpec.from_checkpoint(tiny_model), placement)
    prepare_ranks(plan, tiny_model, experts_only=False).write(tmp_path / "out")
    return plan, tmp_path / "out"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, found by the index, as any loader of sharded checkpoints finds them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    return {name: files[file][name] for name, file in index["weight_map"].items()}


def source_tensors(model: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in model.glob("*.safetensors"):
        found |= load_file(path)
    return found


def wanted(model: Path, rank: int, experts_only: bool) -> set[str]:
    """By hand: names of the experts in slots 3r to 3r+2, and what is no expert."""
    names = set()
    layer_ids = ModelSpec.from_checkpoint(model).layer_ids
    for name in source_tensors(model):
        if ".experts." not in name:
            names |= set() if experts_only else {name}
            continue
        words = name.split(".")
        row = ROWS[layer_ids.index(int(words[2]))]
        if int(words[words.index("experts") + 1]) in row[3 * rank : 3 * rank + 3]:
            names.add(name)
    return names


@pytest.mark.parametrize("experts_only", [False, True])
def test_every_rank_has_its_experts_and_the_rest(
    model: Path, plan: Path, tmp_path: Path, experts_only: bool
) -> None:
    out = tmp_path / "out"
    prepare_ranks(plan, model, experts_only=experts_only).write(out)
    original = source_tensors(model)
    for rank in range(4):
        folder = out / f"rank-{rank:05}"
        found = tensors_of(folder)
        assert set(found) == wanted(model, rank, experts_only)
        for name, tensor in found.items():
            assert tensor.dtype == original[name].dtype
            assert torch.equal(tensor, original[name])
        record = json.loads((folder / "placement.json").read_text())
        assert record["experts"] == [row[3 * rank : 3 * rank + 3] for row in ROWS]
        others = {path.name for path in model.iterdir() if path.suffix != ".safetensors"}
        others = {"config.json"} if experts_only else others
        names = {path.name for path in folder.iterdir() if path.suffix != ".safetensors"}
        assert names == others | {"placement.json", "model.safetensors.index.json"}
    report = verify_ranks(model, out, plan)
    assert report.num_ranks == 4
    assert report.num_experts == 24
    assert len(list(out.iterdir())) == 4


def test_together_the_ranks_are_the_whole_model(
    model: Path, plan: Path, tmp_path: Path
) -> None:
    """Merged in any order they are what transformers loads, as replicas are equal."""
    from transformers import AutoModelForCausalLM

    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare_ranks(plan, model, experts_only=False).write(out)
    shutil.copytree(out / "rank-00000", whole)
    for path in (*whole.glob("*.safetensors"), whole / "model.safetensors.index.json"):
        path.unlink()
    merged: dict[str, torch.Tensor] = {}
    for rank in range(4):
        merged |= tensors_of(out / f"rank-{rank:05}")
    save_file(merged, whole / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        before, after = (
            AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)(ids).logits
            for one in (model, whole)
        )
    assert torch.equal(before, after)


def damaged(out: Path, rank: int, change: Callable[[dict], None]) -> None:
    """Change the tensors of a rank's first shard, and its index with them."""
    folder = out / f"rank-{rank:05}"
    path = min(folder.glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    kept = {n: file for n, file in index["weight_map"].items() if file != path.name}
    index["weight_map"] = kept | dict.fromkeys(tensors, path.name)
    index_path.write_text(json.dumps(index))


def flip(tensors: dict[str, torch.Tensor]) -> None:
    min(tensors.items())[1].view(torch.uint8).view(-1)[0] ^= 1


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[min(tensors)]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.4.up_proj.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "match"),
    [(flip, ".* differs from that of"), (drop, "lacks"), (add, r"has model\.layers\.1")],
)
def test_verify_finds_what_is_wrong_in_one_rank(
    model: Path,
    plan: Path,
    tmp_path: Path,
    change: Callable[[dict], None],
    match: str,
) -> None:
    out = tmp_path / "out"
    prepare_ranks(plan, model, experts_only=False).write(out)
    damaged(out, 0, change)
    with pytest.raises(VerificationError, match=f"rank-00000 {match}"):
        verify_ranks(model, out, plan)


def test_verify_wants_every_rank_and_a_true_index(
    model: Path, plan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare_ranks(plan, model, experts_only=True).write(out)
    path = out / "rank-00001" / "model.safetensors.index.json"
    text = path.read_text()
    path.write_text(text.replace("experts.5", "experts.6"))
    with pytest.raises(VerificationError, match="index that does not match its files"):
        verify_ranks(model, out, plan)
    path.write_text(text)
    shutil.copytree(out / "rank-00002", out / "rank-00003", dirs_exist_ok=True)
    with pytest.raises(
        VerificationError, match="rank 2, but the plan and the model require 3"
    ):
        verify_ranks(model, out, plan)
    shutil.rmtree(out / "rank-00003")
    with pytest.raises(PlacerError, match="does not exist"):
        verify_ranks(model, out, plan)


def edits(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every value in a JSON document, changed alone: where, and the whole document."""
    if isinstance(value, dict):
        for key, one in value.items():
            for place, changed in edits(one, f"{name}.{key}"):
                yield place, value | {key: changed}
    elif isinstance(value, list):
        for n, one in enumerate(value):
            for place, changed in edits(one, f"{name}[{n}]"):
                yield place, [*value[:n], changed, *value[n + 1 :]]
        yield f"{name} lacks one", value[1:]
        yield f"{name} in another order", value[::-1]
    elif isinstance(value, bool):
        yield name, not value
    elif isinstance(value, int):
        yield name, value + 1
    elif isinstance(value, str):
        yield name, value[:-1] + ("0" if value[-1] != "0" else "1")


def test_verify_finds_every_change_of_placement_json(
    tiny_model: Path, tiny_ranks: tuple[Path, Path]
) -> None:
    plan, out = tiny_ranks
    path = out / "rank-00001" / "placement.json"
    text = path.read_text()
    accepted, tried = [], 0
    for place, changed in edits(json.loads(text)):
        if changed == json.loads(text):
            continue
        path.write_text(json.dumps(changed))
        tried += 1
        try:
            verify_ranks(tiny_model, out, plan)
        except PlacerError:
            continue
        accepted.append(place)
    assert tried > 25
    assert accepted == []


def test_verify_finds_every_flipped_bit_of_a_rank(
    tiny_model: Path, tiny_ranks: tuple[Path, Path]
) -> None:
    """Of weights and their headers, the index, the config and the tokenizer alike."""
    plan, out = tiny_ranks
    rng = random.Random(0)
    accepted = []
    for path in sorted((out / "rank-00002").iterdir()):
        content = path.read_bytes()
        for _ in range(12):
            byte, bit = rng.randrange(len(content)), rng.randrange(8)
            flipped = content[byte] ^ 1 << bit
            path.write_bytes(content[:byte] + bytes([flipped]) + content[byte + 1 :])
            try:
                verify_ranks(tiny_model, out, plan)
            except PlacerError:
                continue
            accepted.append((path.name, byte, bit))
        path.write_bytes(content)
    assert accepted == []
    shutil.copytree(out / "rank-00003", out / "rank-00004")
    with pytest.raises(VerificationError, match="has rank-00004, but the plan has 4 ranks"):
        verify_ranks(tiny_model, out, plan)
    shutil.rmtree(out / "rank-00004")
    (out / "rank-00002" / "chat_template.jinja").write_text("{{ other }}")
    with pytest.raises(VerificationError, match=r"has chat_template\.jinja"):
        verify_ranks(tiny_model, out, plan)


def test_the_command_line_splits_verifies_and_goes_on(
    model: Path, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    job = prepare_ranks(plan, model, experts_only=False)
    with pytest.raises(KeyboardInterrupt):
        job.write(out, ExportOptions(num_workers=1), interrupt)
    words = ["ranks", str(plan), str(model)]
    for command in (
        ["export", *words, "--dry-run"],
        ["export", *words, "--out", str(out)],
        ["verify", str(model), str(out), str(plan)],
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
    printed = capsys.readouterr()
    assert "rank-00003/" in printed.out
    assert "finished by an earlier run" in printed.err
    assert "verified: every rank" in printed.out
    with pytest.raises(SystemExit) as ended:
        main(["export", *words, "--link", "--out", str(tmp_path / "other")])
    assert ended.value.code == 2


def test_a_permuted_checkpoint_is_not_split_by_the_plan_again(
    tiny_model: Path, make_plan: WritePlan, tmp_path: Path
) -> None:
    from placer.checkpoint.export import export_checkpoint

    plan = make_plan(tiny_model)
    export_checkpoint(plan, tiny_model, tmp_path / "out")
    with pytest.raises(PlacerError, match="was permuted by placer") as caught:
        prepare_ranks(plan, tmp_path / "out", experts_only=False)
    assert "--inverse" in caught.value.hint


@pytest.mark.parametrize("model_type", ["dbrx", "granitemoe", "gpt_oss"])
@pytest.mark.parametrize("experts_only", [False, True])
def test_of_fused_experts_a_rank_has_those_in_its_slots(
    model_type: str, experts_only: bool, write_plan: WritePlan, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    randomise(build(model_type)).save_pretrained(model)
    spec = ModelSpec.from_checkpoint(model)
    rows = [ROWS[layer % 2] for layer in range(spec.num_layers)]
    placement = Placement.from_json(rows, spec.num_experts, num_ranks=4, num_nodes=2)
    plan = write_plan(spec, placement)
    prepare_ranks(plan, model, experts_only=experts_only).write(out)
    original = source_tensors(model)
    for rank in range(4):
        found = tensors_of(out / f"rank-{rank:05}")
        fused = [n for n in found if ".experts." in n or "put_linear" in n]
        assert (
            len(fused)
            == spec.num_layers * {"dbrx": 3, "granitemoe": 2, "gpt_oss": 4}[model_type]
        )
        if experts_only:
            assert set(found) == set(fused)
        else:
            assert set(found) == set(original)
        for name, tensor in found.items():
            expected = original[name]
            if name in fused:
                layer = int(name.split(".")[2])
                held = rows[layer][3 * rank : 3 * rank + 3]
                expected = torch.cat([expected.chunk(8)[e] for e in held])
            assert torch.equal(tensor, expected)
    report = verify_ranks(model, out, plan)
    assert report.num_experts == 12 * spec.num_layers
    damaged(out, 1, flip)
    with pytest.raises(VerificationError, match=r"rank-00001 .* differs from that of"):
        verify_ranks(model, out, plan)


def test_one_scale_for_all_experts_goes_to_every_rank(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    """NVFP4 in fused tensors: packed rows are split, the scale of all rows is not."""
    model = write(LAYOUTS["llama4-nvfp4"](), tmp_path / "model")
    rows, plan = permuting_plan(model, write_plan)
    prepare_ranks(plan, model, experts_only=True).write(tmp_path / "out")
    assert verify_ranks(model, tmp_path / "out", plan).num_ranks == 4
    prefix = "language_model.model.layers.1.feed_forward.experts."
    original = source_tensors(model)
    for rank in range(4):
        found = tensors_of(tmp_path / "out" / f"rank-{rank:05}")
        name = f"{prefix}down_proj_weight_scale_2"
        assert torch.equal(found[name], original[name])
        name = f"{prefix}down_proj_weight_scale"
        expected = original[name].view(torch.uint8)[rows[1][3 * rank : 3 * rank + 3]]
        assert torch.equal(found[name].view(torch.uint8), expected)
