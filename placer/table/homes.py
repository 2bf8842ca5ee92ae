"""The homes of some tokens, layer by layer, as a runtime finds them in a table."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.arrays import Float32Array
from placer.serving.homes import Batches
from placer.serving.layer_serving import RankArray, majority_rank
from placer.table.lookup import LayerTable, equal_homes, known_ids
from placer.table.table import Table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HomeChoice:
    """The choice of a rule in one layer.

    Attributes
    ----------
    home, confidence
        ``[T]``: its choice as it is, and the expected local activation rate there.
    scores
        ``[T, R]`` float32: the expected rate of every home, or ``None``.
    num_ranks
        R.
    """

    home: RankArray
    confidence: Float32Array
    scores: Float32Array | None
    num_ranks: int

    def equal(self, batches: Batches) -> RankArray:
        """Return ``[T]`` homes, equally many tokens of a batch on every rank."""
        return equal_homes(self.home, self.confidence, self.num_ranks, batches, self.scores)


class TableHomes:
    """Looks tokens up in a table, and remembers how they were served.

    Parameters
    ----------
    table
        The table of the placement.
    token_ids
        ``[T]`` whole numbers; those outside the table, or ``None``, are unknown.
    fallback
        ``[T]``: home of an unknown token without history.
    """

    def __init__(
        self, table: Table, token_ids: npt.NDArray[np.integer] | None, fallback: RankArray
    ) -> None:
        self.table = table
        self.ids = known_ids(token_ids, len(fallback), table.vocab_size)
        self._fallback = fallback
        self._history: list[RankArray] = []
        self._past_experts: list[npt.NDArray[np.generic]] = []

    def plain(self, layer: int) -> HomeChoice:
        """Return the choice of the plain rule: by token or history, the more certain."""
        rows = LayerTable.of(self.table, layer)
        home, confidence = rows.homes(self.ids, self._history, self._fallback)
        scores = self.table.token_score
        if scores is not None:
            scores = scores[layer][np.maximum(self.ids, 0)].astype(np.float32)
        return HomeChoice(
            home=home,
            confidence=confidence,
            scores=scores,
            num_ranks=self.table.num_ranks,
        )

    def best(self, layer: int) -> HomeChoice:
        """Return the choice of the combined rule, or of the plain one if there is none.

        The first layer has no past, and keeps the plain rule.
        """
        rule, token_score = self.table.combined, self.table.token_score
        if layer == 0 or rule is None or token_score is None:
            return self.plain(layer)
        scores = rule.scores(layer, token_score[layer], self.ids, self._past_experts)
        home, confidence = rule.homes(layer, scores)
        return HomeChoice(
            home=home,
            confidence=confidence,
            scores=scores,
            num_ranks=self.table.num_ranks,
        )

    def served(self, ranks: RankArray, experts: npt.NDArray[np.generic]) -> None:
        """Record how a layer was served.

        Parameters
        ----------
        ranks, experts
            ``[k, T]``: the ranks that served and the logical experts, by descending
            router weight.
        """
        self._history.append(majority_rank(ranks))
        self._history = self._history[max(0, len(self._history) - self.table.lookback) :]
        if self.table.combined is not None:
            depth = self.table.combined.expert_score.shape[1]
            self._past_experts = [*self._past_experts, experts][-depth:]
