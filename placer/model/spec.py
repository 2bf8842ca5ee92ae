"""The facts that placer needs of a Mixture-of-Experts model: the shape of its routing."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from placer.errors import PlacerError, UsageError
from placer.model.architecture import Architecture
from placer.model.config_file import read_config, tensor_names
from placer.model.held_experts import held_experts
from placer.run.documents import Count, Document, NumExperts, Sha256, Size, TopK
from placer.run.files import canonical_json, sha256_json

#: Logical experts are named by at most 15 bits in a trace.
MAX_EXPERTS = 2**15


class ModelSpec(Document, frozen=True, kw_only=True):
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
    fingerprint: Sha256 | None = None
    layer_ids: tuple[Count, ...] | None = None
    num_experts: tuple[NumExperts, ...]
    top_k: TopK
    hidden_size: Size | None = None
    vocab_size: Size | None = None
    n_group: Size = 1
    topk_group: Size = 1

    def __post_init__(self) -> None:
        if not self.num_experts or min(self.num_experts) < 1:
            raise PlacerError(f"num_experts must be positive, got {self.num_experts}")
        if not (1 if self.bound else 0) <= self.top_k <= min(self.num_experts):
            raise PlacerError(
                f"top_k must be in 1..{min(self.num_experts)} "
                f"(the experts of the smallest layer), got {self.top_k}"
            )
        if max(self.num_experts) > MAX_EXPERTS:
            raise PlacerError(
                f"a layer has {max(self.num_experts)} experts; placer supports at most "
                f"{MAX_EXPERTS}",
                "check that the file holds expert ids, not token ids",
            )
        if self.layer_ids is not None and len(self.layer_ids) != self.num_layers:
            raise PlacerError(
                f"{len(self.layer_ids)} layer_ids for {self.num_layers} MoE layers"
            )
        if self.bound and self.fingerprint != self.bound_fingerprint():
            raise PlacerError(
                f"the model's fingerprint is {str(self.fingerprint)[:12]}, but that of its "
                f"fields is {self.bound_fingerprint()[:12]}: they were edited",
                "use an unchanged copy of the file, or make it again",
            )

    @property
    def num_layers(self) -> int:
        """Number of MoE layers, L."""
        return len(self.num_experts)

    @property
    def bound(self) -> bool:
        """Whether this specification comes from a checkpoint's config."""
        return self.fingerprint is not None

    def without_layers(self, layers: Collection[int]) -> Self:
        """Return the same model without some MoE layers, by their own numbers.

        Raises
        ------
        UsageError
            If one is not an MoE layer of it, or none is left.
        """
        ids = self.layer_ids or ()
        odd = sorted(set(layers) - set(ids))
        if odd or len(set(layers)) == len(ids):
            raise UsageError(
                f"layer {odd[0]} is not an MoE layer" if odd else "no MoE layer is left",
                f"the model's MoE layers are {', '.join(map(str, ids))}",
            )
        kept = [n for n, layer in enumerate(ids) if layer not in layers]
        part = msgspec.structs.replace(
            self,
            fingerprint=None,
            layer_ids=tuple(ids[n] for n in kept),
            num_experts=tuple(self.num_experts[n] for n in kept),
        )
        return msgspec.structs.replace(part, fingerprint=part.bound_fingerprint())

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

    @classmethod
    def from_checkpoint(cls, directory: Path) -> Self:
        """Read the specification from a Hugging Face directory's ``config.json``.

        Raises
        ------
        PlacerError
            If the directory has no config, or its family is not known.
        """
        config = read_config(directory)
        try:
            return cls._from_config(config, directory)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise PlacerError(
                f"{directory}: config.json cannot be read: {type(error).__name__}: {error}",
                "check that config.json is that of the model",
            ) from error

    @classmethod
    def _from_config(cls, config: Mapping[str, Any], directory: Path) -> Self:
        architecture = Architecture.of(config, directory)
        layer_ids = architecture.moe_layers(config)
        num_experts = architecture.experts_per_layer(config, layer_ids)
        if not layer_ids:
            raise PlacerError(f"{directory} has no MoE layer, by its config.json")
        names = tensor_names(directory)
        if architecture.layout is not None and names:
            _require_layers(directory, architecture, config, layer_ids, names)
            num_experts = held_experts(
                directory, architecture.layout, names, layer_ids, num_experts
            )
        n_group, topk_group = architecture.router_groups(config)
        if any(size % n_group for size in num_experts):
            raise PlacerError(
                f"{directory}: {n_group} router groups do not divide "
                f"{num_experts[0]} experts",
                "check that config.json is that of the model",
            )
        unbound = cls(
            id=(
                directory.resolve().parent if directory.is_file() else directory.resolve()
            ).name,
            model_type=config["model_type"],
            layer_ids=tuple(layer_ids),
            num_experts=num_experts,
            top_k=architecture.config_value(config, "top_k"),
            hidden_size=architecture.config_value(config, "hidden_size"),
            vocab_size=architecture.config_value(config, "vocab_size"),
            n_group=n_group,
            topk_group=topk_group,
        )
        return msgspec.structs.replace(unbound, fingerprint=unbound.bound_fingerprint())


