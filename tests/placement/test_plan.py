"""``plan.json``: the same plan the same bytes, read back whole, refused when damaged."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.placement.plan import plan_sha256

ROWS = [[3, 1, 2, 0], [0, 2, 1, 3]]
UNBOUND = ModelSpec(
    id="tiny",
    model_type="qwen3_moe",
    layer_ids=(1, 3),
    num_experts=(4, 4),
    top_k=2,
    hidden_size=8,
    vocab_size=10,
    n_group=2,
    topk_group=1,
)
MODEL = msgspec.structs.replace(UNBOUND, fingerprint=UNBOUND.bound_fingerprint())
WritePlan = Callable[..., Path]


@pytest.fixture
def path(write_plan: WritePlan) -> Path:
    placement = Placement.from_json(ROWS, (4, 4), num_ranks=2, num_nodes=1)
    return write_plan(MODEL, placement, seed=3)


def test_a_plan_comes_back_and_its_bytes_too(path: Path, tmp_path: Path) -> None:
    plan = Plan.read(path)
    assert plan.model == MODEL
    assert plan.placement.to_json() == ROWS
    assert plan.provenance == {"seed": 3}
    plan.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert plan_sha256(path) == plan_sha256(tmp_path / "again.json")


def test_wall_clock_is_not_in_the_file(path: Path, tmp_path: Path) -> None:
    """Two solves that took different times write the same bytes."""
    plan = Plan.read(path)
    slower = replace(plan, solver=msgspec.structs.replace(plan.solver, seconds=12.5))
    slower.write(tmp_path / "slower.json")
    assert (tmp_path / "slower.json").read_bytes() == path.read_bytes()


def test_every_layer_has_a_line_of_its_own(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert "  [3,1,2,0]," in lines
    assert "  [0,2,1,3]" in lines


@pytest.mark.parametrize(
    "odd", ["@physical_to_logical_map@", '\n "physical_to_logical_map": null', "\u00e9\0"]
)
def test_no_text_in_a_plan_disturbs_its_layout(write_plan: WritePlan, odd: str) -> None:
    model = msgspec.structs.replace(MODEL, id=odd)
    placement = Placement.from_json(ROWS, (4, 4), num_ranks=2, num_nodes=1)
    plan = Plan.read(write_plan(model, placement, "odd.json", physical_to_logical_map=None))
    assert plan.model == model
    assert plan.provenance == {"physical_to_logical_map": None}
    assert plan.placement.to_json() == ROWS


def test_the_documented_keys_are_there(path: Path) -> None:
    """The contract with everyone who scripts the tool."""
    value = json.loads(path.read_text())
    assert set(value) == {
        *("schema_version", "model", "num_ranks", "num_nodes", "policy", "exchange"),
        *("max_imbalance", "physical_to_logical_map", "solver", "metrics", "provenance"),
        "sha256",
    }
    assert set(value["solver"]) >= {
        *("status", "objective", "bound", "gap", "bound_method", "seconds", "seed"),
        "reproducible",
    }
    assert value["model"]["layer_ids"] == [1, 3]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"physical_to_logical_map": [[0] * 4, [1] * 4]}, "expert 1 has no slot"),
        ({"physical_to_logical_map": [ROWS[0]]}, "1 layers placed, 2 layers"),
        (
            {"physical_to_logical_map": [[0, 1, 2, 10**30], ROWS[1]]},
            r"map\[0\]\[3\] is 1000",
        ),
        ({"physical_to_logical_map": ["", ""]}, r'map\[0\] is "", expected a list'),
        ({"physical_to_logical_map": None}, "map is null, expected a list"),
        ({"num_ranks": 3}, "4 slots do not divide over 3 ranks"),
        ({"num_ranks": "2"}, 'num_ranks is "2", expected a whole number'),
        ({"num_ranks": True}, "num_ranks is true, expected a whole number"),
        ({"num_nodes": 0}, "num_nodes is 0, expected a whole number >= 1"),
        ({"model": 3}, "model is 3, expected an object"),
        ({"model": {}}, "model lacks num_experts"),
        ({"solver": {}}, "solver lacks status"),
        ({"solver": []}, r"solver is \[\], expected an object"),
        ({"schema_version": 3}, "written by a newer placer: it has schema_version 3"),
        ({"surplus": 1}, "it has the unknown field surplus"),
        ({"policy": "bogus"}, "allowed are fixed, follow, token, request"),
        (
            {"exchange": "per-gpu"},
            'exchange is "per-gpu", allowed are per-expert, per-rank',
        ),
        ({"max_imbalance": "1.1"}, 'max_imbalance is "1.1", expected a number'),
        ({"max_imbalance": float("nan")}, "holds nan, which is not a finite number"),
        ({"max_imbalance": 0.5}, r"max_imbalance is 0\.5, expected a number >= 1"),
        ({"metrics": []}, r"metrics is \[\], expected an object"),
        ({"metrics": {"profile": 3, "heldout": None, "baselines": {}}}, "profile is 3"),
        ({"provenance": 3}, "provenance is 3, expected an object"),
        ({"provenance": {"replica_choice": "any"}}, 'replica_choice is "any", allowed are'),
        ({"provenance": {"engine": []}}, r"engine is \[\], expected a text or null"),
        ({"provenance": {"layout": {"groups": 3}}}, "groups is 3, expected a list"),
    ],
)
def test_a_damaged_plan_is_refused_with_its_name(
    path: Path, change: dict[str, Any], match: str
) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PlacerError, match=match) as caught:
        Plan.read(path)
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 1
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00", "[" * 100_000, "9" * 5000])
def test_what_is_no_plan_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(PlacerError, match=path.name) as caught:
        Plan.read(path)
    assert caught.value.hint


def test_model_and_placement_must_agree(path: Path) -> None:
    plan = Plan.read(path)
    with pytest.raises(PlacerError, match=r"\(4, 4\) experts per layer, the model"):
        replace(plan, model=msgspec.structs.replace(UNBOUND, num_experts=(4, 8)))


@pytest.mark.parametrize(
    "change", [{"vocab_size": 11}, {"layer_ids": [1, 4]}, {"model_type": "mixtral"}]
)
def test_a_model_that_is_not_that_of_its_fingerprint_is_refused(
    path: Path, change: dict[str, Any]
) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"model": value["model"] | change}))
    with pytest.raises(PlacerError, match=r"the model's fingerprint is .* were edited"):
        Plan.read(path)


def test_a_key_that_stands_twice_is_refused(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace('"num_nodes"', '"num_ranks": 2, "num_nodes"'))
    with pytest.raises(PlacerError, match='the key "num_ranks" appears twice'):
        Plan.read(path)
