"""Sparse exact counts, for tokens and sequences of which most experts never see."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from placer.arrays import IntArray
from placer.errors import PlacerError

# The index of this many rows takes a GiB.
_MOST_ROWS = 1 << 27


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseCounts:
    """A ``[num_rows, num_columns]`` matrix of counts in CSR form.

    Attributes
    ----------
    indptr
        ``[num_rows + 1]`` int64: where each row starts in ``indices``.
    indices
        ``[nnz]`` int64 columns, ascending inside a row.
    counts
        ``[nnz]`` int64, positive.
    num_columns
        Number of columns.
    """

    indptr: IntArray
    indices: IntArray
    counts: IntArray
    num_columns: int

    def __post_init__(self) -> None:
        arrays = (self.indptr, self.indices, self.counts)
        if any(one.ndim != 1 or one.dtype != np.int64 for one in arrays):
            raise PlacerError(
                "sparse counts are damaged: indptr, indices and counts must be [N] int64"
            )
        nnz = len(self.indices)
        ordered = len(self.indptr) and self.indptr[0] == 0 and self.indptr[-1] == nnz
        if not ordered or (np.diff(self.indptr) < 0).any() or len(self.counts) != nnz:
            raise PlacerError("sparse counts are damaged: indptr, indices, counts disagree")
        if nnz and (self.indices.min() < 0 or self.indices.max() >= self.num_columns):
            raise PlacerError(
                f"sparse counts are damaged: a column is outside 0..{self.num_columns - 1}"
            )

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    @classmethod
    def from_keys(
        cls, keys: IntArray, counts: IntArray, num_rows: int, num_columns: int
    ) -> Self:
        """Sum counts over keys ``row * num_columns + column``, which may repeat."""
        # A stable sort merges what is sorted in parts in linear time.
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1) > 0)
        summed = np.add.reduceat(counts, first) if len(first) else counts
        rows, columns = np.divmod(keys[first], num_columns)
        return cls.from_entries(rows, columns, summed, num_rows, num_columns)

    @classmethod
    def from_entries(
        cls,
        rows: IntArray,
        columns: IntArray,
        counts: IntArray,
        num_rows: int,
        num_columns: int,
    ) -> Self:
        """Take entries by ascending row and column, each once.

        Raises
        ------
        PlacerError
            If there would be this many rows that their index alone takes more than a GiB.
        """
        if num_rows > _MOST_ROWS:
            raise PlacerError(
                f"ids go up to {num_rows - 1}: counts per id would take "
                f"{num_rows * 8 / 2**30:.1f} GiB for every layer",
                "count without --rows, or number the ids from 0 and import again",
            )
        indptr = np.zeros(num_rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=num_rows), out=indptr[1:])
        return cls(indptr=indptr, indices=columns, counts=counts, num_columns=num_columns)

    def require_canonical(self) -> Self:
        """Refuse what this class never makes, but a file may hold; return the counts.

        Raises
        ------
        PlacerError
            If columns do not ascend inside a row, or a count is not positive.
        """
        if (np.diff(self.keys()) <= 0).any() or (self.counts < 1).any():
            raise PlacerError(
                "sparse counts are damaged: columns must ascend, and counts be positive"
            )
        return self

    def keys(self) -> IntArray:
        """Return ``[nnz]``: ``row * num_columns + column`` of every entry, ascending."""
        rows = np.repeat(np.arange(self.num_rows), np.diff(self.indptr))
        return rows * self.num_columns + self.indices

    def add(self, other: "SparseCounts") -> "SparseCounts":
        """Return the sum; the taller matrix decides the number of rows.

        Raises
        ------
        PlacerError
            If the two have counts over different numbers of experts.
        """
        if self.num_columns != other.num_columns:
            raise PlacerError(
                f"counts over {self.num_columns} and {other.num_columns} experts "
                "cannot be added"
            )
        return SparseCounts.from_keys(
            np.concatenate([self.keys(), other.keys()]),
            np.concatenate([self.counts, other.counts]),
            max(self.num_rows, other.num_rows),
            self.num_columns,
        )

    def dense(self) -> IntArray:
        """Return the matrix, ``[num_rows, num_columns]`` int64."""
        matrix = np.zeros(self.num_rows * self.num_columns, dtype=np.int64)
        matrix[self.keys()] = self.counts
        return matrix.reshape(self.num_rows, self.num_columns)
