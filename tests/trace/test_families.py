"""Every family: what is captured is what its experts were called with, layer by layer."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from placer.errors import PlacerError
from placer.model import Architecture, ModelSpec, known_architectures
from placer.run.documents import read_json
from placer.trace.capture import RouterCapture
from placer.trace.record import RecordOptions, record
from tests.families import (
    FAMILIES,
    RELEASED,
    SMALL,
    VISION,
    build,
    build_vision,
    is_tested_transformers,
    oracle,
    randomise,
)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_captured_ids_are_those_that_the_experts_were_called_with(
    model_type: str, tmp_path: Path
) -> None:
    model = build(model_type)
    model.config.save_pretrained(tmp_path)
    architecture = Architecture.of(read_json(tmp_path / "config.json", "config"), tmp_path)
    spec = ModelSpec.from_checkpoint(tmp_path)
    assert list(spec.layer_ids) == FAMILIES[model_type][1]
    assert set(spec.num_experts) == {8}
    assert spec.top_k == (1 if model_type == "llama4_text" else 2)
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    with RouterCapture(model, architecture, spec) as capture, torch.inference_mode():
        model(input_ids=ids)
        captured = capture.take()
    called = oracle(model, ids)
    assert sorted(called) == sorted(
        architecture.experts_module.format(layer=layer) for layer in spec.layer_ids
    ), "every experts module is captured, and none besides"
    assert len(captured) == spec.num_layers
    for layer, output in zip(spec.layer_ids, captured, strict=True):
        expected = called[architecture.experts_module.format(layer=layer)]
        assert [set(row.tolist()) for row in output.ids] == expected
        assert all(len(row) == spec.top_k for row in expected)
        assert (output.weights[:, 1:] <= output.weights[:, :-1]).all()


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_an_expert_is_in_a_tie_with_one_of_the_same_weights(
    model_type: str, tmp_path: Path
) -> None:
    """With rows and biases of the routers repeated, 0 ties with 1, 2 with 3, and so on."""
    model = randomise(build(model_type))
    model.config.save_pretrained(tmp_path)
    architecture = Architecture.of(read_json(tmp_path / "config.json", "config"), tmp_path)
    spec = ModelSpec.from_checkpoint(tmp_path)
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    with RouterCapture(model, architecture, spec, with_ties=True) as capture:
        with torch.inference_mode():
            model(input_ids=ids)
        for output in capture.take():
            assert output.shares is not None
            assert torch.equal(output.shares.sum(1), torch.full((14,), float(spec.top_k)))
            sure = output.shares.gather(1, output.ids).mean()
            assert sure > 0.98, "few are in a tie where weights are drawn"
        for layer in spec.layer_ids:
            path = architecture.router_module.format(layer=layer)
            block = model.get_submodule(path.rpartition(".")[0])
            for tensor in [*block.parameters(), *block.buffers()]:
                if tensor.shape in {(8, 32), (8,), (1, 8)}:
                    rows = tensor.data.view(8, -1)
                    rows[1::2] = rows[::2].clone()
        with torch.inference_mode():
            model(input_ids=ids)
        for output in capture.take():
            if (
                model_type == "deepseek_v4"
                and (output.shares.gather(1, output.ids) == 1).all()
            ):
                continue  # a table leaves nothing to the weights
            twins = output.shares.reshape(14, 4, 2)
            assert ((twins > 0).sum(2) != 1).float().mean() > 0.9
            assert ((twins[..., 0] - twins[..., 1]).abs() < 0.9).all()


RECORDED = {
    t: a
    for a in known_architectures()
    if a.unsupported is None and a.unrecorded is None
    for t in a.model_types
}


@pytest.mark.parametrize("model_type", sorted(VISION.keys() & RECORDED.keys()))
def test_a_vision_language_checkpoint_is_recorded_as_the_whole_model_routes(
    model_type: str, tmp_path: Path
) -> None:
    moe_layers = FAMILIES[VISION[model_type][0]][1]
    whole = build_vision(model_type)
    whole.save_pretrained(tmp_path)
    raw = read_json(tmp_path / "config.json", "config")
    assert raw["model_type"] == model_type
    spec = ModelSpec.from_checkpoint(tmp_path)
    assert list(spec.layer_ids) == moe_layers
    assert set(spec.num_experts) == {8}
    assert (spec.hidden_size, spec.vocab_size) == (32, 64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    architecture = Architecture.of(raw, tmp_path)
    with RouterCapture(model, architecture, spec) as capture, torch.inference_mode():
        model.base_model(input_ids=ids)
        captured = capture.take()
    called = oracle(whole, ids)
    assert len(called) == spec.num_layers
    for layer, output in zip(spec.layer_ids, captured, strict=True):
        (expected,) = (rows for name, rows in called.items() if f".{layer}." in name)
        assert [set(row.tolist()) for row in output.ids] == expected


@pytest.mark.skipif(
    not is_tested_transformers(),
    reason="other versions of transformers know other families",
)
def test_every_model_type_is_one_that_transformers_has() -> None:
    named = {t for a in known_architectures() for t in a.model_types}
    others = {  # refused by name
        *("PanguProMoE", "ernie4_5_moe_vl", "inkling_model", "interns1_pro"),
        *("interns1_pro_text", "interns2_mobius", "longcat_flash_ngram"),
    }
    assert named - set(CONFIG_MAPPING.keys()) - others == RELEASED - {
        *("aria", "git", "glm4v_moe_text", "glm5_next", "glm5_next_text", "mistral4"),
        *("deepseek_ocr2_text", "inkling2", "inkling2_text", "mistral_large4"),
        *("mistral_large4_text", "muse_spark", "muse_spark_text", "unlimited_ocr_text"),
        *("qwen3_vl_moe_text", "qwen4_exp", "qwen4_exp_text", "step3p5", "step3p7"),
    }


def test_families_refused_as_not_loadable_are_not_loadable() -> None:
    loadable = {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    refused = {
        t
        for a in known_architectures()
        if "AutoModelForCausalLM" in (a.unsupported or a.unrecorded or "")
        for t in a.model_types
    }
    assert refused
    assert not refused & loadable


def test_every_family_that_is_not_refused_is_tested() -> None:
    supported = {
        t for a in known_architectures() if a.unsupported is None for t in a.model_types
    }
    assert supported == set(FAMILIES) | set(VISION) | RELEASED


@pytest.mark.parametrize("model_type", ["kimi_k2", "qwen3_vl_moe"])
def test_a_family_that_placer_cannot_run_is_not_recorded(
    model_type: str, tmp_path: Path
) -> None:
    config = CONFIG_MAPPING["deepseek_v3"](**SMALL, first_k_dense_replace=0).to_dict()
    config["model_type"] = model_type
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlacerError, match=f"{model_type} cannot be run") as caught:
        record(tmp_path, [], tmp_path / "out", RecordOptions())
    assert "placer import" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "written", "moe_layers"),
    [
        ("nemotron_h", {"hybrid_override_pattern": "MEM*E"}, [1, 4]),
        ("mimo_v2_flash", {"moe_layer_freq": [0, 1, 1, 0]}, [1, 2]),
        ("glm4_moe_lite", {"first_k_dense_replace": 1}, [1, 2, 3]),
        ("hunyuan_v1_moe", {"moe_topk": [2, 2, 2, 2]}, [0, 1, 2, 3]),
        ("hunyuan", {"num_experts_per_tok": 2}, [0, 1, 2, 3]),
        ("kimi_linear", {"first_k_dense_replace": 1, "moe_layer_freq": 1}, [1, 2, 3]),
    ],
)
def test_released_configs_say_it_otherwise_than_transformers_writes_it(
    model_type: str, written: dict[str, object], moe_layers: list[int], tmp_path: Path
) -> None:
    config = SMALL | {"model_type": model_type, "num_experts": 8} | written
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = ModelSpec.from_checkpoint(tmp_path)
    assert list(spec.layer_ids) == moe_layers
    assert spec.top_k == 2


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("longcat_flash", "zero experts"),
        ("switch_transformers", "encoder-decoder"),
        ("nllb-moe", "encoder-decoder"),
        ("qwen3_omni_moe", "thinker"),
        ("PanguProMoE", "same number of experts from each group"),
        ("inkling_mm_model", "a row for each shared expert"),
        ("interns2_mobius", "share the same experts"),
        ("zaya", "skip all experts"),
    ],
)
def test_a_family_that_is_refused_is_named_with_the_reason(
    model_type: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    with pytest.raises(
        PlacerError, match=f"{model_type} is not supported.*{reason}"
    ) as caught:
        ModelSpec.from_checkpoint(tmp_path)
    assert "placer import" in caught.value.hint


def test_groups_count_only_where_the_router_heeds_them(tmp_path: Path) -> None:
    model = build("deepseek_v2")
    for method, groups in (("greedy", 1), ("group_limited_greedy", 4)):
        model.config.topk_method, model.config.n_group = method, 4
        model.config.save_pretrained(tmp_path)
        assert ModelSpec.from_checkpoint(tmp_path).n_group == groups
