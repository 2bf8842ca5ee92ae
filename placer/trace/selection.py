"""Which tokens of a trace a command sees."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import msgspec
import numpy as np

from placer.arrays import BoolArray
from placer.errors import PlacerError, UsageError, meant
from placer.run.documents import Sha256
from placer.target.engine import PHASES, Phase
from placer.trace.fold import Fold

if TYPE_CHECKING:
    from placer.trace.chunk import Chunk

# As a trace numbers them.
_PHASE_NUMBERS: Mapping[Phase, int] = {"prefill": 0, "decode": 1}


class ProfileFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a provenance that say which tokens were used."""

    fold: str | None = None
    phase: Phase | None = None
    traces_sha256: list[Sha256] | None = None
    tokenizer_sha256: Sha256 | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """The tokens of a fold and of a phase.

    Attributes
    ----------
    fold
        Only the sequences of this fold, or ``None`` for all.
    phase
        Only the tokens that the engine computed in this phase, or ``None`` for all.
    """

    fold: Fold | None = None
    phase: Phase | None = None

    @classmethod
    def parse(cls, fold: str | None, not_fold: str | None, phase: str) -> Self:
        """Read the options ``--fold``, ``--not-fold`` and ``--phase``.

        Raises
        ------
        UsageError
            If one has another form, or both folds are given.
        """
        return cls(Fold.chosen(fold, not_fold), parse_phase(phase))

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any]) -> Self:
        """Read the inverse of :meth:`to_json`; fields that are missing select all."""
        fold, phase = recorded.get("fold"), recorded.get("phase")
        return cls(
            Fold.from_text(fold) if isinstance(fold, str) else None,
            parse_phase(phase) if isinstance(phase, str) else None,
        )

    def to_json(self) -> dict[str, str | None]:
        """Return the fields that plans, counts and tables record of their tokens."""
        return {"fold": None if self.fold is None else str(self.fold), "phase": self.phase}

    @property
    def options(self) -> str:
        """The options of a command that select these tokens; empty for all."""
        parts = []
        if self.fold is not None:
            option = "--not-fold" if self.fold.inverted else "--fold"
            parts.append(f"{option} {self.fold.part}/{self.fold.parts}")
        if self.phase is not None:
            parts.append(f"--phase {self.phase}")
        return " ".join(parts)

    def complement(self) -> "Selection":
        """Return the tokens of the same phase in all other sequences.

        Raises
        ------
        ValueError
            If all sequences are selected, so that there are no others.
        """
        if self.fold is None:
            raise ValueError("without a fold, no sequence is held out")
        return replace(self, fold=self.fold.complement())

    def keep(self, chunk: "Chunk") -> BoolArray:
        """Return ``[T]``: whether each token is selected.

        Raises
        ------
        PlacerError
            If a phase is selected and the chunk does not record phases.
        """
        kept = np.ones(chunk.num_tokens, dtype=np.bool_)
        if self.fold is not None:
            kept &= self.fold.keep(chunk.sequence_ids)
        if self.phase is not None:
            if chunk.phase is None:
                raise PlacerError(
                    f"--phase {self.phase}: the trace does not record which tokens are "
                    "prefill and which are decode",
                    "leave --phase out, or use a trace that records it: placer record "
                    "MODEL --corpus TEXT --generate N --out TRACE; or import sglang-dump, "
                    "sglang-routed, vllm-routed, or npz with the array phase",
                )
            kept &= chunk.phase == _PHASE_NUMBERS[self.phase]
        return kept


EVERYTHING = Selection()


def parse_phase(text: str) -> Phase | None:
    """Read ``prefill``, ``decode``, or ``all``, which is ``None``.

    Raises
    ------
    UsageError
        If it is none of them.
    """
    if text == "all":
        return None
    for phase in PHASES:
        if text == phase:
            return phase
    near = meant(text, (*PHASES, "all"))
    raise UsageError(
        f"--phase {text} is not known", f"{near}choose {', '.join(PHASES)} or all"
    )
