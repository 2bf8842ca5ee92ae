"""The errors of placer, each with the exit code that the command line documents."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

Choice = TypeVar("Choice", bound=str)
_MOST_CHARACTERS = 2000


class PlacerError(Exception):
    """A failure that the user can act on.

    Parameters
    ----------
    message
        What is wrong, with both values where two disagree.
    hint
        The remedy, as a command to run or a choice to make.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        # A hostile file may have its say, such as a number of 5,000 digits, but no more.
        message = message[:_MOST_CHARACTERS]
        super().__init__(message)
        self.message = message
        self.hint = hint

    def reword(self, words: Callable[[str], str]) -> None:
        """Change message and hint, such as the name of a temporary file in them."""
        self.message, self.hint = words(self.message), self.hint and words(self.hint)
        self.args = (self.message,)


class PlacerWarning(UserWarning):
    """What limits a result; commands print it on stderr."""


class UsageError(PlacerError):
    """The command line is not valid."""

    exit_code = 2


class NoSolutionError(PlacerError):
    """The placement problem has no solution."""

    exit_code = 3


class NotProvedError(PlacerError):
    """``--require-optimal``: the limit came before the proof."""

    exit_code = 4


class SourceChangedError(PlacerError):
    """A file changed while a command read it: what it wrote so far is of no use."""


class VerificationError(PlacerError):
    """An exported checkpoint differs from what its plan promises."""

    exit_code = 5


class DriftError(PlacerError):
    """Traffic has drifted from the plan."""

    exit_code = 6


def one_of(
    option: str, value: str, known: Sequence[Choice], problem: str = "is not known"
) -> Choice:
    """Return a value that must be among those that are known.

    Raises
    ------
    UsageError
        If it is not.
    """
    for one in known:
        if one == value:
            return one
    *others, last = known
    choices = f"{', '.join(others)} or {last}" if others else last
    raise UsageError(
        f"{option} {value} {problem}", f"{meant(value, known)}choose {choices}"
    )


def meant(value: str, known: Iterable[str]) -> str:
    """Return ``did you mean X? `` where one of the known names is like the value."""
    near = get_close_matches(value.strip().lower(), [*known], n=1)
    return f"did you mean {near[0]}? " if near else ""


def require_amount(option: str, number: float) -> None:
    """Refuse a number that is negative or not finite.

    Raises
    ------
    UsageError
        If it is.
    """
    if number < 0:
        raise UsageError(f"{option} must not be negative, got {number}")
    if not math.isfinite(number):
        raise UsageError(
            f"{option} must be a finite number, got {number}",
            "leave it out for its default",
        )


def require_left_out(options: Mapping[str, object], company: str) -> None:
    """Refuse the first of these options that is given without its ``company``.

    Raises
    ------
    UsageError
        If one is not ``None``.
    """
    for name, value in options.items():
        if value is not None:
            raise UsageError(
                f"{name} {value} is for {company}",
                f"drop {name}, or add {company.partition(':')[0]}",
            )
