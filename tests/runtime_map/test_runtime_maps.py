"""Every map obeys its runtime's rules, and ``verify`` finds each way to break one.

The rules are written down here a second time, from what each engine does with the file.
"""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from placer.cli.export import TARGETS
from placer.cli.main import main
from placer.errors import PlacerError, UsageError, VerificationError
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.runtime_map.engine_family import other_choices
from placer.runtime_map.maps import RUNTIMES, export_map, verify_map
from placer.target.engine import Engine
from placer.target.map_formats import MAPS
from tests.plans import unsolved_plan

WritePlan = Callable[..., Path]
NUM_LAYERS, NUM_EXPERTS, NUM_RANKS = 6, 8, 4
# Dense layers 0 and 1, MoE layers 2 to 5, one MTP layer behind them.
CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": NUM_LAYERS,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 1,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "hidden_size": 16,
    "vocab_size": 32,
}
# Replicas of experts 3, 2, 1, 0 and so on; no rank has two copies of one.
ROWS = [
    [0, 1, 2, 3, 4, 5, 6, 7, 3, 2, 1, 0],
    [7, 6, 5, 0, 4, 3, 2, 1, 0, 7, 6, 5],
    [0, 4, 1, 5, 2, 6, 3, 7, 0, 1, 2, 3],
    [3, 1, 7, 5, 0, 2, 4, 6, 1, 3, 5, 0],
]
SUFFIXES = [(name, suffix) for name, one in MAPS.items() for suffix in one.suffixes]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of which only the config exists: a map needs no weights."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


@pytest.fixture
def plan(model: Path, write_plan: WritePlan) -> Path:
    placement = Placement.from_json(ROWS, (NUM_EXPERTS,) * 4, NUM_RANKS, 2)
    return write_plan(ModelSpec.from_checkpoint(model), placement)


def held(row: list[int]) -> list[list[int]]:
    """Experts of each rank, where slots are dealt out to ranks in order."""
    width = len(row) // NUM_RANKS
    return [row[rank * width : (rank + 1) * width] for rank in range(NUM_RANKS)]


def read_sglang(path: Path) -> list[list[list[int]]]:
    """``init_by_mapping(**file)`` takes one argument and indexes it by hidden layer."""

    def init_by_mapping(*, physical_to_logical_map: list[list[int]]) -> list[list[int]]:
        return physical_to_logical_map

    if path.suffix == ".pt":
        import torch

        found = torch.load(path, weights_only=True, map_location="cpu")
        found["physical_to_logical_map"] = found["physical_to_logical_map"].tolist()
    else:
        found = json.loads(path.read_text())
    rows = init_by_mapping(**found)
    assert len(rows) == CONFIG["num_hidden_layers"]
    for row in rows:
        assert set(row) == set(range(NUM_EXPERTS)), "an expert without a candidate"
        assert len(row) % NUM_RANKS == 0
        assert all(len(set(one)) == len(one) for one in held(row)), "two copies on a GPU"
    return [held(row) for row in rows[2:]]


def read_trtllm(path: Path) -> list[list[list[int]]]:
    """``MoeLoadBalancerConfig`` forbids other keys, and asks for every MoE layer."""
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(path.read_text())
    assert set(found) <= {
        "num_slots",
        "initial_global_assignments",
        "layer_updates_per_iter",
    }
    assert found["layer_updates_per_iter"] == 0
    assert found["num_slots"] % NUM_RANKS == 0
    assigned = found["initial_global_assignments"]
    for layer in (2, 3, 4, 5, 6):
        assert len(assigned[layer]) == found["num_slots"]
        assert set(assigned[layer]) == set(range(NUM_EXPERTS))
    return [held(assigned[layer]) for layer in (2, 3, 4, 5)]


def read_vllm_ascend(path: Path) -> list[list[list[int]]]:
    """``expert_file_to_tensor``: by position in both lists, one width for all devices."""
    found = json.loads(path.read_text())
    layers = []
    for ordinal in range(found["moe_layer_count"]):
        layer = found["layer_list"][ordinal]
        devices = [one["device_expert"] for one in layer["device_list"]]
        assert layer["device_count"] == len(devices)
        tensor = np.asarray(devices)
        assert tensor.ndim == 2, "device lists of unequal length make no tensor"
        # The map from expert to local slot: a second copy would overwrite the first.
        local = np.full((len(devices), NUM_EXPERTS), -1)
        for device, experts in enumerate(devices):
            for slot, expert in enumerate(experts):
                assert local[device, expert] == -1
                local[device, expert] = slot
        assert (local >= 0).any(axis=0).all()
        layers.append(devices)
    return layers


