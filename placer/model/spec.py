"""What placer must know of a Mixture-of-Experts model, and how its family is laid out.

Families are data: one file of ``placer/model/architectures`` each.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from placer.errors import PlacerError, UsageError
from placer.model.tensor_layout import TensorLayout
from placer.run.documents import read_json
from placer.run.files import sha256_json


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The shape of a model's routing.

    Attributes
    ----------
    id
        Name of the model, for people; ``None`` if unknown.
    model_type
        The family as Hugging Face configs name it; ``None`` if no config was seen.
    fingerprint
        SHA-256 that binds files to this model (see :meth:`bound_fingerprint`), or
        ``None`` for a trace that is bound to no checkpoint.
    layer_ids
        ``[L]``: the model's own layer number of each MoE layer, or ``None``.
    num_experts
        ``[L]``: logical experts per MoE layer.
    top_k
        Experts per token that the router chooses; 0 where an engine's map is all that is
        known of the model.
    hidden_size, vocab_size
        Widths of the hidden state and of the vocabulary, or ``None``.
    n_group, topk_group
        Router groups and how many of them a token may use; 1 and 1 where ungrouped.
    """

    id: str | None = None
    model_type: str | None = None
    fingerprint: str | None = None
    layer_ids: tuple[int, ...] | None = None
    num_experts: tuple[int, ...]
    top_k: int
    hidden_size: int | None = None
    vocab_size: int | None = None
    n_group: int = 1
    topk_group: int = 1

    def __post_init__(self) -> None:
        if not self.num_experts or min(self.num_experts) < 1:
            raise PlacerError(f"num_experts must be positive, got {self.num_experts}")
        if not (1 if self.bound else 0) <= self.top_k <= min(self.num_experts):
            raise PlacerError(
                f"top_k must be in 1..{min(self.num_experts)} "
                f"(the experts of the smallest layer), got {self.top_k}"
            )
        if self.layer_ids is not None and len(self.layer_ids) != self.num_layers:
            raise PlacerError(
                f"{len(self.layer_ids)} layer_ids for {self.num_layers} MoE layers"
            )

    @property
    def num_layers(self) -> int:
        """Number of MoE layers, L."""
        return len(self.num_experts)

    @property
    def bound(self) -> bool:
        """Whether a checkpoint's config stands behind this specification."""
        return self.fingerprint is not None

    def bound_fingerprint(self) -> str:
        """Return the fingerprint that ``traces/README.md`` defines, from the fields."""
        return sha256_json(
            {
                "model_type": self.model_type,
                "hidden_size": self.hidden_size,
                "vocab_size": self.vocab_size,
                "layer_ids": list(self.layer_ids or ()),
                "num_experts": list(self.num_experts),
                "top_k": self.top_k,
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "id": self.id,
            "model_type": self.model_type,
            "fingerprint": self.fingerprint,
            "layer_ids": None if self.layer_ids is None else list(self.layer_ids),
            "num_experts": list(self.num_experts),
            "top_k": self.top_k,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "n_group": self.n_group,
            "topk_group": self.topk_group,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read the fields back; the inverse of :meth:`to_json`."""
        layer_ids = value.get("layer_ids")
        return cls(
            id=value.get("id"),
            model_type=value.get("model_type"),
            fingerprint=value.get("fingerprint"),
            layer_ids=None if layer_ids is None else tuple(layer_ids),
            num_experts=tuple(value["num_experts"]),
            top_k=value["top_k"],
            hidden_size=value.get("hidden_size"),
            vocab_size=value.get("vocab_size"),
            n_group=value.get("n_group", 1),
            topk_group=value.get("topk_group", 1),
        )

    @classmethod
    def from_checkpoint(cls, directory: Path) -> Self:
        """Read the specification from a Hugging Face directory's ``config.json``.

        Raises
        ------
        PlacerError
            If the directory has no config, or its family is not known.
        """
        config = read_json(directory / "config.json", "model config")
        architecture = Architecture.of(config, directory)
        layer_ids = architecture.moe_layers(config)
        if not layer_ids:
            raise PlacerError(f"{directory} has no MoE layer, by its config.json")
        grouped = architecture.is_grouped(config)
        unbound = cls(
            id=directory.resolve().name,
            model_type=config["model_type"],
            layer_ids=tuple(layer_ids),
            num_experts=(architecture.config_value(config, "num_experts"),)
            * len(layer_ids),
            top_k=architecture.config_value(config, "top_k"),
            hidden_size=architecture.config_value(config, "hidden_size"),
            vocab_size=architecture.config_value(config, "vocab_size"),
            n_group=architecture.config_value(config, "n_group", 1) if grouped else 1,
            topk_group=architecture.config_value(config, "topk_group", 1) if grouped else 1,
        )
        fields = unbound.to_json() | {"fingerprint": unbound.bound_fingerprint()}
        return cls.from_json(fields)


def expert_size(directory: Path) -> int:
    """Return the width of a routed expert, from a Hugging Face ``config.json``.

    Raises
    ------
    PlacerError
        If there is no config, its family is not known, or it does not say.
    """
    config = read_json(directory / "config.json", "model config")
    return Architecture.of(config, directory).config_value(config, "expert_size")


def require_same_model(
    one: ModelSpec, one_name: str, other: ModelSpec, other_name: str
) -> str | None:
    """Refuse to combine files of two models.

    Returns
    -------
    str or None
        A warning where the match rests on shapes alone, because a side is not bound.

    Raises
    ------
    UsageError
        If fingerprints or shapes differ.
    """
    for field in ("num_experts", "top_k"):
        left, right = getattr(one, field), getattr(other, field)
        if left != right and left and right:
            raise UsageError(
                f"{one_name} and {other_name} are of different models: "
                f"{field} {_brief(left)} against {_brief(right)}",
                f"look at both: placer inspect {one_name}; placer inspect {other_name}",
            )
    if one.bound and other.bound:
        if one.fingerprint != other.fingerprint:
            raise UsageError(
                f"{one_name} and {other_name} are of different models: fingerprint "
                f"{str(one.fingerprint)[:12]} against {str(other.fingerprint)[:12]}",
                f"look at both: placer inspect {one_name}; placer inspect {other_name}",
            )
        return None
    return (
        f"{one_name} and {other_name} match by shape only: "
        "one of them is bound to no checkpoint"
    )


def _brief(value: object) -> str:
    """Shorten the expert counts of a uniform model to one figure."""
    if isinstance(value, tuple) and len(set(value)) == 1:
        return f"{value[0]} x {len(value)} layers"
    return str(value)


LayerRule = Literal[
    "all",
    "dense_prefix",
    "expert_layer_period",
    "layers_block_type",
    "moe_layer_interval",
    "moe_layers",
    "sparse_step",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How one family names its config keys, modules and tensors.

    Attributes
    ----------
    model_types
        The ``model_type`` values of the family.
    unsupported
        Why the family is refused, or ``None``.
    unrecorded
        Why ``placer record`` refuses the family, or ``None``: its plans come from traces
        that engines recorded.
    config
        Config keys, in order of preference, by what they mean; a dot goes into a nested
        object.
    nested_in
        Config key of the language model's own config, read where a config has it, as
        those of vision-language models do; or ``None``.
    layers
        Rule for which layers are MoE layers (see :meth:`moe_layers`).
    grouped_if
        Config key and value without which the router ignores groups, or ``None``.
    experts_module
        Module path, with ``{layer}``, of the experts, which transformers calls with
        hidden states, ids and weights.
    scores_module
        Module path of a router whose first output is a ``[T, E]`` matrix of weights, zero
        except for the chosen experts, where the experts are not called with ids.
    router_module
        Module path of the router, which returns ids, or else scores first.
    layout
        Where experts and routers are in its checkpoints, or ``None`` if placer does not
        know.
    """

    model_types: tuple[str, ...]
    unsupported: str | None = None
    unrecorded: str | None = None
    config: Mapping[str, tuple[str, ...]]
    nested_in: str | None = None
    layers: LayerRule
    grouped_if: tuple[str, str] | None = None
    experts_module: str
    scores_module: str | None = None
    router_module: str
    layout: TensorLayout | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], source: Path) -> "Architecture":
        """Return the family of a config; ``source`` names it in the error."""
        model_type = config.get("model_type")
        known: list[str] = []
        for architecture in known_architectures():
            if model_type in architecture.model_types:
                if architecture.unsupported is None:
                    return architecture
                raise PlacerError(
                    f"{source}: {model_type} is not supported: {architecture.unsupported}",
                    "import what an engine recorded of it: placer import --help",
                )
            known += architecture.model_types if architecture.unsupported is None else ()
        raise PlacerError(
            f"{source}: model_type {model_type!r} is not a family that placer knows",
            f"known families: {', '.join(sorted(known))}",
        )

    def require_recorded(self, source: Path) -> None:
        """Refuse a family that placer cannot run; ``source`` names it in the error.

        Raises
        ------
        PlacerError
            With the reason.
        """
        if self.unrecorded is not None:
            raise PlacerError(
                f"{source}: {self.model_types[0]} cannot be run by placer: "
                f"{self.unrecorded}",
                "record it in its engine: placer import --help; "
                "compare tensors only: placer verify ORIGINAL EXPORTED PLAN --max-tokens 0",
            )

    def require_layout(self) -> TensorLayout:
        """Return the names of its tensors; refuse a family without.

        Raises
        ------
        PlacerError
            If its data file names no tensors.
        """
        if self.layout is None:
            raise PlacerError(
                f"placer does not know the checkpoint tensors of {self.model_types[0]}",
                "export a runtime map, which needs none: placer export sglang PLAN MODEL "
                "--out map.json",
            )
        return self.layout

    def config_value(
        self, config: Mapping[str, Any], field: str, default: int | None = None
    ) -> int:
        """Return the first of the family's keys for ``field`` that the config has.

        Raises
        ------
        PlacerError
            If it has none and there is no default, or the value is no whole number.
        """
        keys = self.config[field]
        language = self._language_config(config)
        value = next(
            (v for key in keys if (v := _nested(language, key)) is not None), default
        )
        if isinstance(value, list) and len(set(value)) == 1:  # one for each layer
            value = value[0]
        if type(value) is not int:
            raise PlacerError(
                f"config.json of {config.get('model_type')} gives {value!r} for "
                f"{' or '.join(keys)}, expected a whole number",
                "check that config.json is that of the model",
            )
        return value

    def is_grouped(self, config: Mapping[str, Any]) -> bool:
        """Return whether the router limits a token to some groups of experts."""
        if self.grouped_if is None:
            return True
        key, value = self.grouped_if
        return bool(self._language_config(config).get(key) == value)

    def num_hidden_layers(self, config: Mapping[str, Any]) -> int:
        """Return the number of hidden layers, dense ones included."""
        if self.layers == "layers_block_type":
            return len(_block_types(self._language_config(config)))
        return self.config_value(config, "num_layers")

    def moe_layers(self, config: Mapping[str, Any]) -> list[int]:
        """Return the model's own numbers of its MoE layers, ascending.

        Rules: ``all``; ``sparse_step`` (``decoder_sparse_step``, ``mlp_only_layers``);
        ``dense_prefix`` (``mlp_layer_types``, else the first ``first_k_dense_replace`` or
        ``num_dense_layers`` are dense, and of the others every ``moe_layer_freq``-th is
        an MoE layer, or all for which that list is 1); ``moe_layers`` (the list, else
        ``interleave_moe_layer_step``); ``layers_block_type`` (those of type moe, else E in
        ``hybrid_override_pattern``); ``expert_layer_period`` (and offset);
        ``moe_layer_interval`` (and start and end index).
        """
        num_layers = self.num_hidden_layers(config)
        language = self._language_config(config)
        return [n for n in range(num_layers) if _is_moe_layer(self.layers, language, n)]

    def mtp_layers(self, config: Mapping[str, Any]) -> range:
        """Return the numbers of layers behind the last one, for multi-token prediction."""
        first = self.num_hidden_layers(config)
        return range(first, first + self.config_value(config, "num_mtp_layers", 0))

    def _language_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        nested = config.get(self.nested_in) if self.nested_in else None
        return nested if isinstance(nested, dict) else config


