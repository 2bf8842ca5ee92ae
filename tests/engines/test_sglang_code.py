"""SGLang's own code loads placer's maps and chooses as predicted; its dumps import exactly.

The code is that of the wheel in build/engines/sglang: see ``sglang_code.py``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from placer.affinity import Affinity
from placer.cli.main import main
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.runtime_map.maps import export_map
from placer.serving.replica_choice import sglang_static_ranks
from placer.trace import Trace
from tests.engines.sglang_code import ROOT, SglangCode

pytestmark = pytest.mark.skipif(
    not ROOT.is_dir(), reason="SGLang's wheel is not there: make test-engines"
)
NUM_RANKS = 4
WritePlan = Callable[..., Path]


@pytest.fixture
def deepseek(tmp_path: Path) -> Path:
    """A config of DeepSeek-V3 whose first three of six layers are dense."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 6,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "vocab_size": 512,
        "num_nextn_predict_layers": 1,
    }
    folder = tmp_path / "deepseek"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["tiny_model", "deepseek"])
def model(request: pytest.FixtureRequest) -> Path:
    """Layers 0 and 2 of 4 are dense, or 0, 1 and 2 of 6."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


def placed(model: ModelSpec, num_redundant: int, num_nodes: int, seed: int) -> Placement:
    """Draw up to one copy of an expert for each rank, and deal the copies to the ranks."""
    rng = np.random.default_rng(seed)
    experts = np.arange(model.num_experts[0])
    rows = []
    for _ in model.num_experts:
        more = rng.permutation(np.repeat(experts, NUM_RANKS - 1))[:num_redundant]
        dealt = np.sort(np.concatenate([experts, more])).reshape(-1, NUM_RANKS)
        rows.append(rng.permutation(dealt.T).ravel().tolist())
    return Placement.from_json(rows, model.num_experts, NUM_RANKS, num_nodes)


def server(model: Path, placement: Placement) -> SglangCode:
    num_slots = len(placement.physical_to_logical_map[0])
    return SglangCode(
        model,
        num_ranks=NUM_RANKS,
        num_nodes=placement.num_nodes,
        num_redundant_experts=num_slots - placement.num_experts[0],
    )


def require_served_as_planned(map_file: Path, plan_file: Path, model: Path) -> None:
    """Fail unless SGLang places and chooses, on every rank, as the plan says."""
    plan = Plan.read(plan_file)
    layers = list(plan.model.layer_ids or ())
    sglang = server(model, plan.placement)
    chosen = []
    for rank in range(NUM_RANKS):
        loaded = sglang.load(map_file, rank)
        rows = loaded.physical_to_logical_map[layers]
        assert rows.tolist() == plan.placement.to_json()
        physical = loaded.logical_to_rank_dispatch_physical_map[layers]
        chosen.append(physical // loaded.num_local_physical_experts)
    predicted = np.stack(sglang_static_ranks(plan.placement, layers), axis=1)
    assert np.stack(chosen).tolist() == predicted.tolist()


@pytest.mark.parametrize("suffix", [".json", ".pt"])
@pytest.mark.parametrize("num_nodes", [1, 2, 4])
@pytest.mark.parametrize("num_redundant", [0, 4, 8])
def test_sglang_loads_the_map_and_chooses_the_predicted_copies(
    model: Path,
    write_plan: WritePlan,
    tmp_path: Path,
    num_redundant: int,
    num_nodes: int,
    suffix: str,
) -> None:
    spec = ModelSpec.from_checkpoint(model)
    for seed in range(3):
        plan = write_plan(spec, placed(spec, num_redundant, num_nodes, seed))
        map_file = tmp_path / f"{seed}{suffix}"
        export_map("sglang", plan, model, map_file)
        require_served_as_planned(map_file, plan, model)


@pytest.mark.parametrize("slot", range(12))
def test_a_map_with_one_slot_changed_is_noticed(
    tiny_model: Path, write_plan: WritePlan, tmp_path: Path, slot: int
) -> None:
    """Where the expert had another copy, SGLang takes the map without a word."""
    spec = ModelSpec.from_checkpoint(tiny_model)
    plan = write_plan(spec, placed(spec, 4, 1, seed=0))
    export_map("sglang", plan, tiny_model, tmp_path / "map.json")
    rows = json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]
    rows[3][slot] = (rows[3][slot] + 1) % 8
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps({"physical_to_logical_map": rows}))
    with pytest.raises((AssertionError, ZeroDivisionError)):
        require_served_as_planned(changed, plan, tiny_model)


class Batch(NamedTuple):
    """A forward pass as the recorder sees it."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    forward_mode: Any
    extend_seq_lens_cpu: list[int] | None


