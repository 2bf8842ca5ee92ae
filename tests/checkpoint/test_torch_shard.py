"""PyTorch checkpoints are exported as safetensors, byte for byte, and never run code."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from placer.checkpoint.export import export_checkpoint, prepare_restore
from placer.checkpoint.ranks import prepare_ranks
from placer.checkpoint.source import CheckpointSource
from placer.checkpoint.torch_shard import open_torch_shard
from placer.checkpoint.verify import verify
from placer.checkpoint.verify_ranks import verify_ranks
from placer.checkpoint.writing import ExportOptions
from placer.errors import PlacerError, UsageError
from placer.report.checkpoint import Checkpoint

MakePlan = Callable[..., Path]


@pytest.fixture(params=["one file", "an index"])
def torch_model(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model as ``torch.save`` writes it, in one file or in two with an index."""
    folder = tmp_path / "torch"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if request.param == "one file":
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_the_export_is_that_of_the_same_model_in_safetensors(
    torch_model: Path, tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(tiny_model)
    export_checkpoint(plan, torch_model, tmp_path / "out")
    export_checkpoint(plan, tiny_model, tmp_path / "expected")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list((tmp_path / "out").glob("*.bin*"))
    index_path = tmp_path / "out" / "model.safetensors.index.json"
    if len(list((tmp_path / "out").glob("*.safetensors"))) > 1:
        weight_map = json.loads(index_path.read_text())["weight_map"]
        assert weight_map == {
            name: path.name
            for path in (tmp_path / "out").glob("*.safetensors")
            for name in load_file(path)
        }
    text = ["def add(one, two):\n    return one + two\n"]
    report = verify(torch_model, tmp_path / "out", plan, text, 32)
    assert report.num_tensors == len(expected)
    assert report.num_tokens > 0


def test_the_inverse_is_the_original_in_safetensors(
    torch_model: Path, tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    export_checkpoint(make_plan(tiny_model), torch_model, tmp_path / "out")
    prepare_restore(tmp_path / "out").write(tmp_path / "back")
    found, expected = tensors_of(tmp_path / "back"), tensors_of(tiny_model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_is_split_by_rank_and_inspected(
    torch_model: Path, tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(tiny_model)
    prepare_ranks(plan, torch_model, experts_only=False).write(tmp_path / "out")
    assert verify_ranks(torch_model, tmp_path / "out", plan).num_ranks == 4
    assert verify_ranks(tiny_model, tmp_path / "out", plan).num_ranks == 4
    found, expected = Checkpoint.read(torch_model), Checkpoint.read(tiny_model)
    assert found.groups == expected.groups


def test_every_kind_of_number_lies_where_it_is_said_to(tmp_path: Path) -> None:
    """Views, parameters and shared storages too; the oracle is ``torch.load``."""
    path = tmp_path / "x.bin"
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "view": base[1:3],
        "whole": base,
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "none": torch.zeros(0, 5),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]),
    }
    for dtype in ("bfloat16", "float16", "int8", "uint8", "int16", "int32", "int64"):
        tensors[dtype] = torch.arange(7).to(getattr(torch, dtype))
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        tensors[dtype] = torch.arange(7.0).to(getattr(torch, dtype))
    torch.save(tensors, path)
    shard, raw = open_torch_shard(path, "x.safetensors"), path.read_bytes()
    (tmp_path / "x.safetensors").write_bytes(
        shard.header + b"".join(raw[slice(*shard.place(name))] for name in shard.tensors)
    )
    found = load_file(tmp_path / "x.safetensors")
    expected = torch.load(path, weights_only=True)
    assert found.keys() == expected.keys() == tensors.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert raw_bytes(found[name]) == raw_bytes(tensor)


def raw_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().reshape(-1).view(torch.uint8).tolist()


class Hostile:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit",))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"a": Hostile()}, "weights_only"),
        ([torch.zeros(2)], "no dict of tensors"),
        ({1: torch.zeros(2)}, "no dict of tensors"),
        ({"a": 3}, "a is not a plain tensor"),
        ({"a": {"b": torch.zeros(2)}}, "a is not a plain tensor"),
        ({"a": torch.zeros(2, 3).T}, "not contiguous"),
        ({"a": torch.zeros(2).to_sparse()}, "weights_only|plain|place|contiguous"),
    ],
)
def test_what_is_no_dict_of_plain_tensors_is_refused(
    tmp_path: Path, value: object, match: str
) -> None:
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(PlacerError, match=match) as caught:
        open_torch_shard(tmp_path / "x.bin", "x.safetensors")
    assert "save_pretrained" in caught.value.hint


def test_archives_that_torch_would_not_write_are_refused(tmp_path: Path) -> None:
    """The old format, a compressed archive, another byte order, no archive."""
    path, odd = tmp_path / "x.bin", tmp_path / "odd.bin"
    torch.save({"a": torch.zeros(2)}, odd, _use_new_zipfile_serialization=False)
    with pytest.raises(PlacerError, match=r"PyTorch 1\.6"):
        open_torch_shard(odd, "x.safetensors")
    odd.write_bytes(b"")
    with pytest.raises(PlacerError, match=r"PyTorch 1\.6"):
        open_torch_shard(odd, "x.safetensors")
    torch.save({"a": torch.zeros(2)}, path)
    for compression, order, match in (
        (zipfile.ZIP_DEFLATED, b"little", "compressed"),
        (zipfile.ZIP_STORED, b"big", "big-endian"),
    ):
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(odd, "w", compression) as new:
            for one in old.infolist():
                content = order if one.filename.endswith("byteorder") else old.read(one)
                new.writestr(one.filename, content)
        with pytest.raises(PlacerError, match=match):
            open_torch_shard(odd, "x.safetensors")


def test_an_index_that_lies_or_leads_outside_is_refused(
    torch_model: Path, tmp_path: Path
) -> None:
    path = torch_model / "pytorch_model.bin.index.json"
    if not path.exists():
        pytest.skip("one file needs no index")
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    files = sorted(set(index["weight_map"].values()))
    for file, match in (("../x.bin", "outside its directory"), (files[1], "says that")):
        index["weight_map"][name] = file
        path.write_text(json.dumps(index))
        with pytest.raises(PlacerError, match=match):
            CheckpointSource.open(torch_model)


def test_hashes_of_what_is_no_safetensors_file_are_refused(
    torch_model: Path, tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    options = ExportOptions(with_hashes=True)
    with pytest.raises(UsageError, match="PyTorch files"):
        export_checkpoint(make_plan(tiny_model), torch_model, tmp_path / "out", options)
    report = export_checkpoint(
        make_plan(tiny_model), torch_model, tmp_path / "out", ExportOptions(link=True)
    )
    assert report.num_linked == 0
