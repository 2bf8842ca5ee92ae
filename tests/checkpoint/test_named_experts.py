"""Files that name experts: renumbered, left as they are, or refused.

What is right is said by hand: the oracle knows the plan's rows and nothing of placer.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from placer.checkpoint.export import export_checkpoint, prepare_export, prepare_restore
from placer.checkpoint.verify import verify
from placer.errors import PlacerError, VerificationError
from tests.checkpoint.test_quantised_layouts import (
    NUM_EXPERTS,
    PROJECTIONS,
    WritePlan,
    permuting_plan,
    qwen3,
    write,
)

PARTS = {"weight": ("F8_E4M3", [8, 16]), "weight_scale": ("F32", [8, 1])}


def model_with(tmp_path: Path, files: dict[str, Any], **config: Any) -> Path:
    model = write(qwen3(PARTS)(), tmp_path / "model", config)
    for name, content in files.items():
        (model / name).write_text(json.dumps(content, indent=2))
    return model


@pytest.mark.parametrize(
    ("file", "content"),
    [
        # AutoRound, EXL3, vllm-ascend's ModelSlim, and a file that no one has heard of
        (
            "quantization_config.json",
            {"extra_config": {"model.layers.1.mlp.experts.5.down_proj": {"bits": 8}}},
        ),
        (
            "quantization_config.json",
            {"tensor_storage": {"model.layers.1.mlp.experts.5.down_proj": {"bits": 4}}},
        ),
        (
            "quant_model_description.json",
            {"model.layers.1.mlp.experts.5.down_proj.weight": "W8A8_DYNAMIC"},
        ),
        (
            "hf_quant_config.json",
            {"exclude_modules": ["language_model.model.layers.1.mlp.experts.5.up_proj"]},
        ),
        ("anything.json", [["-:model.layers.1.mlp.experts.5.down_proj.*", "lm_head"]]),
    ],
)
def test_every_description_file_is_renumbered(
    file: str, content: Any, write_plan: WritePlan, tmp_path: Path
) -> None:
    model = model_with(tmp_path, {file: content})
    rows, plan = permuting_plan(model, write_plan)
    out = tmp_path / "out"
    export_checkpoint(plan, model, out)
    new = f"experts.{rows[1].index(5)}."
    expected = (model / file).read_text().replace("experts.5.", new)
    assert (out / file).read_text() == expected
    verify(model, out, plan, [], 0)
    prepare_restore(out).write(tmp_path / "back")
    assert (tmp_path / "back" / file).read_bytes() == (model / file).read_bytes()
    (out / file).write_bytes((model / file).read_bytes())
    with pytest.raises(VerificationError, match=file):
        verify(model, out, plan, [], 0)


@pytest.mark.parametrize("levels", [80, 900, 100_000])
def test_what_nests_too_deep_to_be_read_is_refused(
    write_plan: WritePlan, tmp_path: Path, levels: int
) -> None:
    model = model_with(tmp_path, {"deep.json": []})
    (model / "deep.json").write_text("[" * levels + "]" * levels)
    with pytest.raises(PlacerError, match=r"deep\.json.*nests deeper than 64 levels"):
        export_checkpoint(permuting_plan(model, write_plan)[1], model, tmp_path / "out")


# Layer 0 keeps no set but whole groups; layer 1's row is
# [1, 0, 2, 3, 8, 11, 9, 10, 5, 4, 6, 7]: it keeps {0, 1}, {2}, {3} and {4..11}.
@pytest.mark.parametrize(
    "pattern",
    [
        r"re:.*layers\.1\.mlp\.experts\.(?:4|7)\..*",
        r"re:.*mlp\.experts\.[^0-3]\..*",
        r"re:.*mlp\.experts\.(?!3\.)\d+\.down_proj",
        "*.experts.?.down_proj",
        r"re:.*\.3\.down_proj$",
        r"re:.*experts[.]3[.]down_proj",
        r"-:.*\.5\.(up|gate)_proj",
        "model.layers.1.mlp.experts[4].up_proj",
        "model.layers.1.mlp.experts_4.up_proj",
        "5.down_proj",
        r"re:.*experts\.[0-3]\.w1",
        r"re:.*experts\.3\.unheard_of",
        "mtp.layers.1.mlp.experts.3.up_proj",
        r"re:^language_model\.model\.layers\.1\.mlp\.experts\.[4-7]\.",
    ],
)
@pytest.mark.parametrize("key", ["ignore", "targets", "dynamic"])
def test_a_pattern_that_would_pick_other_experts_is_refused(
    pattern: str, key: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    lists = {key: {pattern: {}} if key == "dynamic" else [pattern]}
    model = model_with(tmp_path, {}, quantization_config=lists)
    with pytest.raises(PlacerError, match="names single experts") as caught:
        prepare_export(permuting_plan(model, write_plan)[1], model)
    assert "plain names" in caught.value.hint
    assert "placer export" not in caught.value.hint


@pytest.mark.parametrize(
    "pattern",
    [
        # poolside/Laguna-S NVFP4, and others that mean all experts, or none
        r"re:.*experts\.[0-9]+\.(gate_proj|up_proj|down_proj)$",
        r"re:.*\.mlp\.experts\..*",
        "*mlp.experts.*.down_proj",
        r"-:.*experts\.\d+\..*",
        r"re:.*layers\.1\.mlp\.experts\.(0|1)\..*",
        r"re:.*layers\.1\.mlp\.experts\.([4-9]|1[01])\..*",
        "model.layers.1.*",
        "re:.*mlp.gate$",
        # of other families
        r"re:.*block_sparse_moe[.]experts[.][0-9]+[.]w[123]",
        r"re:.*experts\.\d+\.linear_fc1",
    ],
)
def test_a_pattern_that_picks_the_same_experts_stays(
    pattern: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    lists = {"config_groups": {"group_0": {"targets": [pattern]}}}
    model = model_with(tmp_path, {}, quantization_config=lists)
    plan = permuting_plan(model, write_plan)[1]
    export_checkpoint(plan, model, tmp_path / "out")
    same = (model / "config.json").read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == same


@pytest.mark.parametrize(
    ("numbers", "where"),
    [
        ({"mone": {"experts_by_layer": {"1": [3, 7]}}}, "mone.experts_by_layer"),
        ({"approximate_experts": [[0, 2], [5]]}, None),
        (
            {"quantization_config": {"expert_bits": {"4": 8}}},
            "quantization_config.expert_bits",
        ),
        ({"pruned_experts": [1, 9]}, "pruned_experts"),
        ({"hot_experts": "3, 7"}, "hot_experts"),
    ],
)
def test_numbers_of_experts_that_are_no_part_of_a_name_are_refused(
    numbers: dict[str, Any], where: str | None, write_plan: WritePlan, tmp_path: Path
) -> None:
    model = model_with(tmp_path, {}, **numbers)
    plan = permuting_plan(model, write_plan)[1]
    with pytest.raises(
        PlacerError, match=f"names experts by number in {where or 'approx'}"
    ):
        prepare_export(plan, model)


@pytest.mark.parametrize(
    "counts",
    [
        {"num_experts": [NUM_EXPERTS] * 2},
        {"moe_num_experts_per_layer": [1, 2]},
        {"expert_widths": [768, 1024]},
        {"expert_layer_period": 1},
        {"expert_layers": [0, 1]},
    ],
)
def test_counts_and_sizes_are_no_numbers_of_experts(
    counts: dict[str, Any], write_plan: WritePlan, tmp_path: Path
) -> None:
    model = model_with(tmp_path, {}, **counts)
    prepare_export(permuting_plan(model, write_plan)[1], model)


def test_names_in_the_metadata_of_a_shard_move_too(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    """torchao writes every name as a key, and all of them as JSON in a text."""
    model = write(qwen3(PARTS)(), tmp_path / "model")
    path = model / "model.safetensors"
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    kind = json.dumps({"_type": "Float8Tensor"})
    metadata = {"format": "pt", "tensor_names": json.dumps(list(header))}
    metadata |= dict.fromkeys(header, kind)
    text = json.dumps({"__metadata__": metadata} | header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])
    rows, plan = permuting_plan(model, write_plan)
    export_checkpoint(plan, model, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        found = opened.metadata()
    new = {}
    for name in header:
        parts = name.split(".")
        if "experts" in parts:
            parts[5] = str(rows[int(parts[2])].index(int(parts[5])))
        new[name] = ".".join(parts)
    assert json.loads(found.pop("tensor_names")) == list(new.values())
    assert found == {"format": "pt"} | {new[name]: kind for name in header}
    prepare_restore(tmp_path / "out").write(tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == path.read_bytes()


def test_patterns_are_tried_on_every_projection(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    for projection in PROJECTIONS:
        lists = {"ignore": [rf"re:.*\.4\.{projection}"]}
        folder = tmp_path / projection
        folder.mkdir()
        model = model_with(folder, {}, quantization_config=lists)
        with pytest.raises(PlacerError, match="names single experts"):
            prepare_export(permuting_plan(model, write_plan)[1], model)


RECIPE = "stage:\n  ignore: ['re:.*layers.1.mlp.experts.{}.down_proj', lm_head]\n"


def test_notes_that_name_experts_are_copied_and_told(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    """llm-compressor's recipe and GPTQModel's log, which engines do not read."""
    model = model_with(tmp_path, {})
    (model / "recipe.yaml").write_text(RECIPE.format("4"))
    (model / "all.yaml").write_text(RECIPE.format(r"\d+"))
    (model / "quant_log.csv").write_text("layer,module\n1,mlp.experts.4.down_proj\n")
    (model / "README.md").write_text("mlp.experts.4.down_proj stays in BF16\n")
    job = prepare_export(permuting_plan(model, write_plan)[1], model)
    assert job.stale == (Path("quant_log.csv"), Path("recipe.yaml"))
    job.write(tmp_path / "out")
    assert (tmp_path / "out" / "recipe.yaml").read_text() == RECIPE.format("4")


@pytest.mark.parametrize("what", ["config", "metadata"])
def test_verify_finds_an_original_that_changed_since(
    what: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    model = model_with(tmp_path, {}, quantization_config={"ignore": ["lm_head"]})
    plan = permuting_plan(model, write_plan)[1]
    export_checkpoint(plan, model, tmp_path / "out")
    if what == "config":
        config = (model / "config.json").read_text()
        (model / "config.json").write_text(config.replace("lm_head", "*experts*"))
    else:
        raw = (model / "model.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = b'{"__metadata__":{"ignore":"lm_head"},' + raw[9 : 8 + length]
        new = len(header).to_bytes(8, "little") + header + raw[8 + length :]
        (model / "model.safetensors").write_bytes(new)
    with pytest.raises(VerificationError, match="is not that of"):
        verify(model, tmp_path / "out", plan, [], 0)
