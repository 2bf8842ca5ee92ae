"""How many experts there are, and in which layers: by the model, by the user, or by ids."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.affinity import Affinity
from placer.cli.main import main
from placer.errors import PlacerError, UsageError
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.placement.all_layers import plan_of
from placer.trace import Trace
from placer.trace.imported import ImportOptions, import_file
from placer.trace.npz import read_npz
from tests.plans import unsolved_plan

# DeepSeek-V4: layers 0 and 1 choose experts by a hash of the token; layer 4 drafts (MTP).
V4 = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 4,
    "num_hash_layers": 2,
    "num_nextn_predict_layers": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 16,
    "vocab_size": 32,
}
V3 = V4 | {"model_type": "deepseek_v3", "first_k_dense_replace": 1, "num_hash_layers": 0}


def model(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def routing(layers: Sequence[int], num_layers: int, num_experts: int = 8) -> np.ndarray:
    """``[200, num_layers, 2]``, zeros in the layers not given."""
    rng = np.random.default_rng(0)
    experts = np.zeros((200, num_layers, 2), dtype=np.int64)
    for layer in layers:
        experts[:, layer] = np.argsort(rng.random((200, num_experts)), axis=1)[:, :2]
    return experts


def imported(
    tmp_path: Path, experts: np.ndarray, **options: Any
) -> tuple[Trace, list[str]]:
    np.savez(tmp_path / "a.npz", experts=experts, sequence_ids=np.arange(200) // 20)
    told: list[str] = []
    given = ImportOptions(warn=told.append, **options)
    import_file(read_npz, "npz", tmp_path / "a.npz", tmp_path / "t", given)
    return Trace(tmp_path / "t"), told


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return int(done.value.code or 0)


@pytest.mark.parametrize("num_layers", [4, 2], ids=["all hidden layers", "the other two"])
def test_hash_layers_are_left_out(tmp_path: Path, num_layers: int) -> None:
    experts = routing((2, 3), 4)
    directory = model(tmp_path / "m", V4)
    trace, told = imported(
        tmp_path, experts[:, 4 - num_layers :], model_directory=directory
    )
    assert trace.model.layer_ids == (2, 3)
    assert trace.model.fingerprint == trace.model.bound_fingerprint()
    assert [ids.tolist() for ids in trace.read().experts] == experts[:, 2:].swapaxes(
        0, 1
    ).tolist()
    assert told == [told[0]] and told[0].startswith("layers 0, 1 choose experts by a hash")


def test_hash_layers_that_were_recorded_stay(tmp_path: Path) -> None:
    directory = model(tmp_path / "m", V4)
    trace, told = imported(tmp_path, routing(range(4), 4), model_directory=directory)
    assert trace.model.layer_ids == (0, 1, 2, 3)
    assert not told


def test_other_layers_are_left_out_on_purpose_only(tmp_path: Path) -> None:
    experts, directory = routing((1, 3), 4), model(tmp_path / "m", V3)
    with pytest.raises(PlacerError, match="layer 2 is all zeros") as caught:
        imported(tmp_path, experts, model_directory=directory)
    assert "--skip-layers 2" in caught.value.hint
    trace, _ = imported(tmp_path, experts, model_directory=directory, skip_layers=(2,))
    assert trace.model.layer_ids == (1, 3)
    for odd, match in (
        ((0,), "layer 0 is not an MoE layer"),
        ((1, 2, 3), "no MoE layer is left"),
    ):
        with pytest.raises(UsageError, match=match):
            ImportOptions(model_directory=directory, skip_layers=odd).bound_model()


def test_ids_in_a_dense_layer_are_no_records_of_this_model(tmp_path: Path) -> None:
    directory = model(tmp_path / "m", V3)
    with pytest.raises(PlacerError, match="layer 0 holds expert ids, but"):
        imported(tmp_path, routing(range(4), 4), model_directory=directory)


@pytest.mark.parametrize("copies", [0, 4])
def test_a_plan_of_some_layers_is_exported_for_all(tmp_path: Path, copies: int) -> None:
    """What was not recorded stays in order: layer 0, by hand, of 4 ranks."""
    directory = model(tmp_path / "m", V4)
    trace, _ = imported(tmp_path, routing((2, 3), 4), model_directory=directory)
    row = [6, 7, 4, 5, 2, 3, 0, 1]
    if copies:  # one more on every rank
        row = [6, 7, 0, 4, 5, 1, 2, 3, 4, 0, 1, 2]
    placed = Placement.from_json([row, row], (8, 8), 4, 1)
    plan = unsolved_plan(trace.model, placed)
    spec = ModelSpec.from_checkpoint(directory)
    whole, warning = plan_of(plan, tmp_path / "plan", spec, directory)
    assert warning == (
        f"{tmp_path / 'plan'} places no expert of layers 0, 1, which were not recorded: "
        "their experts stay in order"
    )
    in_order = [n % 8 for n in range(8 + copies)]
    assert whole.placement.to_json() == [in_order, in_order, row, row]
    plan.write(tmp_path / "plan")
    out = tmp_path / "map.json"
    assert run("export", "sglang", tmp_path / "plan", directory, "--out", out) == 0
    assert run("verify", directory, out, tmp_path / "plan") == 0
    rows = json.loads(out.read_text())["physical_to_logical_map"]
    assert rows == whole.placement.to_json()
    other = model(tmp_path / "other", V4 | {"hidden_size": 32})
    assert run("export", "sglang", tmp_path / "plan", other, "--out", tmp_path / "x.json")


def test_loads_of_hash_layers_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SGLang's stat dump of DeepSeek-V4-Flash has them: 40 of 43 layers."""
    directory = model(tmp_path / "m", V4)
    counts = [[0] * 8, [0] * 8, [*range(1, 9)], [*range(8, 0, -1)]]
    (tmp_path / "l.json").write_text(json.dumps(counts))
    words = ("import", "load-matrix", tmp_path / "l.json", "--model")
    assert run(*words, directory, "--out", tmp_path / "a") == 0
    assert "layers 0, 1 choose experts by a hash" in capsys.readouterr().err
    affinity = Affinity.read(tmp_path / "a")
    assert affinity.model.layer_ids == (2, 3)
    assert [row.tolist() for row in affinity.load] == counts[2:]
    v3 = model(tmp_path / "v3", V3)
    assert run(*words, v3, "--out", tmp_path / "b") == 1
    assert "--skip-layers 1" in capsys.readouterr().err
    assert run(*words, v3, "--skip-layers", "1", "--out", tmp_path / "b") == 0
    assert Affinity.read(tmp_path / "b").model.layer_ids == (2, 3)


