"""What placer must know of a Mixture-of-Experts model, and how its family is laid out.

Families are data: one file of ``placer/architectures`` each.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from placer.errors import PlacerError
from placer.files import read_json, sha256_json


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
        Experts per token that the router chooses.
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
        if not 1 <= self.top_k <= min(self.num_experts):
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
        num_experts = architecture.config_value(config, "num_experts")
        unbound = cls(
            id=directory.resolve().name,
            model_type=config["model_type"],
            layer_ids=tuple(layer_ids),
            num_experts=(num_experts,) * len(layer_ids),
            top_k=architecture.config_value(config, "top_k"),
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
            n_group=config.get("n_group") or 1,
            topk_group=config.get("topk_group") or 1,
        )
        fields = unbound.to_json() | {"fingerprint": unbound.bound_fingerprint()}
        return cls.from_json(fields)


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
    PlacerError
        If fingerprints or shapes differ.
    """
    for field in ("num_experts", "top_k"):
        left, right = getattr(one, field), getattr(other, field)
        if left != right:
            raise PlacerError(
                f"{one_name} and {other_name} are of different models: "
                f"{field} {_brief(left)} against {_brief(right)}",
                f"look at both: placer inspect {one_name}; placer inspect {other_name}",
            )
    if one.bound and other.bound:
        if one.fingerprint != other.fingerprint:
            raise PlacerError(
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How one family names its config keys, modules and tensors.

    Attributes
    ----------
    model_types
        The ``model_type`` values of the family.
    config
        Config keys, in order of preference, of ``num_experts`` and ``top_k``.
    layers
        Rule for which layers are MoE layers: ``all`` or ``sparse_step``.
    router_module
        Module path of the router, with ``{layer}``.
    router_tensors
        Patterns of tensors whose first axis is the logical expert, with ``{layer}``.
    expert_tensors
        Patterns of per-expert tensors, with ``{layer}``, ``{expert}`` and ``{name}``.
    """

    model_types: tuple[str, ...]
    config: Mapping[str, tuple[str, ...]]
    layers: Literal["all", "sparse_step"]
    router_module: str
    router_tensors: tuple[str, ...]
    expert_tensors: tuple[str, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], source: Path) -> "Architecture":
        """Return the family of a config; ``source`` names it in the error."""
        model_type = config.get("model_type")
        for architecture in known_architectures():
            if model_type in architecture.model_types:
                return architecture
        known = sorted(t for a in known_architectures() for t in a.model_types)
        raise PlacerError(
            f"{source}: model_type {model_type!r} is not a family that placer knows",
            f"known families: {', '.join(known)}",
        )

    def config_value(self, config: Mapping[str, Any], field: str) -> int:
        """Return the first of the family's keys for ``field`` that the config has."""
        for key in self.config[field]:
            if config.get(key) is not None:
                return int(config[key])
        raise PlacerError(
            f"config.json has none of the keys {', '.join(self.config[field])}"
        )

    def moe_layers(self, config: Mapping[str, Any]) -> list[int]:
        """Return the model's own numbers of its MoE layers, ascending."""
        every = range(config["num_hidden_layers"])
        if self.layers == "all":
            return list(every)
        step = config.get("decoder_sparse_step") or 1
        dense = set(config.get("mlp_only_layers") or ())
        return [n for n in every if n not in dense and (n + 1) % step == 0]


@cache
def known_architectures() -> tuple[Architecture, ...]:
    """Return all families, from the data files, by file name."""
    folder = resources.files("placer") / "architectures"
    files = sorted(
        (f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name
    )
    return tuple(_read_architecture(tomllib.loads(f.read_text())) for f in files)


def _read_architecture(value: Mapping[str, Any]) -> Architecture:
    return Architecture(
        model_types=tuple(value["model_types"]),
        config={field: tuple(value["config"][field]) for field in ("num_experts", "top_k")},
        layers=value["config"]["layers"],
        router_module=value["modules"]["router"],
        router_tensors=tuple(value["tensors"]["router"]),
        expert_tensors=tuple(value["tensors"]["expert"]),
    )


def name_pattern(template: str) -> re.Pattern[str]:
    """Return the regular expression of a name template.

    ``{layer}`` and ``{expert}`` become groups of digits, ``{name}`` the rest of the name.
    """
    escaped = re.escape(template)
    for field, expression in (
        ("layer", r"(?P<layer>\d+)"),
        ("expert", r"(?P<expert>\d+)"),
        ("name", r"(?P<name>.+)"),
    ):
        escaped = escaped.replace(re.escape("{" + field + "}"), expression)
    return re.compile(escaped)
