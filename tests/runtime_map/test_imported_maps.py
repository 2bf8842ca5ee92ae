"""A map of an engine becomes a plan: whatever was exported comes back, byte for byte."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from placer.cli.main import main
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.placement.engine_map import map_format
from placer.placement.topology import Topology
from placer.report.inspect import summarize
from placer.runtime_map.imported import import_map
from placer.runtime_map.maps import RUNTIMES, export_map, verify_map
from placer.target.map_formats import MAPS
from tests.plans import unsolved_plan

# Dense layer 0, MoE layers 1 and 2, one MTP layer behind them.
CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "hidden_size": 16,
    "vocab_size": 32,
}
TWO_NODES = Topology(num_nodes=2, gpus_per_node=2)
FORMATS = [(name, suffix) for name, one in MAPS.items() for suffix in one.suffixes]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return int(done.value.code or 0)


@pytest.mark.parametrize(("name", "suffix"), FORMATS)
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32 - 1), copies=st.sampled_from([0, 4]))
def test_what_is_exported_comes_back(
    name: str, suffix: str, seed: int, copies: int, model: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    # Of twelve slots on four ranks the copies are on the ranks after those of the firsts.
    order = [rng.permutation(8).reshape(4, 2) for _ in range(2)]
    rows = [
        np.concatenate([row, np.roll(row[:, :1], 1, axis=0)], axis=1) if copies else row
        for row in order
    ]
    spec = ModelSpec.from_checkpoint(model)
    placed = Placement.from_json([row.ravel().tolist() for row in rows], (8, 8), 4, 2)
    unsolved_plan(spec, placed).write(tmp_path / "plan")
    needed = [model] if RUNTIMES[name].needs_model else [model, None]
    for directory in needed:
        first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
        export_map(name, tmp_path / "plan", directory, first)
        assert map_format(first) == name, "a command that takes a plan names its importer"
        (tmp_path / "again").unlink(missing_ok=True)
        plan, _ = import_map(name, first, TWO_NODES, directory, tmp_path / "again")
        assert plan.placement.to_json() == placed.to_json()
        found = Plan.read(tmp_path / "again")
        assert (found.solver.status, found.policy, found.solver.bound) == (
            "imported",
            "fixed",
            None,
        )
        second.unlink(missing_ok=True)
        export_map(name, tmp_path / "again", directory, second)
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("name", "suffix"), [one for one in FORMATS if not RUNTIMES[one[0]].needs_model]
)
def test_the_map_of_a_plan_without_layer_numbers_comes_back(
    name: str, suffix: str, tmp_path: Path
) -> None:
    """A trace that is not bound to a checkpoint may not say which layers it has."""
    rows = [[0, 3, 1, 2, 7, 4, 5, 6], [7, 6, 5, 4, 3, 2, 1, 0]]
    placed = Placement.from_json(rows, (8, 8), 4, 2)
    unsolved_plan(ModelSpec(num_experts=(8, 8), top_k=2), placed).write(tmp_path / "plan")
    path = tmp_path / f"map{suffix}"
    export_map(name, tmp_path / "plan", None, path)
    plan, _ = import_map(name, path, TWO_NODES, None, tmp_path / "again")
    assert plan.placement.to_json() == rows


def damaged(value: Any, rng: np.random.Generator) -> Any:
    """Return JSON with one number changed, or one item missing or doubled."""
    if isinstance(value, dict) and value:
        key = list(value)[rng.integers(len(value))]
        return value | {key: damaged(value[key], rng)}
    if isinstance(value, list) and value:
        place = int(rng.integers(len(value)))
        if rng.random() < 0.3:
            return value[:place] + value[place + 1 :]
        return [*value[:place], damaged(value[place], rng), *value[place + 1 :]]
    return [value + 1, -1, None, "x", 1.5, {}][rng.integers(6)] if value == value else value


@pytest.mark.parametrize("name", ["sglang", "vllm-ascend", "json"])
@pytest.mark.parametrize("seed", range(12))
def test_damaged_maps_are_refused_in_one_sentence(
    name: str, seed: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = ModelSpec.from_checkpoint(model)
    placed = Placement.from_json([[*range(8)]] * 2, (8, 8), 4, 2)
    unsolved_plan(spec, placed).write(tmp_path / "plan")
    export_map(name, tmp_path / "plan", model, tmp_path / "map.json")
    value = json.loads((tmp_path / "map.json").read_text())
    if name == "json":  # what is not placed does not say where experts are
        value = {**value, "physical_to_logical_map": value["physical_to_logical_map"][:1]}
    else:
        try:
            value = damaged(value, np.random.default_rng(seed))
        except TypeError:
            value = []
    (tmp_path / "map.json").write_text(json.dumps(value))
    words = ("--nodes", 2, "--gpus-per-node", 2, "--model", model)
    code = run("import", f"{name}-map", tmp_path / "map.json", *words, "--out", "never")
    told = capsys.readouterr().err
    assert code in (1, 2)
    assert "Traceback" not in told
    assert len(told.splitlines()) == 2 and "hint: " in told
    assert not Path("never").exists()


def test_a_damaged_array_is_refused(model: Path, tmp_path: Path) -> None:
    spec = ModelSpec.from_checkpoint(model)
    placed = Placement.from_json([[*range(8)]] * 2, (8, 8), 4, 2)
    unsolved_plan(spec, placed).write(tmp_path / "plan")
    export_map("eplb", tmp_path / "plan", None, tmp_path / "map.safetensors")
    arrays = load_file(tmp_path / "map.safetensors")
    arrays["phy2log"][0, :2] = arrays["phy2log"][0, 1::-1]
    np.savez(tmp_path / "map.npz", **arrays)
    for folder in (None, model):
        with pytest.raises(PlacerError, match="log2phy does not match phy2log"):
            import_map("eplb", tmp_path / "map.npz", TWO_NODES, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_model", [True, False])
def test_phy2log_is_enough(with_model: bool, model: Path, tmp_path: Path) -> None:
    """EPLB's other two arrays follow from it."""
    rows = np.array([[7, 2, 0, 3, 5, 6, 1, 4, 7, 2, 0, 3]] * 2)
    np.savez(tmp_path / "map.npz", phy2log=rows)
    folder = model if with_model else None
    plan, _ = import_map("eplb", tmp_path / "map.npz", TWO_NODES, folder, tmp_path / "out")
    assert plan.placement.num_experts == (8, 8)
    assert [sorted(row) for row in plan.placement.to_json()] == [sorted(rows[0])] * 2
    np.savez(tmp_path / "two.npz", phy2log=rows, logcnt=rows)
    with pytest.raises(PlacerError, match="or only phy2log"):
        import_map("eplb", tmp_path / "two.npz", TWO_NODES, folder, tmp_path / "never")


