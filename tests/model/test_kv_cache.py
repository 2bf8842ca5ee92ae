"""Bytes of a token in the KV cache, by hand for the ways of attention that are known."""

import json
from pathlib import Path

import pytest

from placer.model.kv_cache import kv_cache_bytes


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Qwen3-30B-A3B: 48 layers, 4 KV heads of 128, keys and values, 2 bytes each.
        (
            {"num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128},
            48 * 2 * 4 * 128 * 2,
        ),
        # Without head_dim: the hidden state divided by the heads, 2048 / 16.
        (
            {
                "num_hidden_layers": 2,
                "num_key_value_heads": 8,
                "num_attention_heads": 16,
                "hidden_size": 2048,
            },
            2 * 2 * 8 * 128 * 2,
        ),
        # DeepSeek-V3: 61 layers, a latent of 512 and a rotary key of 64.
        (
            {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
            61 * 576 * 2,
        ),
        (
            {
                "num_hidden_layers": 2,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            None,
        ),
        (
            {
                "num_hidden_layers": 2,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "sliding_window": 4096,
            },
            None,
        ),
        ({"num_hidden_layers": 2}, None),
        *(
            (
                {"num_hidden_layers": 8, "num_key_value_heads": 8, "head_dim": 64, **key},
                None,
            )
            for key in (
                {"full_attention_interval": 4},
                {"attn_layer_period": 8},
                {"hybrid_override_pattern": "M-M*"},
                {"attn_type_list": [0, 1]},
                {"linear_attn_config": {"full_attn_layers": [4]}},
                {"layer_group_size": 5},
                {"attention_chunk_size": 8192},
            )
        ),
    ],
)
def test_bytes_of_a_token(
    config: dict[str, object], expected: int | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert kv_cache_bytes(tmp_path) == expected