def read_vllm_proposal(path: Path) -> list[list[list[int]]]:
    """vllm-project/vllm#49572: ``[L][P]``, every expert in every row."""
    rows = json.loads(path.read_text())
    assert all(set(row) == set(range(NUM_EXPERTS)) for row in rows)
    return [held(row) for row in rows]


def read_vllm_das(path: Path) -> list[list[list[int]]]:
    """HYGON-AI/vllm-plugin-das: of one model class, and of its MTP class."""
    found = json.loads(path.read_text())
    assert found["version"] == 2
    maps = {n: one["physical_to_logical_map"] for n, one in found["model_maps"].items()}
    (drafted,) = maps.pop("DeepSeekMTP")
    (rows,) = maps.values()
    assert len(drafted) == len(rows[0])
    return [held(row) for row in rows]


def read_eplb(path: Path) -> list[list[list[int]]]:
    """By definition: ``log2phy`` lists the slots in which ``phy2log`` has the expert."""
    found = dict(np.load(path)) if path.suffix == ".npz" else load_file(path)
    phy2log, log2phy, logcnt = found["phy2log"], found["log2phy"], found["logcnt"]
    assert log2phy.shape == (*logcnt.shape, logcnt.max())
    for layer in range(len(phy2log)):
        for expert in range(NUM_EXPERTS):
            slots = [p for p, e in enumerate(phy2log[layer].tolist()) if e == expert]
            assert logcnt[layer, expert] == len(slots)
            padding = [-1] * (log2phy.shape[2] - len(slots))
            assert log2phy[layer, expert].tolist() == slots + padding
    return [held(row) for row in phy2log.tolist()]


def read_csv(path: Path) -> list[list[list[int]]]:
    layers = [[[] for _ in range(NUM_RANKS)] for _ in ROWS]
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            assert int(row["layer_id"]) == int(row["moe_layer"]) + 2
            layers[int(row["moe_layer"])][int(row["rank"])].append(int(row["expert"]))
    return layers


def read_json(path: Path) -> list[list[list[int]]]:
    found = json.loads(path.read_text())
    assert found["layer_ids"] == [2, 3, 4, 5]
    assert (found["num_ranks"], found["num_nodes"]) == (NUM_RANKS, 2)
    return [held(row) for row in found["physical_to_logical_map"]]


READERS = {
    "sglang": read_sglang,
    "trtllm": read_trtllm,
    "vllm-ascend": read_vllm_ascend,
    "vllm-pr49572": read_vllm_proposal,
    "vllm-das": read_vllm_das,
    "eplb": read_eplb,
    "csv": read_csv,
    "json": read_json,
}


@pytest.mark.parametrize(("name", "suffix"), SUFFIXES)
def test_the_runtime_reads_what_the_plan_says(
    name: str, suffix: str, model: Path, plan: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"map{suffix}"
    written = export_map(name, plan, model, out)
    assert READERS[name](out) == [held(row) for row in ROWS]
    assert (written.num_layers, written.num_slots) == (4, 48)
    report = verify_map(out, plan, model)
    assert (report.runtime, report.num_slots, report.num_replicas) == (name, 48, 16)
    before = out.read_bytes()
    export_map(name, plan, model, out)
    assert out.read_bytes() == before


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(st.permutations(range(NUM_EXPERTS)), min_size=4, max_size=4),
    target=st.sampled_from(SUFFIXES),
)
def test_any_permutation_survives_any_format(
    rows: list[list[int]],
    target: tuple[str, str],
    model: Path,
    write_plan: WritePlan,
    tmp_path: Path,
) -> None:
    name, suffix = target
    placement = Placement.from_json(rows, (NUM_EXPERTS,) * 4, NUM_RANKS, 1)
    plan = write_plan(ModelSpec(num_experts=(NUM_EXPERTS,) * 4, top_k=2), placement)
    out = tmp_path / f"map{suffix}"
    written = export_map(name, plan, model, out)
    assert "match by shape only" in written.warnings[0]
    assert verify_map(out, plan, model).num_replicas == 0