TOKEN_IDS = torch.arange(100, 112)
POSITIONS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 5, 3, 6, 4])


def routing(model: ModelSpec) -> list[np.ndarray]:
    """Return random experts of the tokens: [T, k] int32 of each MoE layer."""
    rng = np.random.default_rng(0)
    rows = [[rng.permutation(size) for _ in TOKEN_IDS] for size in model.num_experts]
    return [np.stack(row)[:, : model.top_k].astype(np.int32) for row in rows]


@pytest.fixture
def record(
    model: Path, write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Return what records two prompts in one pass, then two passes that decode both."""

    def run(recorder_mode: str) -> Path:
        spec = ModelSpec.from_checkpoint(model)
        placement = placed(spec, 4, 1, seed=1)
        export_map("sglang", write_plan(spec, placement), model, tmp_path / "map.json")
        sglang = server(model, placement)
        sglang.load(tmp_path / "map.json", rank=2)
        monkeypatch.setenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", str(tmp_path / "out"))
        # What a dump asks of a GPU and of other processes: there are none.
        no_device = SimpleNamespace(empty_cache=lambda: None)
        monkeypatch.setattr(torch, "get_device_module", lambda: no_device)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
        recorder = sglang.recorder(recorder_mode)
        recorder.start_record()
        for number, (part, mode, lengths) in enumerate(
            [
                (slice(0, 8), sglang.ForwardMode.EXTEND, [5, 3]),
                (slice(8, 10), sglang.ForwardMode.DECODE, None),
                (slice(10, 12), sglang.ForwardMode.DECODE, None),
            ]
        ):
            batch = Batch(TOKEN_IDS[part], POSITIONS[part], mode, lengths)
            with recorder.with_forward_pass(number, batch):
                for layer, ids in zip(spec.layer_ids or (), routing(spec), strict=True):
                    with recorder.with_current_layer(layer):
                        physical = sglang.physical(layer, torch.from_numpy(ids[part]))
                        recorder.on_select_experts(topk_ids=physical)
        recorder.stop_record()
        recorder.dump_record()
        (dump,) = (tmp_path / "out").iterdir()
        return dump

    return run


def imported(name: str, file: Path, model: Path, out: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["import", name, str(file), "--model", str(model), "--out", str(out)])
    assert ended.value.code == 0


def test_a_dump_of_tokens_imports_exactly(
    model: Path, record: Callable[[str], Path], tmp_path: Path
) -> None:
    dump = record("per_token")
    imported("sglang-dump", dump, model, tmp_path / "trace")
    tokens = Trace(tmp_path / "trace").read()
    routed = routing(ModelSpec.from_checkpoint(model))
    assert [ids.tolist() for ids in tokens.experts] == [ids.tolist() for ids in routed]
    assert tokens.token_ids.tolist() == TOKEN_IDS.tolist()
    assert tokens.positions.tolist() == POSITIONS.tolist()
    assert tokens.phase.tolist() == [0] * 8 + [1] * 4
    assert tokens.sequence_ids.tolist() == [0] * 5 + [1] * 3 + [2, 3, 4, 5]


def test_a_dump_of_loads_imports_exactly(
    model: Path, record: Callable[[str], Path], tmp_path: Path
) -> None:
    dump = record("stat")
    imported("sglang-stat", dump, model, tmp_path / "affinity")
    affinity = Affinity.read(tmp_path / "affinity")
    for load, ids in zip(
        affinity.load, routing(ModelSpec.from_checkpoint(model)), strict=True
    ):
        assert load.tolist() == np.bincount(ids.ravel(), minlength=len(load)).tolist()
