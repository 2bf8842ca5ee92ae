"""Where a family keeps experts and routers in a checkpoint: rules by name, as data.

A checkpoint is classified tensor by tensor. Everything below an MoE block must fit a rule;
what fits none is never guessed, because a tensor that depends on the order of experts and
is left where it was makes another model.
"""

import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from typing import Self

from placer.model.family_file import Tensors

# What names single experts or a bias of theirs; ``shared_experts`` are no routed ones.
NAMES_EXPERTS = re.compile(
    r"\bexperts?(?![a-z])|\b(?:e_score_)?correction_bias\b|\bexpert_bias\b|\brouter_bias"
)

# What quantisers write next to a weight of all experts; the experts come first in all of
# it. gpt-oss (MXFP4); ModelOpt (NVFP4, FP8); transformers 5 and its fbgemm_fp8 (FP8);
# compressed-tensors (its weight_packed and others, after a point or "_"); GPTQ; MLX.
_PARTS = (
    *("bias", "biases", "blocks", "scale", "scales", "scale_inv", "input_scale"),
    *("weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2"),
    *("weight_global_scale", "input_global_scale", "weight_zero_point", "weight_g_idx"),
    *("input_zero_point", "packed", "zero_point", "global_scale", "activation_scale"),
    *("qweight", "qzeros", "g_idx"),
)
# The shape of every expert's weight: alike for all.
_SHAPES = (".weight_shape", "_weight_shape", "_shape")
# The same of a router, one row per expert; qweight and qzeros of GPTQ have one column.
_ROUTER_PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2"),
    *("weight_global_scale", "input_scale", "input_global_scale", "scales", "biases"),
    *("weight_zero_point", "qweight", "qzeros", "bias"),
)
# What stands in place of a packed router's weight.
_PACKED = ("weight_packed", "qweight")
# MLX keeps all experts below these, for every family (mlx_lm/models/switch_layers.py).
_SWITCHES = ("switch_mlp.{name}", "switch_glu.{name}")