@pytest.mark.parametrize("largest", [32_768, 65_535, 70_000, 2**40])
def test_ids_beyond_16_bits_are_refused(tmp_path: Path, largest: int) -> None:
    experts = routing((0, 1), 2)
    experts[7, 1, 0] = largest
    with pytest.raises(
        PlacerError, match=f"has {largest + 1} experts; placer supports at most"
    ):
        imported(tmp_path, experts)
    assert not (tmp_path / "t").exists()


def test_ids_are_checked_by_layer(tmp_path: Path) -> None:
    """Of 64 experts the ids are bytes: 259 would become 3."""
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 2,
        "n_routed_experts": [64, 300],
        "num_experts_per_tok": 2,
        "hidden_size": 16,
        "vocab_size": 32,
    }
    directory = model(tmp_path / "m", config)
    experts = routing((0, 1), 2, 64)
    experts[7, 1, 0] = 259
    trace, _ = imported(tmp_path, experts, model_directory=directory)
    assert trace.read().experts[1][7, 0] == 259
    experts[7, 0, 0] = 259
    with pytest.raises(PlacerError, match="layer 0 holds ids up to 259, the model has 64"):
        imported(directory, experts, model_directory=directory)


def test_the_number_of_experts_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = routing((0, 1), 2)
    trace, _ = imported(tmp_path, experts, num_experts=16)
    assert trace.model.num_experts == (16, 16)
    with pytest.raises(PlacerError, match="layer 0 holds ids up to 7, the model has 6"):
        np.savez(tmp_path / "b.npz", experts=experts, sequence_ids=np.zeros(200, int))
        options = ImportOptions(num_experts=6)
        import_file(read_npz, "npz", tmp_path / "b.npz", tmp_path / "u", options)
    with pytest.raises(UsageError, match="both give the number of experts"):
        ImportOptions(num_experts=6, model_directory=tmp_path)
    (tmp_path / "l.csv").write_text("layer,expert,count\n0,0,5\n0,3,5\n1,1,7\n")
    words = ("import", "csv-loads", tmp_path / "l.csv", "--out")
    assert run(*words, tmp_path / "c", "--num-experts", 8) == 0
    assert Affinity.read(tmp_path / "c").model.num_experts == (8, 8)
    assert run(*words, tmp_path / "d") == 0
    assert "to have 4 experts, the largest id + 1" in capsys.readouterr().err
    solved = ("solve", tmp_path / "c", "--gpus-per-node", 2, "--out", tmp_path / "plan")
    assert run(*solved) == 0
    assert Plan.read(tmp_path / "plan").placement.num_ranks == 2


def test_a_config_alone_is_a_model(tmp_path: Path) -> None:
    directory = model(tmp_path / "m", V3)
    spec = ModelSpec.from_checkpoint(directory)
    assert ModelSpec.from_checkpoint(directory / "config.json") == spec
    (directory / "config.json").rename(tmp_path / "deepseek.json")
    trace, _ = imported(
        tmp_path, routing((1, 2, 3), 4), model_directory=tmp_path / "deepseek.json"
    )
    assert trace.model.fingerprint == spec.fingerprint
