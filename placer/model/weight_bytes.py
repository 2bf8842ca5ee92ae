"""How the weights of a checkpoint's routed experts are stored, from what its config says.

Formats and keys are those of released checkpoints: DeepSeek (fp8), gpt-oss (mxfp4), NVIDIA
ModelOpt (nvfp4), AMD Quark, compressed-tensors, AWQ, GPTQ and bitsandbytes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from placer.errors import PlacerError
from placer.model.config_file import read_config
from placer.run.documents import read_json

# Scales count: one byte for 32 elements of mxfp4, one for 16 of nvfp4. Those of fp8 blocks
# (4 bytes for 128 x 128 elements) are next to nothing.
_FORMATS = {"mxfp4": 0.5 + 1 / 32, "nvfp4": 0.5 + 1 / 16, "fp8": 1.0, "fbgemm_fp8": 1.0}
_DTYPES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "float8_e4m3fn": 1.0,
    "fp4": _FORMATS["mxfp4"],
    "fp8": 1.0,
}
_SCALE_BYTES = 2.0
# Where quantisers list the modules that they leave as they are.
_LEFT_OUT = (
    "ignore",
    "ignored_layers",
    "modules_to_not_convert",
    "exclude_modules",
    "exclude",
    "llm_int8_skip_modules",
)
_SPLIT = ("0.gate_proj", "0.up_proj", "0.down_proj")
_MIXTRAL = ("0.w1", "0.w2", "0.w3")
_FUSED = ("gate_up_proj", "down_proj")
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """How the weights of a checkpoint's experts are stored.

    Attributes
    ----------
    num_bytes
        Bytes per weight, scales included.
    weight_only
        Whether only weights are quantised: an engine then computes in 16 bits.
    """

    num_bytes: float
    weight_only: bool = False


def checkpoint_weights(directory: Path) -> ExpertWeights | None:
    """Return how a checkpoint's experts are stored.

    ``None`` where its ``config.json`` says neither a quantisation nor an element type.

    Raises
    ------
    PlacerError
        If there is no config, or its quantisation is not known.
    """
    config = read_config(directory)
    levels = [config, *(v for key in _NESTED if isinstance(v := config.get(key), dict))]
    for level in levels:
        if isinstance(element := level.get("expert_dtype"), str) and element in _DTYPES:
            # DeepSeek-V4: experts are finer than the rest.
            return ExpertWeights(num_bytes=_DTYPES[element])
    found = [level.get("quantization_config") for level in levels]
    path = directory / "hf_quant_config.json"
    if not any(found) and path.is_file():
        found.append(read_json(path, "quantisation config").get("quantization"))
    layers = [
        level["num_hidden_layers"] for level in levels if "num_hidden_layers" in level
    ]
    for one in found:
        if isinstance(one, dict) and _quantises_experts(one, *layers[:1]):
            return _quantised(one, directory)
    for level in levels:
        element = level.get("torch_dtype", level.get("dtype"))
        if isinstance(element, str) and element in _DTYPES:
            return ExpertWeights(num_bytes=_DTYPES[element])
    return None


def _quantises_experts(config: Mapping[str, Any], num_layers: int = 2) -> bool:
    """Return whether a quantisation config quantises weights, and experts' among them."""
    if not config or config.get("quant_algo", "") in (None, "NO_QUANT"):
        return False
    left_out = [one for key in _LEFT_OUT for one in config.get(key) or ()]
    dynamic = config.get("dynamic") or ()
    left_out += [f"re:{one[2:]}" for one in dynamic if one.startswith("-:")]
    return not any(
        all(any(_names(entry, name) for entry in left_out) for name in expert)
        for expert in _expert_modules(num_layers)
    )


def _expert_modules(num_layers: int) -> Iterator[list[str]]:
    """Yield the modules of an expert as families name them, in layers of the middle."""
    for root, layer, block, matrices in product(
        ("model.layers", "model.language_model.layers", "language_model.model.layers"),
        (num_layers // 2, num_layers // 2 - 1),  # dense layers may take turns with MoE ones
        ("mlp", "block_sparse_moe", "feed_forward"),
        (_SPLIT, _MIXTRAL, _FUSED),
    ):
        yield [f"{root}.{layer}.{block}.experts.{name}" for name in matrices]


def _names(entry: str, module: str) -> bool:
    """Return whether an entry of such a list names a module, or what it is part of."""
    if entry.startswith("re:"):
        try:
            return re.match(entry[3:], module) is not None
        except re.error:  # an engine refuses it
            return False
    if "*" in entry:
        return fnmatchcase(module, entry) or fnmatchcase(module, f"{entry}.*")
    return f".{entry}." in f".{module}."


def _quantised(config: Mapping[str, Any], directory: Path) -> ExpertWeights:
    """Return how weights are stored by a quantisation config."""
    method = str(config.get("quant_method", "")).lower()
    algorithm = str(config.get("quant_algo", "")).lower()
    for name in (method, algorithm):
        if name in _FORMATS:
            return ExpertWeights(num_bytes=_FORMATS[name], weight_only=name == "mxfp4")
    if algorithm.startswith(("fp8", "w8a8")):
        return ExpertWeights(num_bytes=1.0)
    if algorithm.startswith("w4a"):
        num_bytes = _grouped(4, config.get("group_size", 128))
        return ExpertWeights(num_bytes=num_bytes, weight_only="a16" in algorithm)
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return ExpertWeights(num_bytes=1.0)
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        return ExpertWeights(num_bytes=_grouped(4, 64), weight_only=True)
    for weights, weight_only in _weights(config):
        bits = weights.get("num_bits", weights.get("bits", weights.get("w_bit")))
        if bits is None and (digits := re.search(r"\d+", str(weights.get("dtype", "")))):
            bits = int(digits.group())
        if type(bits) is int and 1 <= bits <= 16:
            group_size = weights.get("group_size", weights.get("q_group_size"))
            return ExpertWeights(
                num_bytes=_grouped(bits, group_size), weight_only=weight_only
            )
    raise PlacerError(
        f"{directory}: quantization_config ({method or algorithm or 'no method'}) does "
        "not say how many bits an expert's weight has",
        "give the bytes per weight, for example --weight-bytes 0.5",
    )


def _weights(config: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Yield what may say the bits of the experts' weights, the most certain first.

    With each, whether it says that nothing else is quantised; AWQ and GPTQ need not.
    """
    groups = [one for one in (config.get("config_groups") or {}).values()]
    groups.sort(key=lambda one: "expert" not in str(one.get("targets")))
    for group in groups:
        if isinstance(group.get("weights"), dict):
            yield group["weights"], not group.get("input_activations")
    layers = config.get("layer_quant_config") or {}
    experts = [one for name, one in layers.items() if "expert" in name]
    for one in (*experts, config.get("global_quant_config") or {}):
        if isinstance(one.get("weight"), dict):
            yield one["weight"], not one.get("input_tensors")
    yield config, True


def _grouped(bits: int, group_size: Any) -> float:
    """Return the bytes of a weight with its share of a group's scale."""
    if type(group_size) is not int or group_size < 1:  # one scale per channel or tensor
        return bits / 8
    scale = 1.0 if bits == 4 and group_size in (16, 32) else _SCALE_BYTES
    return bits / 8 + scale / group_size
