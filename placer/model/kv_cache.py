"""What one token takes of the KV cache."""

from pathlib import Path

from placer.model.config_file import read_config

_BF16 = 2
# Keys of configs whose layers do not all attend to every token: linear attention, Mamba,
# attention in chunks.
_PARTIAL = (
    "full_attention_interval",
    "attn_layer_period",
    "hybrid_override_pattern",
    "attn_type_list",
    "linear_attn_config",
    "layer_group_size",
    "attention_chunk_size",
)


def kv_cache_bytes(model: Path) -> int | None:
    """Return bytes of one token in the KV cache of a rank that attends alone, in bf16.

    Of data-parallel attention, where each rank keeps all heads of its own sequences.
    Attention with a latent (MLA, https://arxiv.org/abs/2405.04434) keeps the latent and the
    rotary key. ``None`` where the config does not say, or not all layers keep every token.

    Parameters
    ----------
    model
        Checkpoint; its config.json is enough.

    Raises
    ------
    PlacerError
        If there is no config.
    """
    config = read_config(model)
    layers = config.get("num_hidden_layers")
    kinds = config.get("layer_types") or []
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    is_partial = windowed or any(config.get(key) for key in _PARTIAL)
    is_full = not is_partial and all(kind == "full_attention" for kind in kinds)
    if not isinstance(layers, int) or not is_full:
        return None
    latent, rotary = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if isinstance(latent, int) and isinstance(rotary, int):
        return layers * (latent + rotary) * _BF16
    heads, width = config.get("num_key_value_heads"), config.get("head_dim")
    if width is None and isinstance(config.get("num_attention_heads"), int):
        hidden = config.get("hidden_size")
        width = hidden // config["num_attention_heads"] if isinstance(hidden, int) else None
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    return 2 * layers * heads * width * _BF16
