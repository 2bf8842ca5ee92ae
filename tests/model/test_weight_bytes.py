"""Bytes per weight of experts, by configs as released checkpoints have them."""

import json

import pytest

from placer.errors import PlacerError
from placer.model.weight_bytes import checkpoint_weight_bytes

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
    ],
)
def test_the_config_says_it(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint_weight_bytes(tmp_path) == expected


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    quantised = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantised))
    assert checkpoint_weight_bytes(tmp_path) == 0.5625


def test_a_quantisation_that_is_not_known_is_not_guessed(tmp_path):
    config = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "exotic"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlacerError, match="exotic") as error:
        checkpoint_weight_bytes(tmp_path)
    assert "--weight-bytes" in error.value.hint
