"""Giving each rank its experts, in a transformers model that is loaded as a whole."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from placer.errors import PlacerError
from placer.model import Architecture, ModelSpec

Tensor = torch.Tensor
#: What replaces the experts' forward: hidden states [n, H], logical ids and weights
#: [n, k], to weighted sums [n, H].
ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertsModule:
    """The experts of one MoE layer.

    Attributes
    ----------
    layer
        MoE layer, from 0.
    path
        Name of the module in the model.
    module
        The module, which transformers calls with hidden states, ids and weights.
    """

    layer: int
    path: str
    module: Any

    @contextmanager
    def holding(self, slots: Sequence[int]) -> Iterator[None]:
        """Let the module hold these logical experts only, in this order, for the block.

        Ids are then places in ``slots``; an id of ``len(slots)`` is served elsewhere.
        """
        whole, module = dict(self.module.named_parameters(recurse=False)), self.module
        before = module.num_experts
        chosen = torch.tensor(slots)
        for name, tensor in whole.items():
            mine = tensor.data.index_select(0, chosen.to(tensor.device))
            setattr(module, name, nn.Parameter(mine, requires_grad=False))
        module.num_experts, module._is_expert_parallel = len(slots), True
        try:
            yield
        finally:
            for name, tensor in whole.items():
                setattr(module, name, tensor)
            module.num_experts, module._is_expert_parallel = before, False

    @contextmanager
    def computing(self, forward: ExpertsForward) -> Iterator[None]:
        """Let calls of the module be calls of ``forward`` for the block."""
        before = self.module.forward
        self.module.forward = forward
        try:
            yield
        finally:
            self.module.forward = before


def experts_modules(
    model: nn.Module, architecture: Architecture, spec: ModelSpec
) -> list[ExpertsModule]:
    """Find the experts of all MoE layers.

    Raises
    ------
    PlacerError
        If the family keeps experts in a way that transformers cannot serve from shards.
    """
    found = []
    for layer, number in enumerate(spec.layer_ids or ()):
        path = architecture.experts_module.format(layer=number)
        module = model.get_submodule(path)
        tensors = list(module.parameters())
        fused = all(len(tensor) == spec.num_experts[layer] for tensor in tensors)
        if architecture.scores_module or not hasattr(module, "num_experts") or not fused:
            raise PlacerError(
                f"{architecture.model_types[0]} cannot be replayed: transformers does not "
                f"serve {path} from shards",
                "count on a trace instead: placer simulate PLAN TRACE",
            )
        found.append(ExpertsModule(layer=layer, path=path, module=module))
    return found
