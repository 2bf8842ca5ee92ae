"""The SGLang map obeys the rules that SGLang itself does not check."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from placer.cli.main import main
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.plan import Placement, Plan
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
    assert written.flags.endswith(
        "map.json --moe-a2a-backend deepep --tp-size 4 --ep-size 4"
    )
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


def place(rows: list[list[int]], num_ranks: int, num_nodes: int = 1) -> Placement:
    return Placement.from_json(rows, (8,) * len(rows), num_ranks, num_nodes)


def test_replicas_and_nodes_are_in_the_flags_and_no_gpu_has_two_copies(
    tiny_model: Path, write_plan: MakePlan, tmp_path: Path
) -> None:
    """The rows of dense layers too: SGLang may count on every row."""
    rows = [[0, 1, 2, 3, 4, 5, 6, 7, 3, 2, 1, 0], [7, 6, 5, 0, 4, 3, 2, 1, 0, 7, 6, 5]]
    plan = write_plan(ModelSpec.from_checkpoint(tiny_model), place(rows, 4, 2))
    written = export_sglang(plan, tiny_model, tmp_path / "map.json")
    assert "--ep-num-redundant-experts 4" in written.flags
    assert "--nnodes 2" in written.flags
    value = json.loads((tmp_path / "map.json").read_text())
    for row in value["physical_to_logical_map"]:
        assert set(row) == set(range(8))
        for rank in range(4):
            assert len(set(row[3 * rank : 3 * rank + 3])) == 3
    assert value["physical_to_logical_map"][1::2] == rows


def test_layers_with_different_numbers_of_slots_are_refused(
    tiny_model: Path, write_plan: MakePlan, tmp_path: Path
) -> None:
    rows = [list(range(8)), [0, 1, 2, 3, 4, 4, 5, 6, 7, 0]]
    plan = write_plan(ModelSpec.from_checkpoint(tiny_model), place(rows, 2))
    with pytest.raises(PlacerError, match=r"same number of slots .* \[8, 10\]") as caught:
        export_sglang(plan, tiny_model, tmp_path / "map.json")
    assert caught.value.hint
    assert not (tmp_path / "map.json").exists()


def test_a_plan_bound_to_no_checkpoint_takes_its_layers_from_the_model(
    tiny_model: Path, write_plan: MakePlan, tmp_path: Path
) -> None:
    rows = [[7, 6, 5, 4, 3, 2, 1, 0], [1, 0, 3, 2, 5, 4, 7, 6]]
    plan = write_plan(ModelSpec(num_experts=(8, 8), top_k=2), place(rows, 2))
    written = export_sglang(plan, tiny_model, tmp_path / "map.json")
    assert "match by shape only" in written.warnings[0]
    value = json.loads((tmp_path / "map.json").read_text())
    assert value["physical_to_logical_map"][1::2] == rows


def test_the_command_says_how_to_start_sglang(
    tiny_model: Path,
    make_plan: MakePlan,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On stderr and whole, however long the path; quoted for a shell."""
    out = tmp_path / ("a long name " * 12) / "map.json"
    plan = make_plan(tiny_model)
    with pytest.raises(SystemExit) as ended:
        main(["export", "sglang", str(plan), str(tiny_model), "--out", str(out)])
    printed = capsys.readouterr()
    assert ended.value.code == 0
    assert f"--init-expert-location '{out}' --moe-a2a-backend deepep" in printed.err
    assert "--moe-a2a-backend none every token goes to every rank" in printed.err
