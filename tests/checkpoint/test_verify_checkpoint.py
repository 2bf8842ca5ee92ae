"""``verify`` passes what is the same function, and names the first thing that is not."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from placer.checkpoint.export import export_checkpoint
from placer.checkpoint.verify import _Comparison, _Output, _tied, verify
from placer.cli.main import main
from placer.errors import PlacerError, VerificationError
from placer.model import ModelSpec
from placer.placement import Placement
from placer.run.files import sha256_file

MakePlan = Callable[..., Path]
TEXTS = ["def add(one, two):\n    return one + two\n" * 8]
ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.fixture(params=["tiny_model", "tiny_sharded_model"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_verify_passes_an_export_and_counts_what_it_compared(
    model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(model)
    export_checkpoint(plan, model, tmp_path / "out")
    report = verify(model, tmp_path / "out", plan, TEXTS, 64)
    assert report.num_tensors == sum(len(load_file(p)) for p in model.glob("*.safetensors"))
    assert report.num_tokens == 64
    assert report.max_logit_difference <= report.tolerance
    assert report.num_routed_pairs == 64 * 2 * 2
    assert report.num_ties == 0


def corrupt(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_verify_finds_one_flipped_bit(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(tiny_model)
    export_checkpoint(plan, tiny_model, tmp_path / "out")
    name = "model.layers.3.mlp.experts.5.up_proj.weight"

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(torch.uint8).view(-1)[7] ^= 1

    corrupt(tmp_path / "out", flip)
    with pytest.raises(VerificationError, match=name) as caught:
        verify(tiny_model, tmp_path / "out", plan, TEXTS, 64)
    assert caught.value.exit_code == 5


def test_verify_finds_swapped_router_rows(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(tiny_model)
    export_checkpoint(plan, tiny_model, tmp_path / "out")
    name = "model.layers.1.mlp.gate.weight"

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][[1, 0, 2, 3, 4, 5, 6, 7]].contiguous()

    corrupt(tmp_path / "out", swap)
    with pytest.raises(VerificationError, match=name):
        verify(tiny_model, tmp_path / "out", plan, TEXTS, 64)


def test_running_the_models_finds_what_tensors_alone_would_not(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tensor check out of the way, routing is what differs first."""
    plan = make_plan(tiny_model)
    export_checkpoint(plan, tiny_model, tmp_path / "out")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.gate.weight"
        tensors[name] = tensors[name].flip(0).contiguous()

    corrupt(tmp_path / "out", swap)
    monkeypatch.setattr("placer.checkpoint.verify._compare_tensors", lambda *_: (0, 0))
    monkeypatch.setattr("placer.checkpoint.verify._require_same_files", lambda *_: None)
    with pytest.raises(VerificationError, match="MoE layer 0: token 0"):
        verify(tiny_model, tmp_path / "out", plan, TEXTS, 64)


