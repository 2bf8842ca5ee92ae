"""Every family of transformers at tiny size, and an oracle of what experts are asked."""

from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import __version__ as transformers_version

from placer.model import ModelSpec

# Everything small; a family takes the keys that its config class has.
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL_ATTENTION = {"layer_types": ["full_attention"] * 4}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
INDEXED = LATENT | {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4}
#: Per family: what to set beyond SMALL, and its MoE layers.
FAMILIES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "afmoe": ({"num_dense_layers": 1, **FULL_ATTENTION}, [1, 2, 3]),
    "axk1": ({"n_group": 4, "topk_group": 2, **DENSE_FIRST, **LATENT}, [1, 2, 3]),
    "axk2": (DENSE_FIRST | INDEXED, [1, 2, 3]),
    "beam": (FULL_ATTENTION | DENSE_FIRST | {"n_group": 4, "topk_group": 2}, [1, 2, 3]),
    "bailing_hybrid": (
        {"num_expert_group": 4, "topk_group": 2, **FULL_ATTENTION, **DENSE_FIRST, **LATENT},
        [1, 2, 3],
    ),
    "cohere2_moe": (FULL_ATTENTION | DENSE_FIRST, [1, 2, 3]),
    "dbrx": (
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        },
        [0, 1],
    ),
    "deepseek_v2": ({"first_k_dense_replace": 1, **LATENT}, [1, 2, 3]),
    "deepseek_v3": (
        {"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, **LATENT},
        [1, 2, 3],
    ),
    "deepseek_v32": ({"n_group": 4, "topk_group": 2, **DENSE_FIRST, **INDEXED}, [1, 2, 3]),
    "deepseek_v4": (
        {"mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"]},
        [0, 1, 2, 3],
    ),
    "dots1": ({"first_k_dense_replace": 1, "n_shared_experts": 1}, [1, 2, 3]),
    "ernie4_5_moe": ({"moe_layer_start_index": 1, "moe_layer_end_index": 2}, [1, 2]),
    "exaone_moe": (FULL_ATTENTION | DENSE_FIRST, [1, 2, 3]),
    "flex_olmo": ({}, [0, 1, 2, 3]),
    "flint": (
        {"mlp_only_layers": [0], "shared_expert_intermediate_size": 16, **FULL_ATTENTION},
        [1, 2, 3],
    ),
    "gemma4_text": (
        {
            "enable_moe_block": True,
            "top_k_experts": 2,
            "global_head_dim": 8,
            "num_global_key_value_heads": 2,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
            **FULL_ATTENTION,
        },
        [0, 1, 2, 3],
    ),
    "glm4_moe": ({"first_k_dense_replace": 2}, [2, 3]),
    "glm4_moe_lite": (DENSE_FIRST | LATENT, [1, 2, 3]),
    "glm_moe_dsa": (DENSE_FIRST | INDEXED, [1, 2, 3]),
    "gpt_oss": ({}, [0, 1, 2, 3]),
    "granitemoe": ({}, [0, 1, 2, 3]),
    "granitemoe_swa": ({}, [0, 1, 2, 3]),
    "granitemoehybrid": (
        {"layer_types": ["attention"] * 4, "mamba_n_heads": 4, "mamba_d_head": 16},
        [0, 1, 2, 3],
    ),
    "granitemoeshared": ({}, [0, 1, 2, 3]),
    "hunyuan_v1_moe": ({}, [0, 1, 2, 3]),
    "hy_v3": (DENSE_FIRST, [1, 2, 3]),
    "hy_v4": (DENSE_FIRST | INDEXED, [1, 2, 3]),
    "jamba": (
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        [1, 3],
    ),
    "kimi_linear": (FULL_ATTENTION | DENSE_FIRST | LATENT, [1, 2, 3]),
    "kolibri1": ({"shared_expert_intermediate_size": 16, **FULL_ATTENTION}, [0, 1, 2, 3]),
    "laguna": (FULL_ATTENTION | DENSE_FIRST, [1, 2, 3]),
    "lfm2_moe": ({"num_dense_layers": 1, **FULL_ATTENTION}, [1, 2, 3]),
    "llama4_text": (
        {
            "interleave_moe_layer_step": 2,
            "moe_layers": [1, 3],
            "intermediate_size_mlp": 32,
            "num_experts_per_tok": 1,
        },
        [1, 3],
    ),
    "mellum": (FULL_ATTENTION, [0, 1, 2, 3]),
    "mimo_v2_flash": (FULL_ATTENTION | DENSE_FIRST, [1, 2, 3]),
    "minimax": (FULL_ATTENTION, [0, 1, 2, 3]),
    "minimax_m2": ({}, [0, 1, 2, 3]),
    "minimax_m3_vl_text": (
        {"dense_intermediate_size": 32, "shared_intermediate_size": 16, **DENSE_FIRST},
        [1, 2, 3],
    ),
    "mixtral": ({}, [0, 1, 2, 3]),
    "nemotron_h": (
        {
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "use_mamba_kernels": False,
            "moe_shared_expert_intermediate_size": 16,
        },
        [1, 3],
    ),
    "olmoe": ({}, [0, 1, 2, 3]),
    "phimoe": ({}, [0, 1, 2, 3]),
    "qwen2_moe": (
        {"decoder_sparse_step": 2, "shared_expert_intermediate_size": 16},
        [1, 3],
    ),
    "qwen3_5_moe_text": (
        {"shared_expert_intermediate_size": 16, **FULL_ATTENTION},
        [0, 1, 2, 3],
    ),
    "qwen3_moe": ({"mlp_only_layers": [0]}, [1, 2, 3]),
    "qwen3_next": ({"shared_expert_intermediate_size": 16, **FULL_ATTENTION}, [0, 1, 2, 3]),
    "qwen4_exp_text": (
        {
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "hc_count": 2,
            "hc_lowrank": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            # Embedded as zeros, which it would route: all experts would tie.
            "pad_token_id": None,
        },
        [0, 1, 2, 3],
    ),
    "solar_open": ({}, [0, 1, 2, 3]),
}