@pytest.mark.parametrize("with_model", [True, False])
def test_rows_by_themselves_are_read_as_sglangs(
    with_model: bool, model: Path, tmp_path: Path
) -> None:
    """SGLang loads only an object, so an export writes one again."""
    rows = [[*range(8)], [7, 2, 0, 3, 5, 6, 1, 4], [3, 0, 2, 7, 4, 1, 6, 5]]
    (tmp_path / "map.json").write_text(json.dumps(rows))
    folder = model if with_model else None
    path, plan = tmp_path / "map.json", tmp_path / "plan"
    imported, _ = import_map("sglang", path, TWO_NODES, folder, plan)
    assert imported.placement.to_json() == (rows[1:] if with_model else rows)
    shown = summarize(imported).facts
    unsaid = ("exchange", "max_imbalance", "objective", "seed", "reproducible", "policy")
    assert [shown[name] for name in unsaid] == [None] * len(unsaid), "the map says none"
    if with_model:
        export_map("sglang", plan, model, tmp_path / "again.json")
        again = json.loads((tmp_path / "again.json").read_text())
        assert again["physical_to_logical_map"][1:] == rows[1:]
        assert run("verify", model, path, plan) != 0, "SGLang would not load the list"


def ascend_map(layer_ids: list[int], device_ids: list[int], rows: list[list[int]]) -> str:
    layers = [
        {
            "layer_id": number,
            "device_count": 4,
            "device_list": [
                {"device_id": device, "device_expert": row[2 * n : 2 * n + 2]}
                for n, device in enumerate(device_ids)
            ],
        }
        for number, row in zip(layer_ids, rows, strict=True)
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers})


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("layer_ids", [[0, 1], [1, 2]])
def test_layers_of_vllm_ascend_may_have_the_models_numbers(
    layer_ids: list[int], with_model: bool, model: Path, tmp_path: Path
) -> None:
    rows = [[7, 2, 0, 3, 5, 6, 1, 4], [3, 0, 2, 7, 4, 1, 6, 5]]
    (tmp_path / "map.json").write_text(ascend_map(layer_ids, [0, 1, 2, 3], rows))
    folder = model if with_model else None
    path, plan = tmp_path / "map.json", tmp_path / "plan"
    imported, _ = import_map("vllm-ascend", path, TWO_NODES, folder, plan)
    assert imported.placement.to_json() == rows
    if with_model:
        assert run("verify", model, path, plan) == 0


