"""Bytes per weight of experts, by configs as released checkpoints have them."""

import json

import pytest

from placer.errors import PlacerError
from placer.model.weight_bytes import ExpertWeights, checkpoint_weights

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "group_size": None}


def groups(**targets):
    """A compressed-tensors config: weights by what they are for."""
    named = {f"group_{n}": one for n, one in enumerate(targets.values())}
    return {"quant_method": "compressed-tensors", "config_groups": named}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, 2),
        ({"dtype": "float32"}, 4),
        ({"text_config": {"torch_dtype": "float16"}}, 2),
        ({}, None),
        # DeepSeek-V3, gpt-oss, NVIDIA's and AMD's; the dtype is that of the rest.
        ({"torch_dtype": "bfloat16", "quantization_config": FP8}, 1),
        ({"quantization_config": {"quant_method": "mxfp4"}}, 0.53125),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            0.5625,
        ),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, 1),
        (
            {
                "quantization_config": {
                    "quant_method": "quark",
                    "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}},
                }
            },
            0.53125,
        ),
        # DeepSeek-V4: experts in four bits, all else in fp8.
        ({"expert_dtype": "fp4", "quantization_config": FP8}, 0.53125),
        # AWQ and GPTQ: a scale of two bytes for 128 weights.
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
            0.515625,
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": -1}}, 1),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            1,
        ),
        # Kimi-K2's int4, told apart from the attention's int8.
        (
            {
                "quantization_config": groups(
                    attention={"targets": ["re:.*self_attn.*"], "weights": INT8},
                    experts={"targets": ["re:.*experts.*"], "weights": INT4},
                )
            },
            0.53125,
        ),
        ({"text_config": {"quantization_config": FP8, "torch_dtype": "bfloat16"}}, 1),
        # Nothing is quantised, or the cache alone.
        ({"torch_dtype": "bfloat16", "quantization_config": {}}, 2),
        (
            {
                "torch_dtype": "bfloat16",
                "quantization_config": {"quant_method": "modelopt", "quant_algo": None},
            },
            2,
        ),
    ],
)
def test_the_config_says_it(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = checkpoint_weights(tmp_path)
    assert (found and found.num_bytes) == expected


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    quantised = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantised))
    assert checkpoint_weights(tmp_path) == ExpertWeights(num_bytes=0.5625)


def test_a_quantisation_that_is_not_known_is_not_guessed(tmp_path):
    config = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "exotic"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlacerError, match="exotic") as error:
        checkpoint_weights(tmp_path)
    assert "--weight-bytes" in error.value.hint


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        ({"modules_to_not_convert": ["mlp.experts"]}, 2),
        ({"modules_to_not_convert": ["model.layers.*.mlp.experts"]}, 2),
        ({"ignore": ["lm_head", "re:.*mlp\\.experts.*"]}, 2),
        ({"ignore": ["re:.*block_sparse_moe.experts.\\d+.w[123]$"]}, 2),
        ({"exclude_modules": ["*experts*"]}, 2),
        ({"dynamic": {"-:.*experts.*": {}}}, 2),
        (
            {
                "ignore": [
                    f"model.layers.{layer}.mlp.experts.{e}.{name}_proj"
                    for layer in range(1, 10)
                    for e in range(4)
                    for name in ("gate", "up", "down")
                ]
            },
            2,
        ),
        # What else lists hold: parts of experts, a layer of them, shared ones, routers.
        ({"modules_to_not_convert": ["gate", "self_attn", "lm_head"]}, 0.515625),
        ({"modules_to_not_convert": ["model.layers.*.mlp.router"]}, 0.515625),
        ({"ignore": ["re:.*shared_experts.*", "re:.*mlp.gate$"]}, 0.515625),
        ({"ignore": ["re:model.layers.0.*", "model.layers.9.mlp.experts"]}, 0.515625),
        ({"ignore": ["re:.*experts.*down_proj"]}, 0.515625),
        ({"exclude_modules": ["*shared_expert*", "*mlp.gate"]}, 0.515625),
        ({"ignore": None}, 0.515625),
        ({"ignore": ["re:*experts*"]}, 0.515625),  # no pattern at all
    ],
)
def test_experts_that_a_quantiser_left_as_they_were(tmp_path, left_out, expected):
    config = {"torch_dtype": "bfloat16", "num_hidden_layers": 10}
    config["quantization_config"] = AWQ | left_out
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = checkpoint_weights(tmp_path)
    assert found == ExpertWeights(num_bytes=expected, weight_only=expected < 2)


def test_a_file_of_modelopt_may_say_that_nothing_is_quantised(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    quantised = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantised))
    assert checkpoint_weights(tmp_path) == ExpertWeights(num_bytes=2)


@pytest.mark.parametrize(
    ("config", "weight_only"),
    [
        (FP8, False),
        (AWQ, True),
        ({"quant_method": "gptq", "bits": 8}, True),
        ({"quant_method": "mxfp4"}, True),
        ({"quant_algo": "W4A16_AWQ"}, True),
        ({"quant_algo": "W4A8_AWQ"}, False),
        ({"quant_algo": "NVFP4"}, False),
        ({"config_groups": {"g": {"weights": INT4, "input_activations": None}}}, True),
        ({"config_groups": {"g": {"weights": INT8, "input_activations": INT8}}}, False),
    ],
)
def test_whether_weights_alone_are_quantised(tmp_path, config, weight_only):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert checkpoint_weights(tmp_path).weight_only == weight_only