#: Language models that AutoModelForCausalLM does not load alone; as FAMILIES.
LANGUAGE: dict[str, tuple[dict[str, Any], list[int]]] = {
    "glm4v_moe_text": (
        {
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 0],
            },
        },
        [1, 2, 3],
    ),
    "mistral4": (
        {
            "model_type": "mistral4",
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 64,
            },
            **LATENT,
        },
        [1, 2, 3],
    ),
}

_SMALL_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
#: Vision-language families: the family of their language model, and their vision config.
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": (
        "gemma4_text",
        _SMALL_VISION
        | {"head_dim": 8, "global_head_dim": 8, "num_key_value_heads": 2}
        | {"position_embedding_size": 16},
    ),
    "glm4v_moe": (
        "glm4v_moe_text",
        {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    ),
    "kimi_k25": ("deepseek_v3", _SMALL_VISION),
    "llama4": (
        "llama4_text",
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    ),
    "minimax_m3_vl": ("minimax_m3_vl_text", _SMALL_VISION),
    "mistral3": ("mistral4", _SMALL_VISION | {"head_dim": 8}),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    ),
    "qwen4_exp": (
        "qwen4_exp_text",
        {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    ),
    "qwen3_vl_moe": (
        "qwen3_moe",
        {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
        },
    ),
}