class TensorKind(StrEnum):
    """How a tensor depends on the order of the experts, and so what a plan changes in it.

    Attributes
    ----------
    EXPERT
        It belongs to one expert, whose number is in its name: it is renamed.
    FUSED
        It holds all experts along its first axis; a single number applies to all of them.
    STACKED
        It holds the rows of all experts one after the other, as many of each.
    ROUTER
        One row per expert, in every MoE layer.
    BIAS
        One number per expert: ``[E]`` or ``[1, E]``.
    TABLE
        Its values are numbers of experts.
    REST
        It does not depend on the order of experts.
    """

    EXPERT = "expert"
    FUSED = "fused"
    STACKED = "stacked"
    ROUTER = "router"
    BIAS = "bias"
    TABLE = "table"
    REST = "rest"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """What the name of a tensor says.

    Attributes
    ----------
    template
        The name, with ``{expert}`` for the number of its expert.
    kind
        The kind, or ``None`` if it is in an MoE block and no rule fits.
    layer
        The model's own number of its layer; ``None`` outside blocks.
    expert
        Number of its expert, or ``None``.
    """

    template: str
    kind: TensorKind | None
    layer: int | None
    expert: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLayout:
    """The names of a family's tensors.

    Attributes
    ----------
    blocks
        Names, with ``{layer}``, that MoE blocks have in checkpoints of the family.
    rules
        Per kind, patterns below a block; ``{expert}`` is a number, ``{name}`` anything.
    mtp
        Patterns of whole names, those of layers for multi-token prediction, which have
        experts and routers of their own that no plan moves.
    """

    blocks: tuple[str, ...]
    rules: Mapping[TensorKind, tuple[str, ...]]
    mtp: tuple[str, ...] = ()

    @classmethod
    def of(cls, tensors: Tensors) -> Self:
        """Return the layout that a family's data file names."""
        rules: dict[TensorKind, tuple[str, ...]]
        rules = {kind: getattr(tensors, kind) for kind in TensorKind}
        fused = [one.removesuffix(".weight") for one in rules[TensorKind.FUSED]]
        rules[TensorKind.FUSED] = (*(one + "{part}" for one in fused), *_SWITCHES)
        rules[TensorKind.REST] += tuple(one + part for one in fused for part in _SHAPES)
        stems = [one[:-6] for one in rules[TensorKind.ROUTER] if one.endswith("weight")]
        rules[TensorKind.ROUTER] += tuple(stem + "{router_part}" for stem in stems)
        rules[TensorKind.REST] += tuple(
            stem + part for stem in stems for part in ("weight_shape", "g_idx")
        )
        return cls(
            blocks=tensors.block,
            rules=rules,
            mtp=tensors.mtp,
        )

    def below(self, roots: Sequence[str]) -> Self:
        """Return the layout of a model whose language model is below one of the roots.

        The language model's own ``model.`` may be left out there.
        """
        own = [*self.blocks, *(block.removeprefix("model.") for block in self.blocks)]
        blocks = dict.fromkeys(root + block for root in roots for block in own)
        mtp = dict.fromkeys(root + one for root in ("", *roots) for one in self.mtp)
        return replace(self, blocks=tuple(blocks), mtp=tuple(mtp))

    def has_router(self, layer: int, names: Container[str]) -> bool:
        """Return whether the router of a layer is among the names of tensors."""
        return bool(self.router_names(layer, names, ("weight", *_PACKED)))

    def router_names(
        self, layer: int, names: Container[str], parts: Sequence[str] = ("weight",)
    ) -> list[str]:
        """Return the names of a layer's router that are among those of tensors."""
        return [
            name
            for block in self.blocks
            for template in self.rules[TensorKind.ROUTER]
            if template.endswith("weight")
            for part in parts
            for name in (
                f"{block.format(layer=layer)}.{template.removesuffix('weight')}{part}",
            )
            if name in names
        ]

    def blocks_held(self, layer: int, names: Container[str]) -> list[str]:
        """Return the blocks of which a layer's router is among the names of tensors."""
        return [
            block
            for block in self.blocks
            if replace(self, blocks=(block,)).has_router(layer, names)
        ]

    def classify(self, name: str) -> TensorPlace | None:
        """Say what a tensor is, ``None`` for one outside all MoE blocks."""
        if any(name_pattern(one).fullmatch(name) for one in self.mtp):
            return TensorPlace(template=name, kind=TensorKind.REST, layer=None)
        for block in self.blocks:
            found = name_pattern(block + ".{name}").fullmatch(name)
            if found is not None and _is_plain(found["layer"]):
                prefix = block.format(layer=found["layer"])
                return self._classify_below(prefix, int(found["layer"]), found["name"])
        return None

    def _classify_below(self, prefix: str, layer: int, name: str) -> TensorPlace:
        for kind, templates in self.rules.items():
            for template in templates:
                found = name_pattern(template).fullmatch(name)
                if found is None:
                    continue
                fields = found.groupdict()
                expert = fields.pop("expert", None)
                if expert is not None and not _is_plain(expert):
                    continue
                return TensorPlace(
                    template=f"{prefix}.{template.format(**fields, expert='{expert}')}",
                    kind=kind,
                    layer=layer,
                    expert=None if expert is None else int(expert),
                )
        return TensorPlace(template=f"{prefix}.{name}", kind=None, layer=layer)


@cache
def name_pattern(template: str) -> re.Pattern[str]:
    """Return the regular expression of a name template.

    ``{layer}`` and ``{expert}`` become groups of digits, ``{name}`` the rest of the name,
    ``{part}`` and ``{router_part}`` what quantisers put after a name.
    """
    escaped = re.escape(template)
    for field, expression in (
        ("layer", r"(?P<layer>\d+)"),
        ("expert", r"(?P<expert>\d+)"),
        ("name", r"(?P<name>.+)"),
        ("part", rf"(?P<part>(?:[._](?:{'|'.join(_PARTS)}))?)"),
        ("router_part", rf"(?P<router_part>{'|'.join(_ROUTER_PARTS)})"),
    ):
        escaped = escaped.replace(re.escape("{" + field + "}"), expression)
    return re.compile(escaped)


def _is_plain(digits: str) -> bool:
    """Whether a number is written as Python would write it, not as ``07``."""
    return digits == str(int(digits))


def is_of_all(kind: TensorKind | None, name: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor of all experts holds for each of them alike.

    One number does, and so does one row of scales: FP8 routers are quantised in blocks
    of 128 experts.
    """
    if kind not in (TensorKind.FUSED, TensorKind.ROUTER):
        return False
    of_block = kind is TensorKind.ROUTER and "scale" in name.rpartition(".")[2]
    return math.prod(shape) == 1 or (of_block and shape[0] == 1)


def has_columns(name: str, names: Container[str]) -> bool:
    """Return whether GPTQ wrote this tensor of a router: a column per expert, not a row.

    ``names`` are those of all tensors: only ``scales`` may also be MLX's, which are rows.
    """
    stem, _, part = name.rpartition(".")
    return part in ("qweight", "qzeros", "scales") and f"{stem}.qweight" in names
