"""The homes of some tokens, layer by layer, as a runtime finds them in a table."""

import numpy as np
import numpy.typing as npt

from placer.simulation.homes import Batches
from placer.simulation.serving import RankArray, majority_rank
from placer.table.lookup import LayerTable, equal_homes, known_ids
from placer.table.table import Table


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

    def served(self, ranks: RankArray) -> None:
        """Take note of the ranks ``[k, T]`` that served, by descending router weight."""
        self._history.append(majority_rank(ranks))
        self._history = self._history[max(0, len(self._history) - self.table.lookback) :]
