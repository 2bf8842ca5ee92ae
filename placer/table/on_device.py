"""Looking tokens up with torch, where they are: the homes that NumPy finds, on any device.

Nothing is copied to the host and nothing waits for the device. Every number is the one of
:mod:`placer.table.homes`, bit for bit: sums are made in the same order by one operation
each, and of equal choices the first is taken. So ranks that look up the same tokens agree,
and a run sends what was simulated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from placer.arrays import AnyArray
from placer.table.table import Table

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceRule:
    """The combined rule on a device: see :class:`placer.shuffle.CombinedRule`."""

    token_weight: Tensor
    unknown_score: Tensor
    combined_bias: Tensor
    expert_score: Tensor
    home_price: Tensor

    def scores(self, layer: int, token_rows: Tensor, past: Sequence[Tensor]) -> Tensor:
        """Return ``[T, R]`` float32: the expected local activation rate of every home.

        Parameters
        ----------
        layer
            MoE layer, from 0.
        token_rows
            ``[T, R]`` float32: a token's rates.
        past
            ``[T, k]`` int64 logical experts of each past layer, the oldest first.
        """
        total = token_rows * self.token_weight[layer]
        total += self.combined_bias[layer]
        by_layer = self.expert_score[layer]
        for added, experts in zip(by_layer, reversed(past), strict=False):
            rows = added.float()[experts]
            even = experts.shape[1] // 2 * 2
            for pair in (rows[:, 0:even:2] + rows[:, 1:even:2]).unbind(dim=1):
                total += pair
            for single in rows[:, even:].unbind(dim=1):
                total += single
        return total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceTable:
    """A table's rows on a device: see :class:`placer.table.table.Table`.

    Ranks are int32 here, since torch does not index uint16 everywhere.
    """

    num_ranks: int
    lookback: int
    token_rank: Tensor
    token_confidence: Tensor
    history_rank: Tensor
    history_confidence: Tensor
    token_score: Tensor | None
    rule: DeviceRule | None

    @classmethod
    def of(cls, table: Table, device: torch.device) -> Self:
        """Copy a table to a device."""

        def sent(values: AnyArray) -> Tensor:
            if np.issubdtype(values.dtype, np.integer):
                values = values.astype(np.int32)
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        rule = table.combined
        return cls(
            num_ranks=table.num_ranks,
            lookback=table.lookback,
            token_rank=sent(table.token_rank),
            token_confidence=sent(table.token_confidence),
            history_rank=sent(table.history_rank),
            history_confidence=sent(table.history_confidence),
            token_score=None if table.token_score is None else sent(table.token_score),
            rule=None
            if rule is None
            else DeviceRule(
                token_weight=sent(rule.token_weight),
                unknown_score=sent(rule.unknown_score),
                combined_bias=sent(rule.combined_bias),
                expert_score=sent(rule.expert_score),
                home_price=sent(rule.home_price),
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceChoice:
    """What a rule says of the tokens of a layer.

    Attributes
    ----------
    home
        ``[T]`` int64 ranks.
    confidence
        ``[T]`` float32: the expected local activation rate there; -1 for the fallback.
    scores
        ``[T, R]`` float32: the expected rate of every home, or ``None``.
    num_ranks
        R.
    """

    home: Tensor
    confidence: Tensor
    scores: Tensor | None
    num_ranks: int

    def equal(self) -> Tensor:
        """Return ``[T]`` int64 homes, equally many tokens on every rank.

        The tokens are one batch; the choices are those of
        :func:`placer.table.lookup.equal_homes`.
        """
        num_tokens = len(self.home)
        ranks = torch.arange(self.num_ranks, device=self.home.device)
        slots = num_tokens // self.num_ranks + (ranks < num_tokens % self.num_ranks)
        most_certain = torch.argsort(self.confidence, descending=True, stable=True)
        wanted = self.home[most_certain]
        granted = torch.empty_like(wanted, dtype=torch.bool)
        granted[most_certain] = _turn(wanted, ranks) <= slots[wanted]
        free = slots - ((self.home[:, None] == ranks) & granted[:, None]).sum(dim=0)
        if self.scores is None:
            second = _slots_in_order(free, ~granted)
        else:
            second = _second_choices(self.scores, free, ~granted)
        return torch.where(granted, self.home, second)


def _turn(choice: Tensor, ranks: Tensor, *, among: Tensor | None = None) -> Tensor:
    """Return ``[T]`` int64: the how manieth token (``among`` some) has the same choice."""
    same = choice[:, None] == ranks
    if among is not None:
        same &= among[:, None]
    return same.cumsum(dim=0).gather(1, choice[:, None])[:, 0]


def _slots_in_order(free: Tensor, rest: Tensor) -> Tensor:
    """Give the tokens of ``rest`` ``[T]`` the free slots in the order of the ranks."""
    number = rest.cumsum(dim=0) - 1
    return (number[:, None] >= free.cumsum(dim=0)).sum(dim=1).clamp_(max=len(free) - 1)


def _second_choices(scores: Tensor, free: Tensor, rest: Tensor) -> Tensor:
    """Give the tokens of ``rest``, the best score first, the free rank that each prefers.

    All choices up to a rank's last slot are made at once. Each round fills a rank or ends,
    so that R rounds are enough; to ask whether fewer are would wait for the device.
    """
    ranks = torch.arange(len(free), device=free.device)
    best_score = scores.amax(dim=1).clamp(min=0)
    order = torch.argsort(
        torch.where(rest, -best_score, torch.inf), descending=False, stable=True
    )
    left, scores = rest[order], scores[order]
    number = torch.arange(len(rest), device=free.device)
    chosen = torch.zeros_like(number)
    for _ in ranks:
        best = torch.where(free > 0, scores, -torch.inf).argmax(dim=1)
        last = left & (_turn(best, ranks, among=left) == free[best])
        stop = torch.where(last, number, len(number)).amin()
        now = left & (number <= stop)
        chosen = torch.where(now, best, chosen)
        free = free - ((best[:, None] == ranks) & now[:, None]).sum(dim=0)
        left = left & ~now
    result = torch.empty_like(chosen)
    result[order] = chosen
    return result


class DeviceHomes:
    """Looks the tokens of a batch up, layer by layer, and remembers how they were served.

    Parameters
    ----------
    table
        The table of the placement, on the device of the tokens.
    token_ids
        ``[T]`` whole numbers; those outside the table are unknown.
    fallback
        ``[T]`` int64: home of an unknown token without history.
    """

    def __init__(self, table: DeviceTable, token_ids: Tensor, fallback: Tensor) -> None:
        self.table = table
        self._known = (token_ids >= 0) & (token_ids < table.token_rank.shape[1])
        self._ids = torch.where(self._known, token_ids, 0).to(torch.int64)
        self._fallback = fallback
        self._history: list[Tensor] = []
        self._past_experts: list[Tensor] = []

    def plain(self, layer: int) -> DeviceChoice:
        """Return the choice of the plain rule: the surer of token and history."""
        table = self.table
        home = torch.where(
            self._known, table.token_rank[layer][self._ids].long(), self._fallback
        )
        confidence = torch.where(
            self._known, table.token_confidence[layer][self._ids].float(), -1.0
        )
        if 0 < table.lookback <= len(self._history):
            index = torch.zeros_like(self._ids)
            for ranks in self._history[-table.lookback :]:
                index = index * table.num_ranks + ranks
            sure = table.history_confidence[layer][index].float()
            surer = sure > confidence
            home = torch.where(surer, table.history_rank[layer][index].long(), home)
            confidence = torch.where(surer, sure, confidence)
        return self._choice(home, confidence, self._token_rows(layer))

    def best(self, layer: int) -> DeviceChoice:
        """Return the choice of the combined rule, of the plain one where there is none.

        The first layer has no past, and keeps the plain rule.
        """
        rule, rows = self.table.rule, self._token_rows(layer)
        if layer == 0 or rule is None or rows is None:
            return self.plain(layer)
        unknown = rule.unknown_score[layer].float()
        rows = torch.where(self._known[:, None], rows, unknown)
        scores = rule.scores(layer, rows, self._past_experts)
        home = (scores - rule.home_price[layer]).argmax(dim=1)
        return self._choice(home, scores.gather(1, home[:, None])[:, 0], scores)

    def equal(self, layer: int) -> Tensor:
        """Return ``[T]`` int64: :meth:`best`, equally many tokens on every rank."""
        return self.best(layer).equal()

    def _token_rows(self, layer: int) -> Tensor | None:
        scores = self.table.token_score
        return None if scores is None else scores[layer][self._ids].float()

    def _choice(
        self, home: Tensor, confidence: Tensor, scores: Tensor | None
    ) -> DeviceChoice:
        return DeviceChoice(
            home=home,
            confidence=confidence,
            scores=scores,
            num_ranks=self.table.num_ranks,
        )

    def served(self, ranks: Tensor, experts: Tensor) -> None:
        """Take note of how a layer was served.

        Parameters
        ----------
        ranks, experts
            ``[T, k]`` int64: the ranks that served and the logical experts, by descending
            router weight.
        """
        lookback = self.table.lookback
        self._history.append(majority_rank(ranks))
        self._history = self._history[max(0, len(self._history) - lookback) :]
        if self.table.rule is not None:
            depth = self.table.rule.expert_score.shape[1]
            self._past_experts = [*self._past_experts, experts][-depth:]


def majority_rank(ranks: Tensor) -> Tensor:
    """Return ``[T]``: of ranks ``[T, k]`` the most frequent, of equal ones the first."""
    votes = (ranks[:, :, None] == ranks[:, None, :]).sum(dim=2)
    return ranks.gather(1, votes.argmax(dim=1, keepdim=True))[:, 0]
