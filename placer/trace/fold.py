"""Folds: which sequences a command sees."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from placer.arrays import BoolArray
from placer.errors import UsageError

_INVERTED = "not "


@dataclass(frozen=True, slots=True)
class Fold:
    """The sequences whose id mod ``parts`` is ``part``, or all others if ``inverted``."""

    part: int
    parts: int
    inverted: bool = False

    def __post_init__(self) -> None:
        # Sequence ids are int32, and so is what they are divided by.
        if not 0 <= self.part < self.parts or not 2 <= self.parts < 2**31:
            raise UsageError(
                f"a fold is K/N with N of at least 2 and 0 <= K < N, got {self}",
                "for example --fold 0/2 (profile) and --fold 1/2 (held out)",
            )

    @classmethod
    def parse(cls, text: str, *, inverted: bool = False) -> Self:
        """Read ``K/N``.

        Raises
        ------
        UsageError
            If the text has another form, or K is not below N.
        """
        part, slash, parts = text.partition("/")
        if not slash or not part.isdecimal() or not parts.isdecimal():
            raise UsageError(
                f"a fold has the form K/N, got {text!r}", "for example --fold 0/2"
            )
        return cls(int(part), int(parts), inverted)

    @classmethod
    def chosen(cls, fold: str | None, not_fold: str | None) -> Self | None:
        """Read the options ``--fold`` and ``--not-fold``; ``None`` where neither is given.

        Raises
        ------
        UsageError
            If one has another form, or both are given.
        """
        if fold is not None and not_fold is not None:
            raise UsageError(
                "--fold and --not-fold exclude each other", "give one of the two"
            )
        if not_fold is not None:
            return cls.parse(not_fold, inverted=True)
        return None if fold is None else cls.parse(fold)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read the inverse of ``str``: ``K/N``, or ``not K/N``."""
        rest = text.removeprefix(_INVERTED)
        return cls.parse(rest, inverted=rest != text)

    def complement(self) -> "Fold":
        """Return the fold of all other sequences."""
        return Fold(self.part, self.parts, not self.inverted)

    def keep(self, sequence_ids: npt.NDArray[np.int32]) -> BoolArray:
        """Return ``[T]``: whether each token's sequence is in the fold."""
        mask: BoolArray = sequence_ids % self.parts == self.part
        return ~mask if self.inverted else mask

    def __str__(self) -> str:
        return f"{_INVERTED if self.inverted else ''}{self.part}/{self.parts}"
