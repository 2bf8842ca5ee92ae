"""A trace, as the API shows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from placer.affinity.from_traces import affinity_of_traces
from placer.affinity.sums import ROWS
from placer.api.affinity import Affinity
from placer.api.files import AnyPath, UsedFile, warn
from placer.api.shown import Shape, Shown, layers_of, model_name, model_words
from placer.errors import one_of
from placer.model import ModelSpec
from placer.trace import Selection
from placer.trace import Trace as TraceDirectory

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Trace(Shown):
    """A router trace: which experts the router chose for every token.

    Open one with :func:`placer.open`.

    Attributes
    ----------
    path
        The directory.
    contents
        What the rest of placer works with; not part of the stable API.

    Examples
    --------
    >>> import placer
    >>> trace = placer.open("traces/gpt-oss-20b")
    >>> trace.num_tokens, trace.num_experts[0], trace.top_k
    (75735, 32, 4)
    """

    path: Path
    contents: TraceDirectory

    @classmethod
    def read(cls, path: AnyPath) -> Self:
        """Open a trace directory; its chunks are read when they are needed.

        Raises
        ------
        PlacerError
            If it is no complete trace.
        """
        return cls(Path(path), TraceDirectory(Path(path)))

    @property
    def model(self) -> ModelSpec:
        """The model whose router was recorded."""
        return self.contents.model

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return self.contents.header.num_tokens

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return self.contents.header.num_sequences

    @property
    def layers(self) -> tuple[int, ...]:
        """``[L]``: the model's own number of each MoE layer; 0 to L-1 where unknown."""
        return layers_of(self.model)

    @property
    def num_experts(self) -> tuple[int, ...]:
        """``[L]``: logical experts of each MoE layer."""
        return self.model.num_experts

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return self.model.top_k

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains; empty where none were recorded."""
        return self.contents.header.domains

    def affinity(
        self,
        *,
        fold: str | None = None,
        not_fold: str | None = None,
        phase: str = "all",
        rows: str = "none",
        workers: int = 1,
        device: str = "cpu",
    ) -> Affinity:
        """Count loads, and which experts are used together, as ``placer affinity`` does.

        Parameters
        ----------
        fold, not_fold
            Only sequences whose id mod N is K, or is not: ``"K/N"``.
        phase
            Only tokens of this phase: ``prefill``, ``decode`` or ``all``.
        rows
            Also count experts by token id: ``none``, ``tokens`` or ``sequences``.
        workers
            Number of processes.
        device
            ``cpu`` or ``cuda``.

        Raises
        ------
        PlacerError
            If no token is selected, or a chunk is damaged.
        UsageError
            If an option has no such value.

        Examples
        --------
        >>> import placer
        >>> trace = placer.open("traces/gpt-oss-20b")
        >>> counts = trace.affinity(fold="0/2")
        >>> counts.load[0].sum() == counts.num_tokens * trace.top_k
        np.True_
        """
        counted = affinity_of_traces(
            [self.contents],
            Selection.parse(fold, not_fold, phase),
            workers,
            rows=one_of("rows", rows, ROWS),
            device=device,
            warn=warn,
        )
        return Affinity(counted)

    def to_frame(
        self,
        of: Literal["loads", "tokens"] = "loads",
        *,
        fold: str | None = None,
        not_fold: str | None = None,
        phase: str = "all",
    ) -> "DataFrame":
        """Return loads, or the routing of every token.

        Parameters
        ----------
        of
            ``loads``: one row for each MoE layer and expert, as
            :meth:`placer.Affinity.to_frame`. ``tokens``: one row for each token and MoE
            layer: ``sequence_id``, ``position``, ``layer`` (from 0), and ``expert_0`` to
            ``expert_k-1`` in the router's order; ``token_id`` and ``domain`` where they
            were recorded. All of it is held in memory.
        fold, not_fold, phase
            As in :meth:`affinity`.

        Raises
        ------
        PlacerError
            If no token is selected, or a chunk is damaged.
        UsageError
            If ``of`` or a selection is not known.
        """
        one_of("of", of, ("loads", "tokens"))
        if of == "loads":
            return self.affinity(fold=fold, not_fold=not_fold, phase=phase).to_frame()
        from pandas import Categorical, DataFrame, Index

        tokens = self.contents.read(Selection.parse(fold, not_fold, phase))
        num_layers, num_tokens = len(tokens.experts), tokens.num_tokens
        columns: dict[str, object] = {
            "sequence_id": np.repeat(tokens.sequence_ids, num_layers),
            "position": np.repeat(tokens.positions, num_layers),
        }
        if tokens.token_ids is not None:
            columns["token_id"] = np.repeat(tokens.token_ids, num_layers)
        if tokens.domain_ids is not None:
            codes = np.repeat(tokens.domain_ids.astype(np.int16), num_layers)
            columns["domain"] = Categorical.from_codes(codes, Index(self.domains))
        columns["layer"] = np.tile(np.arange(num_layers), num_tokens)
        experts = np.stack(tokens.experts, axis=1).reshape(-1, self.top_k)
        columns |= {f"expert_{n}": experts[:, n] for n in range(self.top_k)}
        return DataFrame(columns)

    @contextmanager
    def as_file(self) -> Iterator[UsedFile]:
        """Yield its directory."""
        yield UsedFile(self.path)

    def _shape(self) -> Shape:
        return Shape(
            title=f"Trace of {model_name(self.model)}",
            facts={
                "path": self.path,
                "routing": model_words(self.model),
                "tokens": f"{self.num_tokens:,} in {self.num_sequences:,} sequences",
                "domains": ", ".join(self.domains),
            },
        )
