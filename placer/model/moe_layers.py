"""Which layers are MoE layers: the keys by which configs say so.

Keys were collected from the configs of transformers 5.23.0 and the model classes of
sglang 0.5.23, which also read keys of released ``config.json`` files.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from placer.errors import PlacerError

LayerRule = Literal[
    "all",
    "dense_prefix",
    "expert_layer_period",
    "layers_block_type",
    "moe_layer_frequency",
    "moe_layer_interval",
    "moe_layers",
    "sparse_step",
]

# One entry for each layer; they decide, whatever other keys say.
_BY_LAYER = ("mlp_layer_types", "is_moe_layer", "moe_layer_freq")
_BLOCK_TYPES = ("layers_block_type", "hybrid_override_pattern")
# The numbers of the MoE layers, in a list or a text.
_NUMBERS = ("moe_layers", "moe_layers_enum", "moe_layer_list")
# How many of the first layers are dense.
_PREFIXES = (
    "first_k_dense_replace",
    "num_dense_layers",
    "dense_mlp_idx",  # Inkling
    "n_dense_first_layers",  # Motif
)
_SPARSE = {"sparse": True, "moe": True, "hash_moe": True, "dense": False}
_SUBJECTS = {"moe", "dense", "sparse", "expert", "experts", "mlp", "ffn"}
_STEPS = {"step", "freq", "frequency", "interval", "period", "every", "stride"}
_PLACES = _STEPS | {
    *("layer", "layers", "offset", "replace", "idx", "index", "indices", "enum"),
    *("pattern", "types", "start", "end"),
}
# Not the layers of the language model, or not which of them have experts.
_OTHER_SUBJECTS = {
    *("attention", "attn", "window", "mtp", "encoder", "decoder", "vision", "norm", "size"),
}


def moe_layers(rule: LayerRule, config: Mapping[str, Any], num_layers: int) -> list[int]:
    """Return the numbers of the MoE layers, ascending.

    Lists decide: of one entry for each layer, or of the numbers of MoE layers. Without
    one, the family's rule does: ``all``; ``sparse_step`` (``decoder_sparse_step``,
    ``mlp_only_layers``); ``dense_prefix`` (the first layers are dense, and of the others
    every ``moe_layer_freq``-th is an MoE layer); ``moe_layers``
    (``interleave_moe_layer_step``); ``layers_block_type`` (those of type moe, or E in
    ``hybrid_override_pattern``); ``expert_layer_period`` (and offset);
    ``moe_layer_frequency``; ``moe_layer_interval`` (and start and end index).

    Raises
    ------
    PlacerError
        If a key has a value that makes no sense, or one that the family's rule does not
        read contradicts this.
    """
    found = _listed(rule, config, num_layers)
    if found is not None:
        return found
    found = [n for n in range(num_layers) if _RULES[rule](config, n)]
    for key in config:
        if _says_otherwise(key, config, found, num_layers):
            raise PlacerError(
                f"config.json gives {key} {config[key]!r}, which placer does not read for "
                f"this family. By the other keys, the MoE layers are {_brief(found)}",
                "list the MoE layers in config.json yourself: "
                f'"moe_layers": {_brief(found)}',
            )
    return found


def block_types(config: Mapping[str, Any]) -> Sequence[str]:
    """Return the kind of each layer of Nemotron-H, older configs in one letter each."""
    return next((config[key] for key in _BLOCK_TYPES if config.get(key)), ())


def _listed(
    rule: LayerRule, config: Mapping[str, Any], num_layers: int
) -> list[int] | None:
    """Return the MoE layers by a list, or ``None`` where there is none."""
    for key in _BY_LAYER:
        value = config.get(key)
        if isinstance(value, list) and value:
            if len(value) < num_layers:  # more of them are of MTP layers
                raise _odd(key, f"{len(value)} entries for {num_layers} layers")
            return [n for n in range(num_layers) if _is_sparse(key, value[n])]
    kinds = block_types(config)
    if rule == "layers_block_type" or {"moe", "E"} & set(kinds):
        if len(kinds) < num_layers:
            key = "layers_block_type"
            raise _odd(key, f"{len(kinds)} entries for {num_layers} layers")
        return [n for n in range(num_layers) if kinds[n] in ("moe", "E")]
    for key in _NUMBERS:
        value = config.get(key)
        if isinstance(value, str):
            value = [int(one) for one in re.findall(r"\d+", value)]
        if value is None:
            continue
        if not isinstance(value, list) or not all(type(one) is int for one in value):
            raise _odd(key, repr(value))
        return [n for n in range(num_layers) if n in value]
    return None


def _is_sparse(key: str, value: Any) -> bool:
    if key != "mlp_layer_types":
        if value in (0, 1):  # False and True too
            return bool(value)
    elif value in _SPARSE:
        return _SPARSE[value]
    raise _odd(key, f"an entry {value!r}")


def _sparse_step(config: Mapping[str, Any], layer: int) -> bool:
    dense = config.get("mlp_only_layers") or ()
    if not isinstance(dense, (list, tuple)):
        raise _odd("mlp_only_layers", repr(dense))
    return layer not in dense and (layer + 1) % _step(config, "decoder_sparse_step") == 0


def _dense_prefix(config: Mapping[str, Any], layer: int) -> bool:
    prefix = next((n for key in _PREFIXES if (n := _whole(config, key, -1)) >= 0), 0)
    return layer >= prefix and layer % _step(config, "moe_layer_freq") == 0


def _interleaved(config: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % _step(config, "interleave_moe_layer_step") == 0


def _period(config: Mapping[str, Any], layer: int) -> bool:
    offset = _whole(config, "expert_layer_offset", 0)
    return (layer - offset) % _step(config, "expert_layer_period") == 0


def _frequency(config: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % _step(config, "moe_layer_frequency") == 0


def _interval(config: Mapping[str, Any], layer: int) -> bool:
    start = _whole(config, "moe_layer_start_index", 0)
    end = _whole(config, "moe_layer_end_index", -1)
    interval = _step(config, "moe_layer_interval")
    return start <= layer <= (end if end >= 0 else layer) and (layer + 1) % interval == 0


_Rule = Callable[[Mapping[str, Any], int], bool]
_RULES: dict[LayerRule, _Rule] = {
    "all": lambda _config, _layer: True,
    "dense_prefix": _dense_prefix,
    "expert_layer_period": _period,
    "moe_layer_frequency": _frequency,
    "moe_layer_interval": _interval,
    "moe_layers": _interleaved,
    "sparse_step": _sparse_step,
}
_READ_BY: dict[str, _Rule] = {
    **dict.fromkeys((*_PREFIXES, "moe_layer_freq"), _dense_prefix),
    **dict.fromkeys(("expert_layer_offset", "expert_layer_period"), _period),
    **dict.fromkeys(
        ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), _interval
    ),
    "interleave_moe_layer_step": _interleaved,
    "moe_layer_frequency": _frequency,
    **dict.fromkeys(("mlp_only_layers", "decoder_sparse_step"), _sparse_step),
}


def _says_otherwise(
    key: str, config: Mapping[str, Any], found: list[int], num_layers: int
) -> bool:
    """Return whether a key says that other layers are MoE layers, or may say so."""
    value = config[key]
    if key in _READ_BY:
        return value is not None and found != [
            n for n in range(num_layers) if _READ_BY[key](config, n)
        ]
    words = set(key.split("_"))
    if not (words & _SUBJECTS and words & _PLACES) or words & _OTHER_SUBJECTS:
        return False
    if isinstance(value, str):
        return bool(re.search(r"\d", value))
    if isinstance(value, list):
        if words & {"num", "n"}:  # of experts, by layer
            return 0 in value
        return bool(value) and value != found
    if type(value) is not int or value <= 0 or (value == 1 and words & _STEPS):
        return False
    return value not in _counts(words, found, num_layers)


def _counts(words: set[str], found: list[int], num_layers: int) -> Iterator[int]:
    """Yield what a key that counts layers may say, by its words."""
    if words & {"num", "n"}:
        yield num_layers - len(found) if "dense" in words else len(found)


def _step(config: Mapping[str, Any], key: str) -> int:
    value = _whole(config, key, 1)
    if value < 1:
        raise _odd(key, str(value))
    return value


def _whole(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key)
    if value is None:
        return default
    if type(value) is not int:
        raise _odd(key, repr(value))
    return value


def _odd(key: str, what: str) -> PlacerError:
    return PlacerError(
        f"config.json gives {what} for {key}, so its MoE layers are unknown",
        "check that config.json is that of the model",
    )


def _brief(layers: list[int]) -> str:
    """Return a list of layers in short, such as ``[1, 2, ..., 47]``."""
    if len(layers) > 4 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"[{layers[0]}, {layers[1]}, ..., {layers[-1]}]"
    return str(layers)
