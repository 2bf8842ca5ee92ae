"""The SGLang map obeys the rules that SGLang itself does not check."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from placer.errors import PlacerError
from placer.plan import Plan
from placer.runtime_map.sglang import export_sglang

MakePlan = Callable[..., Path]


def test_one_row_per_hidden_layer_and_no_other_key(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan_path = make_plan(tiny_model)
    written = export_sglang(plan_path, tiny_model, tmp_path / "map.json")
    value = json.loads((tmp_path / "map.json").read_text())
    assert list(value) == ["physical_to_logical_map"]
    rows = value["physical_to_logical_map"]
    placed = Plan.read(plan_path).placement.to_json()
    assert len(rows) == 4, "hidden layers, of which 1 and 3 are MoE layers"
    assert [rows[1], rows[3]] == placed
    for row in rows:
        assert sorted(row) == list(range(8))
    assert "--ep-size 4" in written.flags
    assert written.warnings == ()


def test_a_family_that_sglang_ignores_is_named(
    tiny_sharded_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(tiny_sharded_model)
    written = export_sglang(plan, tiny_sharded_model, tmp_path / "map.json")
    assert "SGLang ignores a map for olmoe" in written.warnings[0]
    assert "placer export checkpoint" in written.warnings[0]


def test_another_suffix_and_another_model_are_refused(
    tiny_model: Path, tiny_sharded_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(tiny_model)
    with pytest.raises(PlacerError, match=r"only if it ends in \.json"):
        export_sglang(plan, tiny_model, tmp_path / "map.txt")
    with pytest.raises(PlacerError, match="different models"):
        export_sglang(plan, tiny_sharded_model, tmp_path / "map.json")
    assert not (tmp_path / "map.json").exists()
