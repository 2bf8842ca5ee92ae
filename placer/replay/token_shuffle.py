"""The homes of a batch that all ranks share, from a token-shuffle table."""

from typing import Any

import numpy as np
import torch
from torch import nn

from placer.errors import PlacerError
from placer.placement.placement import Placement
from placer.serving.homes import Batches
from placer.table.homes import TableHomes
from placer.table.table import Table
from placer.trace.capture import by_descending_weight


class _BatchHomes:
    """The homes of one batch, looked up with NumPy, on whatever device its tokens are."""

    def __init__(self, table: Table, ids: torch.Tensor, fallback: torch.Tensor) -> None:
        self._device = ids.device
        self._homes = TableHomes(table, ids.cpu().numpy(), fallback.cpu().numpy())
        size = len(ids)
        self._whole = Batches(
            order=np.arange(size), batch_of_token=np.zeros(size, dtype=np.int64), size=size
        )

    def equal(self, layer: int) -> torch.Tensor:
        even = self._homes.best(layer).equal(self._whole)
        return torch.from_numpy(even.astype(np.int64)).to(self._device)

    def served(self, ranks: torch.Tensor, experts: torch.Tensor) -> None:
        self._homes.served(ranks.T.cpu().numpy(), experts.T.cpu().numpy())


class TokenShuffle:
    """Follows the forward passes of a model, and says where each token should be served.

    Every rank computes the same, so nothing has to be sent.

    Parameters
    ----------
    table
        The plan's table.
    placement
        What turns the slots that an exchange sees into logical experts, which a combined
        rule needs; ``None`` where the slots are the logical experts.
    """

    def __init__(self, table: Table, placement: Placement | None = None) -> None:
        self.table = table
        self._placement = placement
        self._num_layers = 0
        self._homes: _BatchHomes | None = None

    def watch(self, model: nn.Module) -> "torch.utils.hooks.RemovableHandle":
        """Begin again with each forward pass of a transformers model."""
        return model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(
        self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        ids = named.get("input_ids", inputs[0] if inputs else None)
        if ids is None:
            raise PlacerError(
                "the model is called without input_ids, which the token shuffle needs",
                "call model(input_ids=...)",
            )
        rows, length = ids.shape
        fixed = torch.arange(rows, device=ids.device) % self.table.num_ranks
        fallback = fixed.repeat_interleave(length)
        self._homes = _BatchHomes(self.table, ids.reshape(-1), fallback)

    def add_layer(self) -> int:
        """Return the number of the next MoE layer, from 0.

        Raises
        ------
        PlacerError
            If the table has no more layers.
        """
        if self._num_layers == len(self.table.token_rank):
            raise PlacerError(
                f"the model has more MoE layers than the table, {self._num_layers}",
                "give each model its own TokenShuffle, with the table of its plan",
            )
        self._num_layers += 1
        return self._num_layers - 1

    def homes(
        self,
        layer: int,
        slots: torch.Tensor,
        ranks: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the rank of every token, equally many tokens on each.

        Parameters
        ----------
        layer
            MoE layer, from 0; layers are asked in order.
        slots, ranks, weights
            ``[T, k]``: the slots and ranks that serve a token in this layer, and the
            routing weights: they predict later layers.

        Returns
        -------
        Tensor
            ``[T]`` int64.

        Raises
        ------
        PlacerError
            If no model is watched, or slots cannot be mapped to logical experts.
        """
        if self._homes is None:
            raise PlacerError(
                "the token shuffle has seen no forward pass", "call shuffle.watch(model)"
            )
        even = self._homes.equal(layer)
        experts = self._logical(layer, slots, ranks)
        by_weight, _ = by_descending_weight(ranks, weights)
        chosen, _ = by_descending_weight(experts, weights)
        self._homes.served(by_weight, chosen)
        return even

    def _logical(
        self, layer: int, slots: torch.Tensor, ranks: torch.Tensor
    ) -> torch.Tensor:
        if self._placement is not None:
            row = torch.from_numpy(self._placement.physical_to_logical_map[layer])
            return row.to(slots.device)[slots]
        if self.table.combined is not None:
            expert_rank = torch.from_numpy(self.table.expert_rank[layer].astype(np.int64))
            expert_rank = expert_rank.to(slots.device)
            if slots.max() >= len(expert_rank) or (expert_rank[slots] != ranks).any():
                raise PlacerError(
                    "the combined rule of the table needs logical experts, and the "
                    "model's slots have other numbers",
                    "give the plan's placement: TokenShuffle(table, placement)",
                )
        return slots
