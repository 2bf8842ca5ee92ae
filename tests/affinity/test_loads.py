"""Loads as SGLang and TensorRT-LLM write them become counts; what cannot be is told."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from placer.affinity import Affinity
from placer.affinity.load_files import read_csv_loads
from placer.affinity.loads import (
    LoadReader,
    import_loads,
    read_sglang_stat,
    trtllm_statistic_reader,
)
from placer.errors import PlacerError
from placer.trace.imported import ImportOptions

# Layer 0 is dense; layers 1 and 2 have four experts, two per token.
CONFIG = {
    "model_type": "deepseek_v2",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 8,
    "vocab_size": 16,
}
COUNTS = [[1, 2, 3, 4], [4, 4, 1, 1]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


def loads(read: LoadReader, path: Path, model: Path) -> list[list[int]]:
    out = model.parent / "affinity.safetensors"
    import_loads(read, "x", path, out, ImportOptions(model_directory=model))
    affinity = Affinity.read(out)
    assert not affinity.has_links
    assert affinity.num_tokens == 5
    return [row.tolist() for row in affinity.load]


def stat(path: Path, layers: list[list[int]]) -> Path:
    """A dump of mode stat: two passes, whose counts add up to ``layers``."""
    whole = torch.tensor(layers, dtype=torch.int32)
    counts = torch.stack([whole // 2, whole - whole // 2])
    torch.save({"rank": 0, "logical_count": counts}, path)
    return path


def test_sglang_counts_all_hidden_layers_or_moe_layers(tmp_path: Path, model: Path) -> None:
    path = stat(tmp_path / "s.pt", [[0, 0, 0, 0], *COUNTS])
    assert loads(read_sglang_stat, path, model) == COUNTS
    (tmp_path / "affinity.safetensors").unlink()
    path = stat(tmp_path / "m.pt", COUNTS)
    assert loads(read_sglang_stat, path, model) == COUNTS


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([[1, 0, 0, 0], *COUNTS], "layer 0 has counts, but the model's MoE layers are"),
        ([[0, 0, 0, 0], [0, 0, 0, 0], COUNTS[0]], "layer 1 has no counts"),
        ([], "expected \\[L, E\\] or \\[passes"),
        ([[0] * 5, [1, 2, 3, 4, 5], [1] * 5], "counts experts up to 4, the model has 4"),
    ],
)
def test_counts_that_the_model_cannot_have_are_refused(
    tmp_path: Path, model: Path, layers: list[list[int]], match: str
) -> None:
    path = stat(tmp_path / "s.pt", layers)
    with pytest.raises(PlacerError, match=match) as caught:
        loads(read_sglang_stat, path, model)
    assert caught.value.hint
    assert not (tmp_path / "affinity.safetensors").exists()


def test_a_dump_of_tokens_or_with_code_is_refused(tmp_path: Path, model: Path) -> None:
    torch.save({"records": []}, tmp_path / "t.pt")
    with pytest.raises(PlacerError, match="no logical_count"):
        loads(read_sglang_stat, tmp_path / "t.pt", model)
    torch.save({"logical_count": Path("x")}, tmp_path / "c.pt")
    with pytest.raises(PlacerError, match="placer runs no code"):
        loads(read_sglang_stat, tmp_path / "c.pt", model)


def statistic(path: Path, ranks: list[dict[str, list[int]]], width: int) -> Path:
    path.mkdir()
    meta = {"num_experts": width, "num_experts_per_token": 2}
    (path / "meta_info.json").write_text(json.dumps(meta))
    for rank, counts in enumerate(ranks):
        tensors = {name: torch.tensor(row) for name, row in counts.items()}
        save_file(tensors, path / f"rank{rank}.safetensors")
    return path


def test_tensorrt_llm_counts_add_up_over_ranks_and_iterations(
    tmp_path: Path, model: Path
) -> None:
    ranks = [
        {"100_1": [1, 0, 3, 0], "100_2": [0, 4, 0, 0], "101_1": [0, 2, 0, 0]},
        {"100_1": [0, 0, 0, 4], "100_2": [4, 0, 1, 1], "100_3": [9, 9, 9, 9]},
    ]
    path = statistic(tmp_path / "s", ranks, 4)
    assert loads(trtllm_statistic_reader(None), path, model) == COUNTS


def test_slots_of_a_load_balancer_become_experts(tmp_path: Path, model: Path) -> None:
    ranks = [{"7_1": [4, 1, 1, 1, 2, 1], "7_2": [4, 1, 4, 1, 0, 0]}]
    path = statistic(tmp_path / "s", ranks, 6)
    with pytest.raises(PlacerError, match="layer 1 counts experts up to 5") as caught:
        loads(trtllm_statistic_reader(None), path, model)
    assert "--map" in caught.value.hint
    slots = {1: [3, 0, 2, 1, 2, 1], 2: [0, 3, 1, 2, 3, 2]}
    assert loads(trtllm_statistic_reader(slots), path, model) == COUNTS


def test_counts_of_slots_are_exact_beyond_floats(tmp_path: Path, model: Path) -> None:
    """2^53 + 1 is no float64: a sum in floats would give 2^53."""
    ranks = [{"7_1": [2**53, 1, 0, 0], "7_2": [1, 1, 1, 1]}]
    path = statistic(tmp_path / "s", ranks, 4)
    read = trtllm_statistic_reader({1: [0, 0, 1, 2], 2: [0, 1, 2, 3]})
    affinity = import_loads(
        read, "x", path, tmp_path / "a.safetensors", ImportOptions(model_directory=model)
    )
    assert affinity.load[0].tolist() == [2**53 + 1, 0, 0, 0]


def test_a_map_of_experts_that_the_model_lacks_is_refused(
    tmp_path: Path, model: Path
) -> None:
    path = statistic(tmp_path / "s", [{"7_1": COUNTS[0], "7_2": COUNTS[1]}], 4)
    slots = {1: [0, 1, 2, 10**15], 2: [0, 1, 2, 3]}
    with pytest.raises(PlacerError, match="layer 1 counts experts up to 1000000000000000"):
        loads(trtllm_statistic_reader(slots), path, model)


def test_a_map_of_another_run_is_refused(tmp_path: Path, model: Path) -> None:
    path = statistic(tmp_path / "s", [{"7_1": COUNTS[0], "7_2": COUNTS[1]}], 4)
    with pytest.raises(PlacerError, match="layer 2 has counts of 4 slots, the map has"):
        loads(trtllm_statistic_reader({1: [0, 1, 2, 3], 2: [0, 1]}), path, model)


def test_meta_info_that_lies_is_found(tmp_path: Path, model: Path) -> None:
    path = statistic(tmp_path / "s", [{"7_1": COUNTS[0], "7_2": COUNTS[1]}], 8)
    with pytest.raises(PlacerError, match=r"7_1 \[4\], expected ITERATION_LAYER \[8\]"):
        loads(trtllm_statistic_reader(None), path, model)


def test_csv_rows_stand_in_any_order(tmp_path: Path, model: Path) -> None:
    rows = [(n, e, c) for n, row in enumerate(COUNTS) for e, c in enumerate(row)]
    rng = np.random.default_rng(0)
    text = "\n".join(",".join(map(str, rows[n])) for n in rng.permutation(len(rows)))
    (tmp_path / "l.csv").write_text(f"layer,expert,count\n{text}\n")
    assert loads(read_csv_loads, tmp_path / "l.csv", model) == COUNTS


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("layer,expert,n\n0,1,2\n", "no column count"),
        ("layer,expert\n0,1\n", "layer 0 has counts, but the model's MoE layers are"),
        ("layer,expert,count\n0,1,0.5\n", "column count holds a value"),
        (
            "layer,expert,count\n0,-1,3\n",
            "row 1 after the header holds -1 in column expert",
        ),
        ("layer,expert,count\n", "column layer holds a value|no counts"),
        ("layer,expert,count\n0,9,0,3\n", "more values than the header"),
        ("layer,expert,count\n0,999999999999999,1\n", "up to 999999999999999, the model"),
        ("layer,expert,count\n0,0,18446744073709551615\n", "above int64"),
        (f"layer,expert,count\n0,0,{2**62}\n0,1,{2**62}\n", "their sum is above it"),
        ("layer,expert,count\n0,1,2\n1,1,2\n0,1,2\n", "layer 0, expert 1 has 2 rows"),
    ],
)
def test_csv_that_is_wrong_is_told(
    tmp_path: Path, model: Path, text: str, match: str
) -> None:
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(PlacerError, match=match):
        loads(read_csv_loads, tmp_path / "l.csv", model)


def test_no_hint_names_an_option_of_another_format(tmp_path: Path, model: Path) -> None:
    """--map is of trtllm-statistic alone: import refuses it for the others."""
    (tmp_path / "l.csv").write_text("layer,expert,count\n0,9,1\n")
    path = stat(tmp_path / "s.pt", [[1, 2, 3, 4, 5]] * 2)
    for reader, file in ((read_csv_loads, tmp_path / "l.csv"), (read_sglang_stat, path)):
        with pytest.raises(PlacerError, match="counts experts up to") as caught:
            loads(reader, file, model)
        assert "--map" not in caught.value.hint


def test_loads_and_links_do_not_add_up(tmp_path: Path, model: Path) -> None:
    path = stat(tmp_path / "s.pt", COUNTS)
    alone = import_loads(
        read_sglang_stat, "x", path, tmp_path / "a", ImportOptions(model_directory=model)
    )
    linked = Affinity(
        model=alone.model,
        num_tokens=5,
        load=alone.load,
        transition=(np.zeros((4, 4), dtype=np.int64),),
        coactivation=(np.zeros((4, 4), dtype=np.int64),) * 2,
    )
    assert alone.add(alone).load[0].tolist() == [2, 4, 6, 8]
    with pytest.raises(PlacerError, match="the other only loads"):
        alone.add(linked)
