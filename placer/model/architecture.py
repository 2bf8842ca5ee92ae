"""How a family of models is laid out.

Families are data: one file of ``placer/model/architectures`` each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from placer.errors import PlacerError
from placer.model.family_file import FamilyFile
from placer.model.moe_layers import LayerRule, block_types, moe_layers
from placer.model.tensor_layout import TensorLayout
from placer.run.documents import parse_toml, validated

# More than any model has.
_MOST_LAYERS = 10_000
# Where models for images or sound keep the config of their language model, and what its
# tensors are below (sglang 0.5.23: srt/utils/hf_transformers/common.py,
# get_hf_text_config; srt/models/internvl.py, interns1.py, deepseek_vl2.py, minicpmv.py,
# deepseek_ocr.py, whose language model has its own names).
_LANGUAGE_KEYS = ("llm_config", "language_config", "text_config")
_LANGUAGE_ROOTS = ("language_model.", "model.language_model.", "language.", "llm.", "")


def _all_alike(values: list[Any]) -> bool:
    return bool(values) and values.count(values[0]) == len(values)


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
        """Return the family of a config; ``source`` names it in the error.

        Raises
        ------
        PlacerError
            If placer does not know or support the family.
        """
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
        named = repr(model_type)
        for key in _LANGUAGE_KEYS:
            inner = config.get(key)
            if not isinstance(inner, dict):
                continue
            if "model_type" not in inner:
                named += f", whose {key} has no model_type,"
                continue
            if inner["model_type"] in known:
                return cls.of(inner, source)._below(str(model_type), key)
            named += f", with {inner['model_type']!r} in its {key},"
        raise PlacerError(
            f"{source}: model_type {named} is not a family that placer supports",
            f"known families: {', '.join(sorted(known))}",
        )

    def _below(self, model_type: str, key: str) -> "Architecture":
        """Return the family of a model whose language model is of this family.

        Its config stands below ``key``, and its tensors below one of the usual names.
        """
        layout = self.layout
        return replace(
            self,
            model_types=(model_type,),
            unrecorded="placer runs language models only, not models around one",
            nested_in=key,
            layout=None if layout is None else layout.below(_LANGUAGE_ROOTS),
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
                "export a runtime map instead, which needs no tensors: placer export "
                "sglang PLAN MODEL --out map.json",
            )
        return self.layout

    def config_value(
        self, config: Mapping[str, Any], field: str, default: int | None = None
    ) -> int:
        """Return the first of the family's keys for ``field`` that the config has.

        Raises
        ------
        PlacerError
            If it has none and there is no default, or the value is not a whole number.
        """
        keys = self.config[field]
        value = self._value(config, field)
        if value is None:
            value = default
        if isinstance(value, list) and _all_alike(value):  # one for each layer
            value = value[0]
        if type(value) is not int or abs(value) >= 1 << 31:
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
        """Return the number of hidden layers, dense ones included.

        Raises
        ------
        PlacerError
            If the config gives no valid number.
        """
        if self.layers == "layers_block_type":
            return len(block_types(self._language_config(config)))
        number = self.config_value(config, "num_layers")
        if number > _MOST_LAYERS:
            raise PlacerError(
                f"config.json gives {number} hidden layers, more than {_MOST_LAYERS}",
                "check that config.json is that of the model",
            )
        return number

    def moe_layers(self, config: Mapping[str, Any]) -> list[int]:
        """Return the model's own numbers of its MoE layers, ascending.

        The rules are in :func:`placer.model.moe_layers.moe_layers`.
        """
        num_layers = self.num_hidden_layers(config)
        return moe_layers(self.layers, self._language_config(config), num_layers)

    def experts_per_layer(
        self, config: Mapping[str, Any], layer_ids: Sequence[int]
    ) -> tuple[int, ...]:
        """Return ``[L]``: logical experts of each MoE layer.

        A list in the config is of the MoE layers, or of all layers.

        Raises
        ------
        PlacerError
            If the model is dense, or a list has another length.
        """
        keys = self.config["num_experts"]
        value = self._value(config, "num_experts")
        if value is None or value == 0:
            raise PlacerError(
                f"{config.get('model_type')} with {value!r} for {' or '.join(keys)} in its "
                "config.json is a dense model: there are no experts to place",
                "give a Mixture-of-Experts model",
            )
        if isinstance(value, list) and value and not _all_alike(value):
            sizes = value
            if len(value) == self.num_hidden_layers(config):
                sizes = [value[layer] for layer in layer_ids]
            if len(sizes) != len(layer_ids) or not all(type(n) is int for n in sizes):
                raise PlacerError(
                    f"config.json gives {len(value)} numbers of experts for "
                    f"{len(layer_ids)} MoE layers",
                    "check that config.json is that of the model",
                )
            return tuple(sizes)
        return (self.config_value(config, "num_experts"),) * len(layer_ids)

    def router_groups(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return ``n_group`` and ``topk_group``; 1 and 1 where the router limits nothing.

        It limits nothing with one group or none, or where a token may use all of them.
        """
        if not self.is_grouped(config):
            return 1, 1
        n_group = self.config_value(config, "n_group", 1)
        topk_group = self.config_value(config, "topk_group", 1)
        return (n_group, topk_group) if n_group > max(topk_group, 1) else (1, 1)

    def mtp_layers(self, config: Mapping[str, Any]) -> range:
        """Return the numbers of layers after the last one, for multi-token prediction."""
        first = self.num_hidden_layers(config)
        return range(first, first + self.config_value(config, "num_mtp_layers", 0))

    def hash_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the numbers of MoE layers that look experts up by token id.

        As DeepSeek-V4 names them: ``num_hash_layers``, or ``hash_moe`` in
        ``mlp_layer_types``.
        """
        language = self._language_config(config)
        first = self.config_value(config, "num_hash_layers", 0)
        kinds = language.get("mlp_layer_types") or ()
        return tuple(
            layer
            for layer in self.moe_layers(config)
            if layer < first or kinds[layer : layer + 1] == ["hash_moe"]
        )

    def _value(self, config: Mapping[str, Any], field: str) -> Any:
        language = self._language_config(config)
        found = (_nested(language, key) for key in self.config[field])
        return next((value for value in found if value is not None), None)

    def _language_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        nested = config.get(self.nested_in) if self.nested_in else None
        return nested if isinstance(nested, dict) else config


def _nested(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


@cache
def known_architectures() -> tuple[Architecture, ...]:
    """Return all families, from the data files, by file name.

    Raises
    ------
    PlacerError
        If a file has a field that is unknown, missing, or not what it must be.
    """
    folder = resources.files("placer.model") / "architectures"
    files = sorted(
        (f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name
    )
    return tuple(read_architecture(f.read_bytes(), f.name) for f in files)


def read_architecture(text: bytes, name: str) -> Architecture:
    """Return the family of a data file; ``name`` is the file's, for errors.

    Raises
    ------
    PlacerError
        With the field, its value, and what is allowed.
    """
    read = validated(
        parse_toml(text, name),
        FamilyFile,
        name,
        f"correct placer/model/architectures/{name}",
        complete=False,
    )
    return Architecture(
        model_types=read.model_types,
        unsupported=read.unsupported,
        unrecorded=read.unrecorded,
        config=read.config.keys(),
        nested_in=read.config.nested_in,
        layers=read.config.layers,
        grouped_if=read.config.grouped_if,
        experts_module=read.modules.experts,
        scores_module=read.modules.scores,
        router_module=read.modules.router,
        layout=None if read.tensors is None else TensorLayout.of(read.tensors),
    )