@pytest.mark.parametrize(
    ("layer_ids", "device_ids", "told"),
    [
        ([1, 0], [0, 1, 2, 3], ["vllm-ascend reads layers in order", "sort_by"]),
        ([1, 1], [0, 1, 2, 3], ["vllm-ascend reads layers in order"]),
        ([1, 3], [0, 1, 2, 3], ["model's MoE layers are [1, 2]"]),
        ([0, 1], [1, 0, 2, 3], ["vllm-ascend reads devices in order", "sort_by"]),
    ],
)
def test_numbers_of_vllm_ascend_that_contradict_their_places_are_refused(
    layer_ids: list[int],
    device_ids: list[int],
    told: list[str],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The engine ignores the numbers, so what was meant is unknown."""
    path = tmp_path / "map.json"
    path.write_text(ascend_map(layer_ids, device_ids, [[*range(8)], [*range(8)]]))
    words = ("--nodes", 2, "--gpus-per-node", 2, "--model", model)
    assert run("import", "vllm-ascend-map", path, *words, "--out", tmp_path / "never") == 1
    found = capsys.readouterr().err
    assert all(one in found for one in told), found
    assert not (tmp_path / "never").exists()


MAPS_OF_ENGINES = {
    "vllm-ascend": (
        ".json",
        '{"moe_layer_count":1,"layer_list":[{"layer_id":0,"device_count":2,"device_list":['
        '{"device_id":0,"device_expert":[7,2,0,3,5]},'
        '{"device_id":1,"device_expert":[6,1,4,7,2]}]}]}',
    ),
    "sglang": (".json", '{"physical_to_logical_map":[[7,2,0,3,5,6,1,4,7,2]]}'),
    "trtllm": (
        ".yaml",
        "num_slots: 10\nlayer_updates_per_iter: 0\ninitial_global_assignments:\n"
        "  0: [7, 2, 0, 3, 5, 6, 1, 4, 7, 2]\n",
    ),
}


@pytest.mark.parametrize("name", MAPS_OF_ENGINES)
def test_every_command_takes_what_an_engine_runs_now(
    name: str, make_trace: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a model: 8 experts on 2 ranks, two of them twice."""
    trace = make_trace(num_experts=(8,), num_sequences=60, num_tokens=1200).directory
    suffix, text = MAPS_OF_ENGINES[name]
    (tmp_path / f"map{suffix}").write_text(text)
    plan, new = tmp_path / "plan", tmp_path / "new"
    words = ("--gpus-per-node", 2, "--out", plan)
    assert run("import", f"{name}-map", tmp_path / f"map{suffix}", *words) == 0
    assert "does not name its model" in capsys.readouterr().err
    held = [[7, 2, 0, 3, 5, 6, 1, 4, 7, 2]]
    assert Plan.read(plan).placement.to_json() == held
    assert run("inspect", plan) == 0
    assert run("simulate", plan, trace, "--replica-choice", "hash") == 0
    quick = ("--num-rounds", 0, "--num-sweeps", 1, "--proof", "none", "--start", plan)
    copies: tuple[Any, ...] = ("--gpus-per-node", 2, "--redundant-experts", 2)
    if Plan.read(plan).recorded_choice is None:
        copies += ("--replica-choice", "hash")
    assert run("solve", trace, *copies, *quick, "--out", new) == 0
    assert run("export", "csv", plan, "--out", tmp_path / "x.csv") == 0
    capsys.readouterr()
    assert run("check", plan, trace, "--tolerance", 1) == 0
    told = capsys.readouterr()
    assert "compared with the earlier half" in told.err
    assert "copies" not in told.out


@pytest.mark.parametrize("name", MAPS_OF_ENGINES)
@pytest.mark.parametrize("command", ["check", "simulate", "solve"])
def test_a_map_in_the_place_of_a_plan_is_answered_with_its_import(
    name: str,
    command: str,
    make_trace: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace = make_trace(num_experts=(8,)).directory
    suffix, text = MAPS_OF_ENGINES[name]
    path = tmp_path / f"map{suffix}"
    path.write_text(text)
    solve = (trace, "--gpus-per-node", 2, "--redundant-experts", 2, "--start", path)
    words: dict[str, tuple[Any, ...]] = {
        "solve": (*solve, "--out", tmp_path / "new"),
    }
    assert run(command, *words.get(command, (path, trace))) != 0
    told = capsys.readouterr().err
    assert f"placer import {name}-map {path} --nodes N --gpus-per-node M --out PLAN" in told


@pytest.mark.parametrize("name", MAPS_OF_ENGINES)
@pytest.mark.parametrize(
    "line",
    [
        "solve MAP --gpus-per-node 2 --out new",
        "advise MAP --gpus-per-node 2",
        "trace links MAP",
        "replay MODEL MODEL --trace MAP",
    ],
)
def test_a_map_in_the_place_of_a_trace_is_called_a_map(
    name: str, line: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix, text = MAPS_OF_ENGINES[name]
    path = tmp_path / f"map{suffix}"
    path.write_text(text)
    words = [{"MAP": path, "MODEL": model}.get(word, word) for word in line.split()]
    if "--trace" in words:
        words[1] = tmp_path / "plan"
        words[1].touch()
    assert run(*words) == 1
    told = capsys.readouterr().err
    assert f"{path} is an engine's map ({name}-map), not a trace" in told
    assert f"placer import {name}-map {path} --nodes N --gpus-per-node M --out PLAN" in told


@pytest.mark.parametrize("name", MAPS_OF_ENGINES)
def test_a_map_is_inspected_as_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix, text = MAPS_OF_ENGINES[name]
    path = tmp_path / f"map{suffix}"
    path.write_text(text)
    assert run("inspect", path, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == f"{name} map"
    assert shown["facts"] == {"num_layers": 1, "num_slots": 10, "redundant_experts": 2}
    following = f"placer import {name}-map {path} --gpus-per-node M --out PLAN"
    assert shown["verdict"]["next"] == following
    assert run("inspect", path) == 0
    assert f"next: {following}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["counts.json", "rows.csv", "dump.pt"])
def test_what_may_be_loads_is_not_called_a_map(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text("[[3, 4], [1, 0]]")
    assert run("advise", path, "--gpus-per-node", 2) == 1
    assert "map" not in capsys.readouterr().err.replace(str(path), "")


ROWS = {3: [7, 2, 0, 3, 5, 6, 1, 4], 4: [7, 2, 0, 3, 5, 6, 1, 4]}
ALIKE = dict.fromkeys(ROWS, ROWS[3])  # PyYAML writes the second as an alias of the first
FILE = {"num_slots": 8, "layer_updates_per_iter": 0, "initial_global_assignments": ALIKE}


@pytest.mark.parametrize(
    "text",
    [
        yaml.safe_dump(FILE),
        yaml.safe_dump(FILE, default_flow_style=None, width=20),
        yaml.safe_dump(FILE, default_flow_style=False, indent=4),
        "# of last week\n" + json.dumps(FILE).replace('"3"', "3").replace('"4"', "4"),
        yaml.safe_dump({"moe_config": {"backend": "WIDEEP", "load_balancer": FILE}}),
    ],
    ids=["aliases", "wrapped lists", "blocks", "comments and JSON", "inside the options"],
)
def test_any_yaml_of_tensorrt_llm_is_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text(text)
    two = Topology(num_nodes=1, gpus_per_node=2)
    plan, _ = import_map("trtllm", tmp_path / "map.yaml", two, None, tmp_path / "plan")
    assert plan.placement.to_json() == [*ROWS.values()]
    assert plan.model.layer_ids == (3, 4)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: [1", "is not valid YAML: while parsing a flow sequence"),
        (
            "!!python/object/apply:os.system [ls]",
            "is not valid YAML: could not determine",
        ),
        ("a: &a [*a, *a]\n", "its aliases make far more"),
        (
            "initial_global_assignments: {3: [[1]]}",
            "layer 3 is not a list of whole numbers",
        ),
        ("initial_global_assignments: {x: [1]}", "layer numbers must be whole numbers"),
        ("[1, 2]", "it holds list"),
        ("? [1]\n: 2", "is not valid YAML"),
        ("moe_config: {load_balancer: map.yaml}", "it holds str"),
    ],
)
def test_yaml_that_is_no_map_is_refused(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(PlacerError, match=match) as caught:
        import_map("trtllm", tmp_path / "map.yaml", TWO_NODES, None, tmp_path / "plan")
    assert caught.value.hint


MAP_ROWS = [[*range(8)], [7, 2, 0, 3, 5, 6, 1, 4], [3, 0, 2, 7, 4, 1, 6, 5]]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64"])
def test_ids_may_be_any_integers(dtype: str, model: Path, tmp_path: Path) -> None:
    """At import. Verification still wants int64, with which engines index."""
    rows = np.asarray(MAP_ROWS, dtype=dtype)
    torch.save({"physical_to_logical_map": torch.tensor(rows)}, tmp_path / "m.pt")
    np.savez(tmp_path / "m.npz", phy2log=rows[1:])
    for name, file in (("sglang", "m.pt"), ("eplb", "m.npz")):
        path, out = tmp_path / file, tmp_path / "plan.json"
        plan, _ = import_map(name, path, TWO_NODES, model, out)
        assert plan.placement.to_json() == MAP_ROWS[1:]
        if dtype == "int64":
            verify_map(path, out, model)
        else:
            with pytest.raises(PlacerError, match="int64"):
                verify_map(path, out, model)


def test_arrays_under_vllms_names(model: Path, tmp_path: Path) -> None:
    """Its slots of experts are padded further, and in any order."""
    row = np.asarray([7, 2, 0, 3, 5, 6, 1, 4, 7, 2, 0, 3])
    slots = [[*np.flatnonzero(row == e)[::-1], -1, -1, -1][:4] for e in range(8)]
    arrays = {
        "physical_to_logical_map": np.stack([row] * 2),
        "logical_to_physical_map": np.asarray([slots] * 2),
        "logical_replica_count": np.stack([np.bincount(row)] * 2),
    }
    np.savez(tmp_path / "m.npz", **arrays)
    plan, _ = import_map("eplb", tmp_path / "m.npz", TWO_NODES, model, tmp_path / "p.json")
    assert [sorted(one) for one in plan.placement.to_json()] == [sorted(row)] * 2
    arrays["logical_to_physical_map"][0, 7, 0] = 1
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(PlacerError, match="log2phy does not match"):
        import_map("eplb", tmp_path / "m.npz", TWO_NODES, model, tmp_path / "q.json")


def test_numbers_of_layers_and_a_whole_map_may_be_texts(
    model: Path, tmp_path: Path
) -> None:
    devices = [
        [{"device_id": d, "device_expert": row[2 * d : 2 * d + 2]} for d in range(4)]
        for row in MAP_ROWS[1:]
    ]
    layers = [
        {"layer_id": str(n + 1), "device_count": 4, "device_list": one}
        for n, one in enumerate(devices)
    ]
    assigned = {
        str(n): row for n, row in zip((1, 2, 3), [*MAP_ROWS[1:], MAP_ROWS[0]], strict=True)
    }
    trtllm = {"num_slots": 8, "layer_updates_per_iter": 0}
    files = {
        "sglang": ("m.json", json.dumps({"physical_to_logical_map": MAP_ROWS})),
        "trtllm": ("m.yaml", trtllm | {"initial_global_assignments": assigned}),
        "vllm-ascend": ("m.json", {"moe_layer_count": 2, "layer_list": layers}),
    }
    for name, (file, value) in files.items():
        (tmp_path / file).write_text("\ufeff" + json.dumps(value))
        plan, _ = import_map(name, tmp_path / file, TWO_NODES, model, tmp_path / "p.json")
        assert plan.placement.to_json() == MAP_ROWS[1:]
    twice = json.dumps(
        trtllm | {"initial_global_assignments": assigned | {"01": MAP_ROWS[1]}}
    )
    (tmp_path / "m.yaml").write_text(twice)
    with pytest.raises(PlacerError, match="has a layer twice"):
        import_map("trtllm", tmp_path / "m.yaml", TWO_NODES, model, tmp_path / "q.json")


@pytest.mark.parametrize("names_layers", [True, False])
def test_a_csv_map_may_begin_with_a_byte_order_mark(
    names_layers: bool, model: Path, tmp_path: Path
) -> None:
    """As spreadsheets save it; layer_id is empty where the plan knew no model."""
    lines = ["moe_layer,layer_id,rank,slot,expert"]
    for layer, row in enumerate(MAP_ROWS[1:]):
        name = layer + 1 if names_layers else ""
        lines += [f"{layer},{name},{s // 2},{s},{e}" for s, e in enumerate(row)]
    (tmp_path / "m.csv").write_text("\ufeff" + "\n".join(lines) + "\n")
    for folder in (model, None):
        plan, _ = import_map(
            "csv", tmp_path / "m.csv", TWO_NODES, folder, tmp_path / "p.json"
        )
        assert plan.placement.to_json() == MAP_ROWS[1:]
