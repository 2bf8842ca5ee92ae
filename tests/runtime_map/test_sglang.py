"""The SGLang map obeys the rules that SGLang itself does not check."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from placer.cli.main import main
from placer.errors import PlacerError, VerificationError
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.runtime_map.maps import export_map, verify_map

MakePlan = Callable[..., Path]


def test_one_row_per_hidden_layer_and_no_other_key(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan_path = make_plan(tiny_model)
    written = export_map("sglang", plan_path, tiny_model, tmp_path / "map.json")
    value = json.loads((tmp_path / "map.json").read_text())
    assert list(value) == ["physical_to_logical_map"]
    rows = value["physical_to_logical_map"]
    placed = Plan.read(plan_path).placement.to_json()
    assert len(rows) == 4, "hidden layers, of which 1 and 3 are MoE layers"
    assert [rows[1], rows[3]] == placed
    for row in rows:
        assert sorted(row) == list(range(8))
    assert written.start[0].command.endswith(
        "--tp-size 4 --ep-size 4 --attn-dp-size 4 --moe-a2a-backend deepep "
        "--deepep-mode normal "
        f"--init-expert-location {tmp_path / 'map.json'} --ep-dispatch-algorithm static"
    )
    assert written.warnings == ()


def test_a_family_that_sglang_ignores_is_named(
    tiny_sharded_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(tiny_sharded_model)
    written = export_map("sglang", plan, tiny_sharded_model, tmp_path / "map.json")
    assert "SGLang ignores a map for olmoe" in written.warnings[0]
    assert "placer export checkpoint" in written.warnings[0]


def test_another_suffix_and_another_model_are_refused(
    tiny_model: Path, tiny_sharded_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(tiny_model)
    with pytest.raises(PlacerError, match=r"must have the suffix \.json or \.pt"):
        export_map("sglang", plan, tiny_model, tmp_path / "map.txt")
    with pytest.raises(PlacerError, match="different models"):
        export_map("sglang", plan, tiny_sharded_model, tmp_path / "map.json")
    assert not (tmp_path / "map.json").exists()


def place(rows: list[list[int]], num_ranks: int, num_nodes: int = 1) -> Placement:
    return Placement.from_json(rows, (8,) * len(rows), num_ranks, num_nodes)


def test_replicas_and_nodes_are_in_the_flags_and_no_gpu_has_two_copies(
    tiny_model: Path, write_plan: MakePlan, tmp_path: Path
) -> None:
    """The rows of dense layers too: SGLang may count on every row."""
    rows = [[0, 1, 2, 3, 4, 5, 6, 7, 3, 2, 1, 0], [7, 6, 5, 0, 4, 3, 2, 1, 0, 7, 6, 5]]
    plan = write_plan(ModelSpec.from_checkpoint(tiny_model), place(rows, 4, 2))
    written = export_map("sglang", plan, tiny_model, tmp_path / "map.json")
    assert "--ep-num-redundant-experts 4" in written.start[0].command
    assert "--nnodes 2" in written.start[0].command
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
        export_map("sglang", plan, tiny_model, tmp_path / "map.json")
    assert caught.value.hint
    assert not (tmp_path / "map.json").exists()


def test_a_plan_bound_to_no_checkpoint_takes_its_layers_from_the_model(
    tiny_model: Path, write_plan: MakePlan, tmp_path: Path
) -> None:
    rows = [[7, 6, 5, 4, 3, 2, 1, 0], [1, 0, 3, 2, 5, 4, 7, 6]]
    plan = write_plan(ModelSpec(num_experts=(8, 8), top_k=2), place(rows, 2))
    written = export_map("sglang", plan, tiny_model, tmp_path / "map.json")
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
    assert f"--init-expert-location '{out}' --ep-dispatch-algorithm static" in printed.err
    assert "do not use --enable-eplb" in printed.err
    assert "--moe-a2a-backend none: every token goes to every rank" in printed.err


def static_choice(row: list[int], num_ranks: int, num_nodes: int) -> list[list[int]]:
    """Rank that serves each (source rank, expert), by the rule of SGLang 0.5.23.

    The copy on the same GPU; else, where only some copies are on the source's node, the
    first of these; else a seeded choice in which the replicas take turns.
    """
    per_rank, per_node = len(row) // num_ranks, num_ranks // num_nodes
    chooser = random.Random(42)
    served = [[-1] * (max(row) + 1) for _ in range(num_ranks)]
    for expert in range(max(row) + 1):
        copies = [slot // per_rank for slot, held in enumerate(row) if held == expert]
        left = []
        for source in range(num_ranks):
            near = [r for r in copies if r // per_node == source // per_node]
            if len(copies) == 1 or source in copies:
                served[source][expert] = source if source in copies else copies[0]
            elif 0 < len(near) < len(copies):
                served[source][expert] = near[0]
            else:
                left.append(source)
        turns, rest = divmod(len(left), len(copies))
        choices = copies * turns + chooser.sample(copies, k=rest)
        chooser.shuffle(choices)
        for source, choice in zip(left, choices, strict=True):
            served[source][expert] = choice
    return served


def test_the_order_of_slots_inside_a_rank_is_nothing_to_the_static_choice() -> None:
    """So the plan's order is kept, and tables that name ranks stay true."""
    rng = random.Random(0)
    seen = set()
    for _ in range(50):
        row = [*range(8), *rng.sample(range(8), 4)]
        ranks = [sorted(row[rank::4]) for rank in range(4)]
        if any(len(set(held)) < 3 for held in ranks):
            continue
        plain = static_choice([e for held in ranks for e in held], 4, 2)
        for held in ranks:
            rng.shuffle(held)
        assert static_choice([e for held in ranks for e in held], 4, 2) == plain
        seen.add(str(plain))
    assert len(seen) > 10


def test_a_pt_map_holds_the_rows_of_the_json_map(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    """Loaded as SGLang loads it, and the same bytes under any name."""
    plan = make_plan(tiny_model)
    for name in ("map.json", "map.pt", "other.pt"):
        export_map("sglang", plan, tiny_model, tmp_path / name)
    loaded = torch.load(tmp_path / "map.pt", weights_only=True, map_location="cpu")
    rows = json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]
    assert list(loaded) == ["physical_to_logical_map"]
    assert loaded["physical_to_logical_map"].dtype == torch.int64
    assert loaded["physical_to_logical_map"].tolist() == rows
    assert (tmp_path / "map.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()


def test_a_map_that_would_run_code_is_not_loaded(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"physical_to_logical_map": Hostile()}, tmp_path / "map.pt")
    with pytest.raises(VerificationError, match="runs no code from files"):
        verify_map(tmp_path / "map.pt", make_plan(tiny_model), tiny_model)
    assert not (tmp_path / "touched").exists()
