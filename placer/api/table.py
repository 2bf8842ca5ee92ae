"""A token-shuffle table, as the API shows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from placer.api.files import AnyPath, writing
from placer.api.shown import Shape, Shown, model_name, model_words
from placer.table import Table as TokenTable

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Table(Shown):
    """A token-shuffle table: a home rank for each token, by its id and history.

    :func:`placer.open` reads one; :meth:`placer.Plan.table` makes one.

    Attributes
    ----------
    contents
        What the rest of placer works with; not part of the stable API.
    path
        The file that it was read from, or ``None``.
    """

    contents: TokenTable
    path: Path | None = None

    @classmethod
    def read(cls, path: AnyPath) -> Self:
        """Read a table.

        Raises
        ------
        PlacerError
            If it is none, or is damaged.
        """
        return cls(TokenTable.read(Path(path)), Path(path))

    @property
    def num_ranks(self) -> int:
        """Ranks that are homes."""
        return self.contents.num_ranks

    @property
    def vocab_size(self) -> int:
        """Token ids that have a row, V."""
        return self.contents.vocab_size

    def to_frame(self) -> "DataFrame":
        """Return one row for each MoE layer and token id.

        Columns: ``layer`` (from 0), ``token_id``, ``rank`` (the home), ``confidence`` (the
        share of the token's experts that the home is expected to serve).
        """
        from pandas import DataFrame

        rank = self.contents.token_rank
        num_layers, size = rank.shape
        return DataFrame(
            {
                "layer": np.repeat(np.arange(num_layers), size),
                "token_id": np.tile(np.arange(size), num_layers),
                "rank": rank.ravel(),
                "confidence": self.contents.token_confidence.ravel(),
            }
        )

    def write(self, path: AnyPath, *, force: bool = False) -> None:
        """Write the table: the same table gives the same bytes.

        Raises
        ------
        PlacerError
            If the file exists and ``force`` is false.
        """
        with writing(Path(path), force=force, kinds=["table"]):
            self.contents.write(Path(path))

    def _shape(self) -> Shape:
        table = self.contents
        return Shape(
            title=f"Table of {model_name(table.model)}",
            facts={
                "path": self.path,
                "routing": model_words(table.model),
                "ranks": f"{table.num_ranks} on {table.num_nodes} nodes",
                "token ids": f"{table.vocab_size:,}",
                "lookback": table.lookback,
                "plan": table.plan_sha256,
            },
        )
