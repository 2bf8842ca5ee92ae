"""The homes of some tokens, layer by layer, as a runtime finds them in a table."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.errors import PlacerError
from placer.simulation.homes import Batches
from placer.simulation.serving import RankArray, majority_rank
from placer.table.lookup import LayerTable, equal_homes, known_ids
from placer.table.table import Table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CombinedHomes:
    """What the combined rule says of a layer.

    Attributes
    ----------
    home, confidence
        ``[T]``: its choice as it is, and the expected local activation rate there.
    scores
        ``[T, R]`` float32: the expected rate of every home.
    """

    home: RankArray
    confidence: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]

    def equal(self, batches: Batches) -> RankArray:
        """Return ``[T]`` homes, equally many tokens of a batch on every rank."""
        return equal_homes(
            self.home, self.confidence, self.scores.shape[1], batches, self.scores
        )


class TableHomes:
    """Looks tokens up in a table, and remembers where they were served.

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
        self._past_experts: list[npt.NDArray[np.integer]] = []

    def of(self, layer: int) -> tuple[RankArray, npt.NDArray[np.float32]]:
        """Return ``[T]`` homes and confidences: the table's choice as it is."""
        rows = LayerTable.of(self.table, layer)
        return rows.homes(self.ids, self._history, self._fallback)

    def equal(self, layer: int, batches: Batches) -> RankArray:
        """Return ``[T]`` homes, equally many tokens of a batch on every rank."""
        home, confidence = self.of(layer)
        score = self.table.token_score
        if score is not None:
            score = score[layer][np.maximum(self.ids, 0)].astype(np.float32)
        return equal_homes(home, confidence, self.table.num_ranks, batches, score)

    def combined(self, layer: int) -> CombinedHomes:
        """Return the choice of the combined rule.

        Raises
        ------
        PlacerError
            If the table has none.
        """
        table = self.table
        if table.combined is None or table.token_score is None:
            raise PlacerError(
                "the table has no combined rule",
                "write it with one: placer tables PLAN TRACE --combined --out TABLE",
            )
        scores = table.combined.scores(
            layer, table.token_score[layer], self.ids, self._past_experts
        )
        home, confidence = table.combined.homes(layer, scores)
        return CombinedHomes(home=home, confidence=confidence, scores=scores)

    def best_equal(self, layer: int, batches: Batches) -> RankArray:
        """Return ``[T]`` homes in equal slices, by the combined rule where there is one."""
        if self.table.combined is None:
            return self.equal(layer, batches)
        return self.combined(layer).equal(batches)

    def served(self, ranks: RankArray, experts: npt.NDArray[np.integer]) -> None:
        """Take note of how a layer was served.

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
