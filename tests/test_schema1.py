"""Files that placer wrote before schema version 2 are read with the same content."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from placer.affinity import Affinity
from placer.checkpoint.export import prepare_restore
from placer.checkpoint.ranks import RankRecord
from placer.checkpoint.record import ExportRecord
from placer.errors import PlacerError
from placer.placement import Plan
from placer.runtime_map.maps import verify_map
from placer.shuffle import ShuffleTable
from placer.table import Table
from placer.trace import Trace

OLD = Path(__file__).parent / "data" / "schema1"


@pytest.mark.parametrize(
    ("name", "termination"),
    [
        ("plan", "proved"),
        ("replicas", "step_limit"),
        ("balance", "proved"),
        ("token", "step_limit"),
    ],
)
def test_a_plan(name: str, termination: str, tmp_path: Path) -> None:
    old = json.loads((OLD / f"{name}.json").read_text())
    assert old["schema_version"] == 1
    plan = Plan.read(OLD / f"{name}.json")
    solver = old["solver"] | {"termination": termination}
    expected = old | {"schema_version": 2, "solver": solver}
    assert plan.to_json() == expected | {"sha256": plan.to_json()["sha256"]}
    plan.write(tmp_path / "new.json")
    assert Plan.read(tmp_path / "new.json").to_json() == plan.to_json()


def test_a_plan_of_the_first_version_1(tmp_path: Path) -> None:
    """Its solver report had fewer fields than the last of version 1."""
    old = json.loads((OLD / "plan.json").read_text())
    for name in ("eplb_caps", "above_eplb_layers"):
        old["solver"].pop(name)
    old["solver"].pop("predicted_imbalance", None)
    old["solver"].pop("imbalance_without_groups", None)
    (tmp_path / "plan.json").write_text(json.dumps(old))
    solver = Plan.read(tmp_path / "plan.json").solver
    assert (solver.eplb_caps, solver.above_eplb_layers) == (None, {})


def test_a_plan_that_the_clock_cut(tmp_path: Path) -> None:
    old = json.loads((OLD / "token.json").read_text())
    old["solver"]["reproducible"] = False
    (tmp_path / "plan.json").write_text(json.dumps(old))
    assert Plan.read(tmp_path / "plan.json").solver.termination == "time_limit"


def test_a_trace(tmp_path: Path) -> None:
    old = json.loads((OLD / "trace" / "trace.json").read_text(encoding="utf-8"))
    trace = Trace(OLD / "trace")
    assert trace.header.to_json() == old | {"schema_version": 2, "experts_by_weight": True}
    tensors = load_file(OLD / "trace" / "chunk-00000.safetensors")
    found = trace.read().tensors()
    assert set(found) == set(tensors)
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    shutil.copytree(OLD / "trace", tmp_path / "unordered")
    header = tmp_path / "unordered" / "trace.json"
    header.write_text(json.dumps(old | {"experts_by_weight": False}))
    assert not Trace(header.parent).header.experts_by_weight


def test_an_affinity() -> None:
    read, tensors = (
        Affinity.read(OLD / "affinity.safetensors"),
        load_file(OLD / "affinity.safetensors"),
    )
    assert all(np.array_equal(read.tensors()[name], tensors[name]) for name in tensors)
    assert read.num_tokens == 240
    assert read.provenance["traces_sha256"] == [Trace(OLD / "trace").sha256]


def test_a_table() -> None:
    path = OLD / "table.safetensors"
    read, tensors = Table.read(path), load_file(path)
    assert all(np.array_equal(read.tensors()[name], tensors[name]) for name in tensors)
    assert read.trace_sha256 == Trace(OLD / "trace").sha256
    assert ShuffleTable.read(path).num_ranks == 4


def test_a_checkpoint(tmp_path: Path) -> None:
    old = json.loads((OLD / "checkpoint" / "placer.json").read_text())
    record = ExportRecord.read(OLD / "checkpoint")
    found = record.to_json()
    assert found.pop("file_sha256") == {} and found.pop("sha256")
    assert found == old | {"schema_version": 2}
    back = prepare_restore(OLD / "checkpoint").write(tmp_path / "back")
    assert "config.json" in back.unchecked, "no small file was hashed then"
    for path in (OLD / "model").iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_the_record_of_a_rank() -> None:
    path = OLD / "ranks" / "rank-00000" / "placement.json"
    old = json.loads(path.read_text())
    assert RankRecord.read(path).to_json() == old | {"schema_version": 2}


@pytest.mark.parametrize("name", ["map.json", "map.safetensors"])
def test_a_map(name: str) -> None:
    assert verify_map(OLD / name, OLD / "plan.json", OLD / "model").num_slots == 16


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    old = json.loads((OLD / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(old | {"schema_version": 3}))
    with pytest.raises(PlacerError, match="written by a newer placer"):
        Plan.read(tmp_path / "plan.json")