def _require_layers(
    directory: Path,
    architecture: Architecture,
    config: Mapping[str, Any],
    layer_ids: Sequence[int],
    names: Collection[str],
) -> None:
    """Refuse a config whose MoE layers are not those with a router among the tensors."""
    layout = architecture.require_layout()
    num_layers = architecture.num_hidden_layers(config)
    found = [n for n in range(num_layers) if layout.has_router(n, names)]
    if found and found != list(layer_ids):
        odd = min(set(found) ^ set(layer_ids))
        has = "has a router" if odd in found else "has no router"
        raise PlacerError(
            f"{directory}: layer {odd} {has} among the tensors, but by config.json it is "
            f"{'a dense' if odd in found else 'an MoE'} layer",
            "fetch the checkpoint again, or check its config.json",
        )


def expert_size(directory: Path) -> int:
    """Return the width of a routed expert, from a Hugging Face ``config.json``.

    Raises
    ------
    PlacerError
        If there is no config, its family is not known, or it does not say.
    """
    config = read_config(directory)
    return Architecture.of(config, directory).config_value(config, "expert_size")


def require_same_model(
    one: ModelSpec, one_name: str, other: ModelSpec, other_name: str
) -> str | None:
    """Refuse to combine files of two models.

    Returns
    -------
    str or None
        A warning where only shapes were compared, because a side is not bound.

    Raises
    ------
    UsageError
        If fingerprints, shapes, or the model's own numbers of MoE layers differ.
    """
    for larger, smaller, name in ((one, other, other_name), (other, one, one_name)):
        lacking = _layers_lacking(larger, smaller)
        if lacking:
            layers = ", ".join(map(str, lacking))
            raise UsageError(
                f"{one_name} and {other_name} are of one model, but {name} lacks its MoE "
                f"layers {layers}: they were not recorded, or left out at import",
                "import the other file again without these layers: --skip-layers "
                f"{layers.replace(' ', '')}. Or solve on the trace that lacks them: maps "
                "and checkpoints of such a plan have all layers",
            )
    for field in ("num_experts", "top_k"):
        left, right = getattr(one, field), getattr(other, field)
        if left != right and left and right:
            raise UsageError(
                f"{one_name} and {other_name} are of different models: "
                f"{field} {_brief(left)} against {_brief(right)}",
                f"look at both: placer inspect {one_name}; placer inspect {other_name}",
            )
    pairs = zip(one.layer_ids or (), other.layer_ids or (), strict=False)
    odd = next(((left, right) for left, right in pairs if left != right), None)
    if odd is not None and not (one.bound and other.bound):
        raise UsageError(
            f"{one_name} and {other_name} are of different models: where one has layer "
            f"{odd[0]}, the other has layer {odd[1]}",
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
        f"{one_name} and {other_name} match by shape only: one of them is not bound to a "
        "checkpoint"
    )


def _layers_lacking(larger: ModelSpec, smaller: ModelSpec) -> list[int]:
    """Return the layers by which the larger model exceeds the smaller; none if they differ.

    Both must be bound to a checkpoint: layers are compared by the model's own numbers.
    """
    if not (larger.bound and smaller.bound):
        return []
    kept = {*(smaller.layer_ids or ())}
    lacking = [layer for layer in larger.layer_ids or () if layer not in kept]
    if not lacking or len(lacking) == larger.num_layers:
        return []
    part = larger.without_layers(lacking)
    return lacking if part.fingerprint == smaller.fingerprint else []


def common_model(models: Iterable[ModelSpec]) -> ModelSpec:
    """Return what one file of several says of their model, in any order.

    If only some files are bound to a checkpoint, the result is not bound.
    """
    return min(models, key=lambda one: (one.bound, canonical_json(one.to_json())))


def _brief(value: object) -> str:
    """Shorten the expert counts of a uniform model to one figure."""
    if isinstance(value, tuple) and len(set(value)) == 1:
        return f"{value[0]} x {len(value)} layers"
    return str(value)