def swap(row: list[int]) -> None:
    row[0], row[-1] = row[-1], row[0]


def broken(name: str, value: Any, change: str) -> None:
    """Break a JSON map in place: the same fault in each engine's own layout."""
    if name == "vllm-ascend":
        experts = value["layer_list"][0]["device_list"][0]["device_expert"]
        other = value["layer_list"][0]["device_list"][3]["device_expert"]
        if change == "swap":
            experts[0], other[0] = other[0], experts[0]
            return
    else:
        rows = value["physical_to_logical_map"]
        experts = rows[-1]
        if change == "swap":
            swap(experts)
            return
    if change == "twice":
        experts[1] = experts[0]
    elif change == "range":
        experts[0] = NUM_EXPERTS
    elif change == "text":
        experts[0] = "0"
    elif change == "short":
        experts.pop()
    elif change == "key":
        value["comment"] = "made by hand"


@pytest.mark.parametrize("name", ["sglang", "vllm-ascend", "json"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("swap", "in the plan|two replicas"),
        ("twice", "two replicas|has no slot"),
        ("range", "outside 0..7"),
        ("text", "whole number"),
        ("short", "slots"),
        ("key", "comment"),
    ],
)
def test_verify_names_what_is_wrong_in_a_json_map(
    name: str, change: str, match: str, model: Path, plan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "map.json"
    export_map(name, plan, model, out)
    value = json.loads(out.read_text())
    broken(name, value, change)
    out.write_text(json.dumps(value))
    if (name, change) == ("vllm-ascend", "key"):
        verify_map(out, plan, model)  # vllm-ascend takes the fields it knows
        return
    with pytest.raises(VerificationError, match=match) as caught:
        verify_map(out, plan, model)
    assert f"placer export {name}" in caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("num_slots: 12", "num_slots: 16", "has 12 slots, not 16"),
        ("num_slots: 12\n", "", "the map needs num_slots"),
        ("per_iter: 0", "per_iter: 2", "layer_updates_per_iter must be 0"),
        ("  6: ", "  7: ", "stops if a layer is missing"),
        ("  3: ", "  2: ", "the key 2 appears twice"),
        ("num_slots", "ep_size: 4\nnum_slots", "unknown keys: 'ep_size'"),
        ("  2: [0, 1", "  2: [1, 0", "slot 0 holds expert 1, in the plan 0"),
        ("  2: [0, 1", "  2: [0, 9", "outside 0..7"),
        ("  2: [0, 1", "  2: [0,, 1", "map map.yaml is not valid YAML"),
    ],
)
def test_verify_names_what_is_wrong_in_a_trtllm_map(
    old: str, new: str, match: str, model: Path, plan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "map.yaml"
    export_map("trtllm", plan, model, out)
    text = out.read_text()
    assert old in text
    out.write_text(text.replace(old, new))
    with pytest.raises(VerificationError, match=match):
        verify_map(out, plan, model)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("moe_layer,", "layer,", "columns"),
        ("\n0,2,0,0,0\n", "\n0,2,0,0,1\n", "in the plan"),
        ("\n0,2,0,0,0\n", "\n0,2,1,0,0\n", "in the plan"),
        ("\n0,2,0,0,0\n", "\n9,2,0,0,0\n", "out of range"),
        ("\n0,2,0,0,0\n", "\n0,2,0,0,x\n", "invalid literal"),
        ("\n0,2,0,0,0\n", "\n", "do not divide|in the plan"),
    ],
)
def test_verify_names_what_is_wrong_in_a_csv_map(
    old: str, new: str, match: str, model: Path, plan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "map.csv"
    export_map("csv", plan, model, out)
    text = out.read_text()
    assert old in text
    out.write_text(text.replace(old, new))
    with pytest.raises(VerificationError, match=match):
        verify_map(out, plan, model)


def test_verify_names_what_is_wrong_in_eplb_arrays(
    model: Path, plan: Path, tmp_path: Path
) -> None:
    out = tmp_path / "map.safetensors"
    export_map("eplb", plan, model, out)
    good = load_file(out)
    other = good["log2phy"].copy()
    other[0, 0] = other[0, 0][::-1]
    moved = good["phy2log"].copy()
    moved[0, 0] = 9
    for change, match in (
        ({"log2phy": other}, "log2phy does not match phy2log"),
        ({"logcnt": good["logcnt"] + 1}, "logcnt does not match"),
        ({"phy2log": moved}, "outside 0..7"),
        ({"phy2log": good["phy2log"].astype(np.int32)}, "not int64"),
        ({"phy2log": good["phy2log"][:3]}, "for 4 MoE layers"),
        ({"extra": good["logcnt"]}, "it holds"),
    ):
        save_file(good | change, out)
        with pytest.raises(VerificationError, match=match):
            verify_map(out, plan, model)
    for suffix in (".safetensors", ".npz"):
        (tmp_path / f"odd{suffix}").write_bytes(b"neither")
        with pytest.raises(VerificationError, match="cannot be loaded"):
            verify_map(tmp_path / f"odd{suffix}", plan, model)


def test_a_map_of_another_plan_is_not_verified(
    model: Path, plan: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    rows = [list(range(NUM_EXPERTS))] * 4
    placement = Placement.from_json(rows, (NUM_EXPERTS,) * 4, NUM_RANKS, 1)
    other = write_plan(ModelSpec.from_checkpoint(model), placement, "other.json")
    for name, suffix in SUFFIXES:
        out = tmp_path / f"map{suffix}"
        export_map(name, other, model, out)
        with pytest.raises(VerificationError, match=f"not a valid {name} map"):
            verify_map(out, plan, model)


def test_what_no_engine_could_read_is_refused_and_leaves_nothing(
    model: Path, write_plan: WritePlan, tmp_path: Path
) -> None:
    rows = [list(range(8)), [0, 1, 2, 3, 4, 5, 6, 7, 3, 2, 1, 0], *[list(range(8))] * 2]
    placement = Placement.from_json(rows, (NUM_EXPERTS,) * 4, NUM_RANKS, 1)
    plan = write_plan(ModelSpec.from_checkpoint(model), placement)
    left = set(tmp_path.iterdir())
    for name, suffix in SUFFIXES:
        out = tmp_path / f"{name}{suffix}"
        try:
            export_map(name, plan, model, out)
        except PlacerError as error:
            assert re.search(r"same number of slots .* \[8, 12\]", error.message)
            continue
        assert RUNTIMES[name].family is None
        assert verify_map(out, plan, model).num_replicas == 4
        left.add(out)
    assert set(tmp_path.iterdir()) == left > {tmp_path / "csv.csv", tmp_path / "json.json"}


def test_formats_without_an_engine_need_no_model(plan: Path, tmp_path: Path) -> None:
    for name, one in RUNTIMES.items():
        out = tmp_path / f"map{MAPS[name].suffixes[0]}"
        if one.needs_model:
            with pytest.raises(UsageError, match="needs MODEL") as caught:
                export_map(name, plan, None, out)
            assert "MODEL" in caught.value.hint
            continue
        assert bool(export_map(name, plan, None, out).start) == (one.family is not None)
        assert READERS[name](out) == [held(row) for row in ROWS]


@pytest.mark.parametrize(
    ("name", "suffix", "model_type", "expected"),
    [
        ("sglang", ".json", "deepseek_v3", None),
        ("sglang", ".json", "dots1", "SGLang ignores a map for dots1"),
        ("trtllm", ".yaml", "deepseek_v3", None),
        ("trtllm", ".yaml", "glm4_moe", "TensorRT-LLM ignores a map for glm4_moe"),
    ],
)
def test_a_family_that_an_engine_ignores_is_told_with_the_way_out(
    name: str,
    suffix: str,
    model_type: str,
    expected: str | None,
    model: Path,
    write_plan: WritePlan,
    tmp_path: Path,
) -> None:
    (model / "config.json").write_text(
        json.dumps(CONFIG | {"model_type": model_type, "architectures": []})
    )
    placement = Placement.from_json(ROWS, (NUM_EXPERTS,) * 4, NUM_RANKS, 2)
    plan = write_plan(ModelSpec.from_checkpoint(model), placement)
    written = export_map(name, plan, model, tmp_path / f"map{suffix}")
    if expected is None:
        assert written.warnings == ()
        assert written.start
        return
    assert expected in written.warnings[0]
    assert written.start == (), "it would serve the map in vain"
    assert f"placer export checkpoint NEW {model} --out DIR" in written.warnings[0]


@pytest.mark.parametrize("redundant", [0, 4])
def test_gpt_oss_is_called_unsafe_under_sglang(
    redundant: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A permuted checkpoint of a new plan is the way out; verify says so again."""
    config = {
        "model_type": "gpt_oss",
        "num_hidden_layers": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 16,
        "vocab_size": 32,
    }
    (model / "config.json").write_text(json.dumps(config))
    row = list(range(8)) if redundant == 0 else [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 0]
    placement = Placement.from_json([row] * 2, (8, 8), NUM_RANKS, 2)
    spec = ModelSpec.from_checkpoint(model)
    plan = tmp_path / "plan.json"
    unsolved_plan(spec, placement, fold="0/2").write(plan)
    out = tmp_path / "map.json"
    told = export_map("sglang", plan, model, out).warnings[0]
    assert "loads them contiguously" in told
    again = (
        f"placer solve TRACE --engine sglang-deepep --nodes 2 --gpus-per-node "
        f"{NUM_RANKS // 2} --redundant-experts 0 --fold 0/2 --out NEW"
    )
    assert (again in told) == (redundant > 0)
    permuted = "NEW" if redundant else plan
    assert told.endswith(f"placer export checkpoint {permuted} {model} --out DIR")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(model), str(out), str(plan)])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert told in printed.err
    assert "valid for its runtime" not in printed.out
    assert "its engine ignores it for this model" in printed.out


def test_the_command_line_exports_and_verifies(
    model: Path, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Help lists exactly the runtimes there are; the exit code of a bad map is 5."""
    assert RUNTIMES.keys() < set(TARGETS)
    out = tmp_path / "map.yaml"
    for words in (
        ["export", "trtllm", plan, model, "--out", out],
        ["verify", model, out, plan],
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert ended.value.code == 0
    printed = capsys.readouterr()
    assert "--extra_llm_api_options" in printed.err
    assert "without a warning" in printed.err
    with pytest.raises(SystemExit):
        main(["verify", str(model), str(out), str(plan), "--json"])
    assert json.loads(capsys.readouterr().out)["num_slots"] == 48
    out.write_text(out.read_text().replace("[0, 1", "[1, 0"))
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(model), str(out), str(plan)])
    assert ended.value.code == 5
    with pytest.raises(SystemExit) as ended:
        main(["export", "vllm", str(plan), str(model), "--out", str(out)])
    assert ended.value.code == 2
    assert "permuted checkpoint" in capsys.readouterr().err


def test_a_wrong_suffix_is_refused_with_the_right_one(
    model: Path, plan: Path, tmp_path: Path
) -> None:
    for name in RUNTIMES:
        with pytest.raises(UsageError, match="suffix") as caught:
            export_map(name, plan, model, tmp_path / "map.bin")
        assert caught.value.hint == f"--out {tmp_path}/map{MAPS[name].suffixes[0]}"
    (tmp_path / "map.bin").touch()
    with pytest.raises(UsageError, match="is not a map"):
        verify_map(tmp_path / "map.bin", plan, model)


def test_figures_of_other_replicas_than_the_plan_counts_on_are_told(
    model: Path, write_plan: WritePlan
) -> None:
    placement = Placement.from_json(ROWS, (NUM_EXPERTS,) * 4, NUM_RANKS, 2)
    path = write_plan(ModelSpec.from_checkpoint(model), placement)
    plan = Plan.read(path)
    plan = replace(plan, provenance={**plan.provenance, "replica_choice": "hash"})
    names = ("sglang-deepep", "sglang-none", "trtllm-deepep")
    told = list(other_choices(plan, [None, *map(Engine.named, names)]))
    assert len(told) == 1
    assert "sglang-static" in told[0] and "add --replica-choice hash" in told[0]


def test_the_model_may_say_otherwise_than_the_plan(
    model: Path, plan: Path, tmp_path: Path
) -> None:
    """Other experts are refused before anything is written; further layers are told of."""
    (model / "config.json").write_text(json.dumps(CONFIG | {"n_routed_experts": 16}))
    with pytest.raises(PlacerError, match="different models"):
        export_map("trtllm", plan, model, tmp_path / "map.yaml")
    assert Plan.read(plan).model.layer_ids == (2, 3, 4, 5)
    (model / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 7}))
    written = export_map("trtllm", plan, model, tmp_path / "map.yaml")
    assert "places no expert of layers 6, which" in written.warnings[0]
