"""A trace, as the API shows it."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, Unpack

import numpy as np

from placer.affinity.from_traces import affinity_of_traces
from placer.affinity.sums import ROWS
from placer.api.affinity import Affinity
from placer.api.arguments import (
    AffinityArguments,
    SelectArguments,
    require_known,
    selected,
)
from placer.api.files import AnyPath, UsedFile, warn, writing
from placer.api.shown import Result, Shape, Shown, layers_of, model_name, model_words
from placer.errors import UsageError, one_of
from placer.model import ModelSpec
from placer.run.devices import CPU
from placer.run.parallel import BACKENDS, Backend
from placer.run.verdict import Verdict
from placer.solver.caps import MAX_IMBALANCE
from placer.trace import Fold
from placer.trace import Trace as TraceDirectory
from placer.trace.dedup import KINDS, Repetition, dedup_trace
from placer.trace.header import TraceHeader
from placer.trace.rewrite import merge_traces as joined
from placer.trace.rewrite import sample_trace, split_trace, validate_trace

if TYPE_CHECKING:
    from pandas import DataFrame

    from placer.api.measuring import Learning


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
        progress: Callable[[str], None] | None = None,
        **options: Unpack[AffinityArguments],
    ) -> Affinity:
        """Count loads, and which experts are used together, as ``placer affinity`` does.

        Parameters
        ----------
        progress
            Called with one line for each part that is counted.
        **options
            Those of the command: :class:`placer.AffinityArguments`.

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
        return count_affinity([self], progress=progress, **options)

    def validate(self) -> Result:
        """Check every hash, tensor and id, as ``placer trace validate`` does.

        Raises
        ------
        PlacerError
            If a chunk is damaged: the error names it.
        """
        from placer.report.trace_verdicts import verdict_of_validation

        header = validate_trace(self.contents)
        return _holds(self.path, header, verdict_of_validation(header, self.path))

    def split(
        self,
        out: AnyPath,
        *,
        domain: str | None = None,
        period: str | None = None,
        force: bool = False,
        **select: Unpack[SelectArguments],
    ) -> Result:
        """Write part of the trace: a fold, phase, domain or period.

        Parameters
        ----------
        out
            The trace to write.
        domain
            Only this domain.
        period
            ``"K/N"``: only part K of N parts in recording order; the first is 0.
        force
            Whether an earlier trace at ``out`` is replaced.
        **select
            The tokens: :class:`placer.SelectArguments`.

        Raises
        ------
        PlacerError
            If no token is selected, a chunk is damaged, or ``out`` exists.
        UsageError
            If an option has no such value.
        """
        with self._claim(out, force=force):
            require_known(select, SelectArguments)
            header = split_trace(
                self.contents,
                Path(out),
                selection=selected(select),
                domain=domain,
                period=period,
            )
        return _written(out, header)

    def sample(
        self, out: AnyPath, sequences: int, *, seed: int = 0, force: bool = False
    ) -> Result:
        """Write some sequences, drawn at random without replacement.

        Raises
        ------
        PlacerError
            If a chunk is damaged, or ``out`` exists and ``force`` is false.
        UsageError
            If the trace has fewer sequences.
        """
        with self._claim(out, force=force):
            header = sample_trace(self.contents, Path(out), sequences, seed)
        return _written(out, header)

    def dedup(
        self,
        out: AnyPath,
        *,
        prefixes: bool = True,
        rows: bool = True,
        warm_up: bool = True,
        fold: str | None = None,
        not_fold: str | None = None,
        force: bool = False,
    ) -> Result:
        """Write the trace without repetitions and warm-up tokens.

        Parameters
        ----------
        out
            The trace to write.
        prefixes, rows, warm_up
            What is removed.
        fold, not_fold
            Sequences that are kept as they are; tokens of others that repeat them are
            removed.
        force
            Whether an earlier trace at ``out`` is replaced.

        Raises
        ------
        PlacerError
            If a chunk is damaged, nothing is left, or ``out`` exists.
        UsageError
            If there is nothing to remove, or a fold has no such value.
        """
        wanted = {"prefixes": prefixes, "rows": rows, "warm_up": warm_up}
        kinds = tuple(kind for kind in KINDS if wanted[kind])
        with self._claim(out, force=force):
            if not kinds:
                raise UsageError(
                    "nothing to remove",
                    "leave out --no-prefixes, --no-rows or --no-warm-up",
                )
            chosen = Fold.chosen(fold, not_fold)
            header, found = dedup_trace(self.contents, Path(out), kinds=kinds, fold=chosen)
        return _written(out, header, found)

    def learning(
        self,
        *,
        gpus_per_node: int,
        nodes: int = 1,
        policy: str = "fixed",
        max_imbalance: float = MAX_IMBALANCE,
        tokens: Sequence[int] | None = None,
        seed: int = 0,
        progress: Callable[[str], None] | None = None,
        **select: Unpack[SelectArguments],
    ) -> "Learning":
        """Solve on more and more tokens, to see how many a plan needs.

        Parameters
        ----------
        gpus_per_node, nodes
            Expert-parallel ranks on each node, and nodes.
        policy
            ``fixed`` or ``follow``.
        max_imbalance
            Cap on the load of the busiest rank over the mean, in every layer.
        tokens
            How many; 500, 1000, 2000, 5000 and so on by default, up to 100,000.
        seed
            Of the sample and the search.
        progress
            Called with one line for each step.
        **select
            The tokens to solve on, ``fold="0/2"`` by default; plans are judged on all other
            sequences: :class:`placer.SelectArguments`.

        Raises
        ------
        PlacerError
            If the trace is damaged, or a fold is empty.
        UsageError
            If the fold has too few tokens, or an option has no such value.
        """
        from placer.api.measuring import learning

        return learning(
            self,
            gpus_per_node=gpus_per_node,
            nodes=nodes,
            policy=policy,
            max_imbalance=max_imbalance,
            tokens=tokens,
            seed=seed,
            progress=progress,
            **select,
        )

    def _claim(self, out: AnyPath, *, force: bool) -> AbstractContextManager[None]:
        return writing(Path(out), [self.path], force=force, kinds=["trace"], directory=True)

    def to_frame(
        self,
        of: Literal["loads", "tokens"] = "loads",
        **select: Unpack[SelectArguments],
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
        **select
            The tokens: :class:`placer.SelectArguments`.

        Raises
        ------
        PlacerError
            If no token is selected, or a chunk is damaged.
        UsageError
            If ``of`` or a selection is not known.
        """
        one_of("of", of, ("loads", "tokens"))
        require_known(select, SelectArguments)
        if of == "loads":
            return self.affinity(**select).to_frame()
        from pandas import Categorical, DataFrame, Index

        tokens = self.contents.read(selected(select))
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


def count_affinity(
    traces: Sequence[Trace],
    *,
    progress: Callable[[str], None] | None = None,
    **options: Unpack[AffinityArguments],
) -> Affinity:
    """Count several traces of one model, added up: :meth:`placer.Trace.affinity`.

    Raises
    ------
    PlacerError
        If traces are of different models, no token is selected, or a chunk is damaged.
    UsageError
        If two are the same trace, or an option has no such value.
    """
    require_known(options, AffinityArguments)
    device, workers = options.get("device", CPU), options.get("workers", 1)
    counted = affinity_of_traces(
        [one.contents for one in traces],
        selected(options),
        workers or (os.cpu_count() if device == CPU else None) or 1,
        Backend(
            name=one_of("--backend", options.get("backend", "processes"), BACKENDS),
            address=options.get("ray_address"),
        ),
        rows=one_of("--rows", options.get("rows", "none"), ROWS),
        device=device,
        warn=warn,
        progress=progress,
    )
    return Affinity(counted)


def merge_traces(traces: Sequence[Trace], out: AnyPath, *, force: bool = False) -> Result:
    """Write several traces of one model as one; sequences get new ids.

    Raises
    ------
    PlacerError
        If traces are of different models, a chunk is damaged, or ``out`` exists and
        ``force`` is false.
    """
    paths = [one.path for one in traces]
    with writing(Path(out), paths, force=force, kinds=["trace"], directory=True):
        header = joined([one.contents for one in traces], Path(out), warn)
    return _written(out, header)


def _written(out: AnyPath, header: TraceHeader, found: Repetition | None = None) -> Result:
    from placer.report.trace_verdicts import verdict_of_rewriting

    shares = {}
    if found is not None:
        shares = {
            "tokens_searched": found.num_tokens,
            "prefix_share": found.prefix_share,
            "repeated_row_share": found.row_share,
            "warm_up_share": found.warm_up_share,
            "tokens_removed": found.num_removed,
        }
    path = Path(out)
    return _holds(path, header, verdict_of_rewriting(header, path, found), **shares)


def _holds(path: Path, header: TraceHeader, verdict: Verdict, **more: object) -> Result:
    facts = {
        "trace": str(path),
        "num_tokens": header.num_tokens,
        "num_sequences": header.num_sequences,
        "num_chunks": len(header.chunks),
        "domains": list(header.domains),
    }
    return Result(title="trace", verdict=verdict, facts=facts | more, out=path)