def _is_moe_layer(rule: LayerRule, config: Mapping[str, Any], layer: int) -> bool:
    if rule == "all":
        return True
    if rule == "sparse_step":
        dense = config.get("mlp_only_layers") or ()
        return (
            layer not in dense
            and (layer + 1) % _whole(config, "decoder_sparse_step", 1) == 0
        )
    if rule == "dense_prefix":
        kinds = config.get("mlp_layer_types")
        if kinds is not None:
            return "sparse" in kinds[layer] or "moe" in kinds[layer]
        prefix = _whole(
            config, "first_k_dense_replace", _whole(config, "num_dense_layers", 0)
        )
        listed = config.get("moe_layer_freq")
        if isinstance(listed, list):
            return bool(listed[layer])
        return layer >= prefix and layer % _whole(config, "moe_layer_freq", 1) == 0
    if rule == "moe_layers":
        listed = config.get("moe_layers")
        step = _whole(config, "interleave_moe_layer_step", 1)
        return (layer + 1) % step == 0 if listed is None else layer in listed
    if rule == "layers_block_type":
        return _block_types(config)[layer] in ("moe", "E")
    if rule == "expert_layer_period":
        offset = _whole(config, "expert_layer_offset", 0)
        return (layer - offset) % _whole(config, "expert_layer_period", 1) == 0
    start = _whole(config, "moe_layer_start_index", 0)
    end = _whole(config, "moe_layer_end_index", -1)
    interval = _whole(config, "moe_layer_interval", 1)
    return start <= layer <= (end if end >= 0 else layer) and (layer + 1) % interval == 0