def test_verify_refuses_the_export_of_another_plan(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    export_checkpoint(make_plan(tiny_model, seed=1), tiny_model, tmp_path / "out")
    with pytest.raises(VerificationError, match="from another plan"):
        verify(tiny_model, tmp_path / "out", make_plan(tiny_model, seed=2), TEXTS, 0)


def exported(tiny_model: Path, plan: Path, out: Path) -> Path:
    export_checkpoint(plan, tiny_model, out)
    return out


def changed(model: Path, copy: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a model with other tensors."""
    shutil.copytree(model, copy)
    corrupt(copy, change)
    return copy


def test_nan_equals_itself(tiny_model: Path, make_plan: MakePlan, tmp_path: Path) -> None:
    """In the row of a token id that the text does not hold."""

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][319] = float("nan")

    model = changed(tiny_model, tmp_path / "model", poison)
    plan = make_plan(model)
    report = verify(model, exported(model, plan, tmp_path / "out"), plan, TEXTS, 64)
    assert report.num_tokens == 64


def poison_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][5] = float("nan")


def scale_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] *= 1.001


@pytest.mark.parametrize("change", [poison_head, scale_head])
def test_other_logits_fail_nan_too(
    tiny_model: Path,
    make_plan: MakePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict], None],
) -> None:
    """With the tensor check out of the way."""
    plan = make_plan(tiny_model)
    out = exported(tiny_model, plan, tmp_path / "out")
    corrupt(out, change)
    monkeypatch.setattr("placer.checkpoint.verify._compare_tensors", lambda *_: (0, 0))
    monkeypatch.setattr("placer.checkpoint.verify._require_same_files", lambda *_: None)
    with pytest.raises(VerificationError, match="logits of token 0"):
        verify(tiny_model, out, plan, TEXTS, 64)


def test_broken_ties_are_counted_and_not_compared(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    """Two experts with one router row tie for every token; the lower id is taken."""

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        tensors[ROUTER][1] = tensors[ROUTER][6]

    model = changed(tiny_model, tmp_path / "model", tie)
    # MoE layer 0 reversed: expert 6, behind 1 so far, now comes before it.
    plan = make_plan(model)
    value = json.loads(plan.read_text())
    value["physical_to_logical_map"][0] = [7, 6, 5, 4, 3, 2, 1, 0]
    plan.write_text(json.dumps(value | {"sha256": None}))
    texts = [chr(33 + n) * 2 for n in range(80)]
    out = exported(model, plan, tmp_path / "out")
    report = verify(model, out, plan, texts, 400)
    assert 0 < report.num_ties < report.num_tokens
    assert report.num_routed_pairs < report.num_tokens * 2 * 2


def test_nothing_but_ties_proves_nothing(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors[ROUTER].zero_()

    model = changed(tiny_model, tmp_path / "model", zero)
    plan = make_plan(model)
    out = exported(model, plan, tmp_path / "out")
    with pytest.raises(
        PlacerError, match="nothing was compared: at or before each"
    ) as caught:
        verify(model, out, plan, TEXTS, 64)
    assert "--max-tokens 0" in caught.value.hint


def test_only_experts_as_good_as_those_left_out_are_a_tie() -> None:
    cases = [
        ([1.0, 0.6, 0.4, 0.0], [0, 2], True),
        ([1.0, 1.0, 0.0, 0.0], [0, 2], False),
        # Expert 2 is as good as 1, but it is 0 that is left out, sure to be chosen.
        ([1.0, 0.6, 0.4, 0.0], [1, 2], False),
        # Expert 1 may be left out, but not for 3, which is never chosen.
        ([1.0, 0.6, 0.4, 0.0], [0, 3], False),
        ([0.5, 0.5, 0.5, 0.5], [2, 3], True),
        ([1.0, 0.6, float("nan"), 0.0], [0, 2], False),
    ]
    for shares, new, expected in cases:
        found = _tied(
            np.asarray([shares], np.float32), np.asarray([[0, 1]]), np.asarray([new])
        )
        assert found.tolist() == [expected], (shares, new)


def output(chosen: list[list[int]], logits: list[float]) -> _Output:
    """Two layers, three tokens, top 1 of 3; in layer 0 experts 0 and 1 tie at token 1."""
    shares = np.asarray([[1, 0, 0], [0.5, 0.5, 0], [1, 0, 0]], np.float32)
    return _Output(
        logits=np.asarray(logits, np.float32)[:, None],
        chosen=tuple(np.asarray(layer)[:, None] for layer in chosen),
        shares=(shares, np.asarray([[1, 0, 0]] * 3, np.float32)),
    )


@pytest.mark.parametrize(
    ("chosen", "logits", "match"),
    [
        ([[0, 1, 0], [0, 0, 0]], [1, 9, 9], None),
        ([[0, 1, 0], [0, 2, 2]], [1, 9, 9], None),
        ([[0, 1, 0], [2, 0, 0]], [1, 1, 1], "MoE layer 1: token 0"),
        ([[0, 1, 1], [0, 0, 0]], [1, 1, 1], "MoE layer 0: token 2"),
        ([[0, 0, 0], [0, 0, 2]], [1, 1, 1], "MoE layer 1: token 2"),
        ([[0, 1, 0], [0, 0, 0]], [9, 1, 1], "logits of token 0"),
    ],
)
def test_a_tie_excuses_what_it_can_reach_and_nothing_else(
    chosen: list[list[int]], logits: list[float], match: str | None
) -> None:
    """Later tokens in later layers and their logits; not the same layer, not before."""
    row = np.arange(3)
    placement = Placement(
        physical_to_logical_map=(row, row), num_experts=(3, 3), num_ranks=1
    )
    comparison = _Comparison(placement)
    before = output([[0, 0, 0], [0, 0, 0]], [1, 1, 1])
    if match is None:
        comparison.compare([before], [output(chosen, logits)])
        assert (comparison.num_ties, comparison.num_tokens) == (2, 3)
        return
    with pytest.raises(VerificationError, match=match):
        comparison.compare([before], [output(chosen, logits)])


def test_missing_and_added_tensors_are_named(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(tiny_model)
    out = exported(tiny_model, plan, tmp_path / "out")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.odd"] = torch.zeros(1)

    corrupt(out, add)
    with pytest.raises(VerificationError, match=r"holds model\.odd, which"):
        verify(tiny_model, out, plan, TEXTS, 0)

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.odd"], tensors["model.norm.weight"]

    corrupt(out, remove)
    with pytest.raises(VerificationError, match=r"lacks model\.norm\.weight"):
        verify(tiny_model, out, plan, TEXTS, 0)


def test_another_dtype_is_named(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()

    plan = make_plan(tiny_model)
    out = exported(tiny_model, plan, tmp_path / "out")
    corrupt(out, narrow)
    with pytest.raises(VerificationError, match=r"float16 \[32\] against torch.float32"):
        verify(tiny_model, out, plan, TEXTS, 0)


def test_a_truncated_shard_and_a_lying_index_fail(
    tiny_sharded_model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(tiny_sharded_model)
    out = exported(tiny_sharded_model, plan, tmp_path / "out")
    index_path = out / "model.safetensors.index.json"
    text = index_path.read_text()
    index = json.loads(text)
    name = next(iter(index["weight_map"]))
    for shard, match in (
        ("../" + index["weight_map"][name], r"index .* says that .* outside"),
        (max(index["weight_map"].values()), f"{name} is in no file"),
    ):
        index["weight_map"][name] = shard
        index_path.write_text(json.dumps(index))
        with pytest.raises(VerificationError, match=match):
            verify(tiny_sharded_model, out, plan, TEXTS, 0)
    index_path.write_text(text)
    shard = min(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(VerificationError, match=f"{shard.name} cannot be read"):
        verify(tiny_sharded_model, out, plan, TEXTS, 0)


def test_a_plan_with_replicas_cannot_be_verified(
    tiny_model: Path, make_plan: MakePlan, write_plan: MakePlan, tmp_path: Path
) -> None:
    """Even where the export claims to be of that plan."""
    out = exported(tiny_model, make_plan(tiny_model), tmp_path / "out")
    rows = [[0, 1, 2, 3, 4, 4, 5, 6, 7, 0]] * 2
    placement = Placement.from_json(rows, (8, 8), num_ranks=2, num_nodes=1)
    plan = write_plan(ModelSpec.from_checkpoint(tiny_model), placement)
    record = json.loads((out / "placer.json").read_text())
    record["plan_sha256"] = sha256_file(plan)
    (out / "placer.json").write_text(json.dumps(record))
    with pytest.raises(PlacerError, match="replicas"):
        verify(tiny_model, out, plan, TEXTS, 0)


def test_no_text_is_refused(tiny_model: Path, make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan(tiny_model)
    out = exported(tiny_model, plan, tmp_path / "out")
    with pytest.raises(PlacerError, match="no text") as caught:
        verify(tiny_model, out, plan, [""], 64)
    assert "--corpus" in caught.value.hint


def test_without_transformers_tensors_alone_are_compared(
    tiny_model: Path, make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tiny_model)
    out = exported(tiny_model, plan, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = verify(tiny_model, out, plan, TEXTS, 0)
    assert report.num_tensors > 0
    assert report.max_logit_difference is None
    with pytest.raises(PlacerError, match="transformers, which is not") as caught:
        verify(tiny_model, out, plan, TEXTS, 64)
    assert "placer[record]" in caught.value.hint


def test_the_command_exits_with_5_and_names_the_tensor(
    tiny_model: Path,
    make_plan: MakePlan,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = make_plan(tiny_model)
    out = exported(tiny_model, plan, tmp_path / "out")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[ROUTER] = tensors[ROUTER][[1, 0, 2, 3, 4, 5, 6, 7]].contiguous()

    corrupt(out, swap)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tiny_model), str(out), str(plan), "--max-tokens", "0"])
    printed = capsys.readouterr()
    assert ended.value.code == 5
    assert printed.out == ""
    assert ROUTER in printed.err
    assert "hint: " in printed.err