#: Families without a class in transformers, or whose class does not load what is released:
#: their layouts are written by hand (test_quantised_layouts, test_released_layouts).
RELEASED = {
    "arctic",
    "aria",
    "bailing_moe",
    "bailing_moe_linear",
    "bailing_moe_v2",
    "deepseek",
    "deepseek_ocr2_text",
    "dots_vlm",
    "gigachat3_5",
    "git",
    "glm4v_moe_text",
    "glm5_next",
    "glm5_next_text",
    "hunyuan",
    "inkling2",
    "inkling2_text",
    "iquest_q1",
    "k2_horizon",
    "kimi_k2",
    "kimi_k3",
    "kimi_vl",
    "llada2_moe",
    "mimo_v2",
    "minicpm",
    "minimax_m1",
    "minimax_text_01",
    "mistral4",
    "mistral_large_3",
    "mistral_large4",
    "mistral_large4_text",
    "muse_spark",
    "muse_spark_text",
    "pangu_ultra_moe",
    "param2moe",
    "qwen3_vl_moe_text",
    "qwen4_exp",
    "qwen4_exp_text",
    "sarvam_mla",
    "sarvam_moe",
    "sdar_moe",
    "step3_text",
    "step3_vl",
    "step3p5",
    "step3p7",
    "unlimited_language",
    "unlimited_ocr_text",
    "xllm",
    "xverse_moe",
}


def is_tested_transformers() -> bool:
    """Whether transformers is that of ``constraints.txt``, which knows all families."""
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    return f"transformers=={transformers_version}" in lines


def config_class_of(model_type: str) -> Any:
    """Return the class of a config; the test is skipped where transformers is older."""
    if model_type not in CONFIG_MAPPING and not is_tested_transformers():
        pytest.skip(f"transformers {transformers_version} does not know {model_type}")
    return CONFIG_MAPPING[model_type]


def build(model_type: str, **options: Any) -> Any:
    config_class = config_class_of(model_type)
    extra, _ = FAMILIES[model_type]
    known = {*signature(config_class).parameters, *config_class.attribute_map}
    common = {key: value for key, value in SMALL.items() if key in known}
    if model_type == "dbrx":
        common = {"vocab_size": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_class(**common | extra | options)
    ).eval()
    for name, table in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("tid2eid"):  # hash layers: token id to experts, made by training
            chosen = torch.rand(len(table), 8).topk(table.shape[1]).indices
            table.data.copy_(chosen.to(table.dtype))
    return model


def build_vision(model_type: str) -> Any:
    """The whole model, with every number drawn."""
    language_type, vision = VISION[model_type]
    text = SMALL | (FAMILIES | LANGUAGE)[language_type][0]
    if model_type == "kimi_k25":  # has any language model, others one of their own
        text |= {"model_type": language_type}
    config = config_class_of(model_type)(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in whole.parameters():  # some families start theirs at zero
        parameter.data.normal_(0, 0.1)
    return whole


def randomise(model: Any) -> Any:
    """Draw what families start at zero or one: a bias of zeros would permute unseen."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(part in name for part in ("bias", "gate_up_proj", "down_proj", "router")):
            tensor.data.normal_(0, 0.1, generator=generator)
    return model


def legal_rows(model: ModelSpec, seed: int) -> list[list[int]]:
    """Per layer a random permutation that keeps router groups whole."""
    rng = np.random.default_rng(seed)
    rows = []
    for size in model.num_experts:
        groups = rng.permutation(np.arange(size).reshape(model.n_group, -1))
        rows.append(rng.permuted(groups, axis=1).reshape(-1).tolist())
    return rows


def oracle(model: Any, ids: torch.Tensor) -> dict[str, list[set[int]]]:
    """Replace the experts' forward; return per module the experts of every token."""
    called: dict[str, list[set[int]]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "experts":
            continue

        def forward(*args: Any, _name: str = name, _forward: Any = module.forward) -> Any:
            if len(args) == 1:  # Llama 4: every token to every expert, zeroed if not chosen
                used = args[0].abs().sum(-1).reshape(-1, ids.numel()) > 0
                called[_name] = [set(row.nonzero()[:, 0].tolist()) for row in used.T]
            else:
                called[_name] = [set(row.tolist()) for row in args[1]]
            return _forward(*args)

        module.forward = forward
    with torch.inference_mode():
        model(input_ids=ids)
    return called
