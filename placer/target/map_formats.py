"""The formats of runtime maps: each is registered here, once. Light, as help lists them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MapFormat:
    """A format of runtime maps.

    Attributes
    ----------
    runtime
        A module of ``placer.runtime_map``, and the name of the ``Runtime`` in it.
    suffixes
        File names that it is known by, the usual one first.
    keys
        Of a JSON object, those that tell it from others; of formats that have all of
        theirs, the one with the most keys counts. Empty where JSON is a list of rows.
    mark
        Bytes that tell it from other files of the same suffix; may be empty.
    """

    runtime: tuple[str, str]
    suffixes: tuple[str, ...]
    keys: frozenset[str] = frozenset()
    mark: bytes = b""


_ROWS = "physical_to_logical_map"

MAPS = {
    "sglang": MapFormat(
        runtime=("sglang", "SGLANG"), suffixes=(".json", ".pt"), keys=frozenset({_ROWS})
    ),
    "trtllm": MapFormat(runtime=("trtllm", "TRTLLM"), suffixes=(".yaml", ".yml")),
    "vllm-ascend": MapFormat(
        runtime=("vllm_ascend", "VLLM_ASCEND"),
        suffixes=(".json",),
        keys=frozenset({"layer_list"}),
    ),
    "vllm-pr49572": MapFormat(runtime=("vllm", "PROPOSED"), suffixes=(".json",)),
    "vllm-das": MapFormat(
        runtime=("vllm", "DAS"), suffixes=(".json",), keys=frozenset({"model_maps"})
    ),
    "eplb": MapFormat(
        runtime=("eplb", "EPLB"), suffixes=(".safetensors", ".npz"), mark=b"phy2log"
    ),
    "csv": MapFormat(runtime=("plain", "CSV"), suffixes=(".csv",)),
    "json": MapFormat(
        runtime=("plain", "JSON"), suffixes=(".json",), keys=frozenset({_ROWS, "kind"})
    ),
}

#: Written of counts, not of a plan.
COUNTS = "ktransformers"
#: What ``placer export`` writes.
TARGETS = ("checkpoint", "ranks", "deepspeed", *MAPS, COUNTS)


def format_of_suffix(suffix: str) -> str | None:
    """Return the first format of a suffix, ``None`` where there is none."""
    return next((name for name, one in MAPS.items() if suffix in one.suffixes), None)


def format_of_json(value: object) -> str | None:
    """Return the format of a decoded JSON file, ``None`` where it is no map."""
    if isinstance(value, list):
        rows = value and all(isinstance(one, list) for one in value)
        wanted = [one for one in MAPS if ".json" in MAPS[one].suffixes and rows]
        return next((one for one in wanted if not MAPS[one].keys), None)
    keys = set(value) if isinstance(value, dict) else set()
    if keys & {"model", "kind"} == {"model"}:
        return None  # a plan
    told = {name: one.keys for name, one in MAPS.items() if one.keys and one.keys <= keys}
    return max(told, key=lambda name: len(told[name]), default=None)