def _block_types(config: Mapping[str, Any]) -> Sequence[str]:
    """Return the kind of each layer of Nemotron-H, older configs in one letter each."""
    return config.get("layers_block_type") or config.get("hybrid_override_pattern") or ()


def _whole(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key)
    return default if value is None else int(value)


def _nested(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


# What configs call these unless a family's file says otherwise.
_USUAL_KEYS = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok",),
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "expert_size": (
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        "intermediate_size",
    ),
    "vocab_size": ("vocab_size",),
    "n_group": ("n_group", "num_expert_group"),
    "topk_group": ("topk_group",),
    "num_mtp_layers": ("num_nextn_predict_layers", "mtp_num_hidden_layers"),
}


@cache
def known_architectures() -> tuple[Architecture, ...]:
    """Return all families, from the data files, by file name."""
    folder = resources.files("placer.model") / "architectures"
    files = sorted(
        (f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name
    )
    return tuple(
        _read_architecture(tomllib.loads(f.read_text(encoding="utf-8"))) for f in files
    )


def _read_architecture(value: Mapping[str, Any]) -> Architecture:
    config, modules = dict(value.get("config", {})), dict(value.get("modules", {}))
    layers = config.pop("layers", "all")
    grouped_if = config.pop("grouped_if", None)
    nested_in = config.pop("nested_in", None)
    keys = _USUAL_KEYS | {field: tuple(names) for field, names in config.items()}
    return Architecture(
        model_types=tuple(value["model_types"]),
        unsupported=value.get("unsupported"),
        unrecorded=value.get("unrecorded"),
        config=keys,
        nested_in=nested_in,
        layers=layers,
        grouped_if=None if grouped_if is None else (grouped_if[0], grouped_if[1]),
        experts_module=modules.get("experts", "model.layers.{layer}.mlp.experts"),
        scores_module=modules.get("scores"),
        router_module=modules.get("router", "model.layers.{layer}.mlp.gate"),
        layout=TensorLayout.from_toml(value["tensors"]) if "tensors" in value else None,
    )
