"""Bytes per weight of a checkpoint's routed experts, from what its config says.

Formats and keys are those of released checkpoints: DeepSeek (fp8), gpt-oss (mxfp4), NVIDIA
ModelOpt (nvfp4), AMD Quark, compressed-tensors, AWQ, GPTQ and bitsandbytes.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from placer.errors import PlacerError
from placer.run.files import read_json

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
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")


def checkpoint_weight_bytes(directory: Path) -> float | None:
    """Return the bytes per weight of a checkpoint's experts, scales included.

    ``None`` where its ``config.json`` says neither a quantisation nor an element type.

    Raises
    ------
    PlacerError
        If there is no config, or its quantisation is not known.
    """
    config = read_json(directory / "config.json", "model config")
    levels = [config, *(v for key in _NESTED if isinstance(v := config.get(key), dict))]
    for level in levels:
        if isinstance(element := level.get("expert_dtype"), str) and element in _DTYPES:
            return _DTYPES[element]  # DeepSeek-V4: experts are finer than the rest
    quantised = [level.get("quantization_config") for level in levels]
    path = directory / "hf_quant_config.json"
    if not any(quantised) and path.is_file():
        quantised.append(read_json(path, "quantisation config").get("quantization"))
    for found in quantised:
        if isinstance(found, dict):
            return _quantised(found, directory)
    for level in levels:
        element = level.get("torch_dtype", level.get("dtype"))
        if isinstance(element, str) and element in _DTYPES:
            return _DTYPES[element]
    return None


def _quantised(config: Mapping[str, Any], directory: Path) -> float:
    """Return the bytes per weight of a quantisation config."""
    method = str(config.get("quant_method", "")).lower()
    algorithm = str(config.get("quant_algo", "")).lower()
    for name in (method, algorithm):
        if name in _FORMATS:
            return _FORMATS[name]
    if algorithm.startswith(("fp8", "w8a8")):
        return 1.0
    if algorithm.startswith("w4a"):
        return _grouped(4, config.get("group_size", 128))
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return 1.0
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        return _grouped(4, 64)
    for weights in _weights(config):
        bits = weights.get("num_bits", weights.get("bits", weights.get("w_bit")))
        if bits is None and (digits := re.search(r"\d+", str(weights.get("dtype", "")))):
            bits = int(digits.group())
        if type(bits) is int and 1 <= bits <= 16:
            return _grouped(bits, weights.get("group_size", weights.get("q_group_size")))
    raise PlacerError(
        f"{directory}: quantization_config ({method or algorithm or 'no method'}) does not "
        "say how many bits a weight of an expert has",
        "give the bytes per weight, for example --weight-bytes 0.5",
    )


def _weights(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what may say the bits of the experts' weights, the surest first."""
    groups = [one for one in (config.get("config_groups") or {}).values()]
    groups.sort(key=lambda one: "expert" not in str(one.get("targets")))
    for group in groups:
        if isinstance(group.get("weights"), dict):
            yield group["weights"]
    layers = config.get("layer_quant_config") or {}
    experts = [one for name, one in layers.items() if "expert" in name]
    for one in (*experts, config.get("global_quant_config") or {}):
        if isinstance(one.get("weight"), dict):
            yield one["weight"]
    yield config


def _grouped(bits: int, group_size: Any) -> float:
    """Return the bytes of a weight with its share of a group's scale."""
    if type(group_size) is not int or group_size < 1:  # one scale per channel or tensor
        return bits / 8
    scale = 1.0 if bits == 4 and group_size in (16, 32) else _SCALE_BYTES
    return bits / 8 + scale / group_size
