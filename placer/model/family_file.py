"""The content of a family's data file, ``placer/model/architectures/*.toml``."""

from typing import Annotated

import msgspec

from placer.model.moe_layers import LayerRule
from placer.run.documents import Document

Text = Annotated[str, msgspec.Meta(min_length=1)]
# Config keys, in order of preference.
Keys = Annotated[tuple[Text, ...], msgspec.Meta(min_length=1)]
# A name with the number of its layer in it.
OfLayer = Annotated[str, msgspec.Meta(pattern=r"\{layer\}")]
# A name with the number of its expert in it.
OfExpert = Annotated[str, msgspec.Meta(pattern=r"\{expert\}")]


class ConfigKeys(Document, frozen=True, kw_only=True):
    """The table ``config``: which keys of ``config.json`` mean what.

    Attributes
    ----------
    layers, nested_in, grouped_if
        As in :class:`placer.model.architecture.Architecture`.
    num_experts, top_k, num_layers, hidden_size, expert_size, vocab_size, n_group, \
topk_group, num_hash_layers, num_mtp_layers
        Keys of the value, in order of preference. The default is what most configs use.
    """

    layers: LayerRule = "all"
    nested_in: Text | None = None
    grouped_if: tuple[Text, Text] | None = None
    num_experts: Keys = ("num_experts", "num_local_experts", "n_routed_experts")
    top_k: Keys = ("num_experts_per_tok",)
    num_layers: Keys = ("num_hidden_layers",)
    hidden_size: Keys = ("hidden_size",)
    expert_size: Keys = (
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        "intermediate_size",
    )
    vocab_size: Keys = ("vocab_size",)
    n_group: Keys = ("n_group", "num_expert_group")
    topk_group: Keys = ("topk_group",)
    num_hash_layers: Keys = ("num_hash_layers",)
    num_mtp_layers: Keys = ("num_nextn_predict_layers", "mtp_num_hidden_layers")

    def keys(self) -> dict[str, tuple[str, ...]]:
        """Return the config keys by what they mean."""
        rules = ("layers", "nested_in", "grouped_if")
        names = (name for name in self.__struct_fields__ if name not in rules)
        return {name: getattr(self, name) for name in names}


class Modules(Document, frozen=True, kw_only=True):
    """The table ``modules``: paths of modules, as in ``Architecture``."""

    experts: OfLayer = "model.layers.{layer}.mlp.experts"
    scores: OfLayer | None = None
    router: OfLayer = "model.layers.{layer}.mlp.gate"


class Tensors(Document, frozen=True, kw_only=True):
    """The table ``tensors``: names in checkpoints, as in ``TensorLayout``.

    Attributes
    ----------
    block
        Names of MoE blocks.
    expert, fused, stacked, router, bias, table, rest
        Patterns below a block (:class:`placer.model.tensor_layout.TensorKind`).
    mtp
        Patterns of whole names.
    """

    block: Annotated[tuple[OfLayer, ...], msgspec.Meta(min_length=1)]
    expert: tuple[OfExpert, ...] = ()
    fused: tuple[Text, ...] = ()
    stacked: tuple[Text, ...] = ()
    router: tuple[Text, ...] = ()
    bias: tuple[Text, ...] = ()
    table: tuple[Text, ...] = ()
    rest: tuple[Text, ...] = ()
    mtp: tuple[Text, ...] = ()


class FamilyFile(Document, frozen=True, kw_only=True):
    """A whole file; each field as in :class:`placer.model.architecture.Architecture`."""

    model_types: Annotated[tuple[Text, ...], msgspec.Meta(min_length=1)]
    unsupported: Text | None = None
    unrecorded: Text | None = None
    config: ConfigKeys = ConfigKeys()
    modules: Modules = Modules()
    tensors: Tensors | None = None
