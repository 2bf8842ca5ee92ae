"""A token-shuffle table, as the API shows it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np

from placer.api.arguments import TableArguments, require_known
from placer.api.files import AnyPath, as_path, note, warn, writing
from placer.api.shown import Shape, Shown, TitledTable, model_name, model_words
from placer.run.verdict import Verdict
from placer.table import Table as TokenTable

if TYPE_CHECKING:
    from pandas import DataFrame

    from placer.api.plan import Plan
    from placer.api.trace import Trace
    from placer.planning.tables import TableResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """How a table was made: its figures, and the files of the plan and the trace."""

    result: "TableResult"
    plan: Path
    trace: Path


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Table(Shown):
    """A token-shuffle table: a home rank for each token, by its id and history.

    :func:`placer.open` reads one; :meth:`placer.Plan.table` makes one.

    Attributes
    ----------
    contents
        What the rest of placer works with; not part of the stable API.
    path
        The file that it was read from or written to, or ``None``.
    made
        How it was made, with its figures on held-out sequences; ``None`` of one that was
        read.
    """

    contents: TokenTable
    path: Path | None = None
    made: "Made | None" = None

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

    @property
    def verdict(self) -> Verdict:
        """What the table saves on held-out sequences, where it was just made."""
        if self.made is None:
            size = self.contents.vocab_size
            return Verdict(
                answer=(f"The table gives a home to each of {size:,} token ids.",)
            )
        from placer.report.verdicts import verdict_of_table

        made, path = self.made, self.path or Path("TABLE")
        return verdict_of_table(made.result, made.plan, made.trace, path)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that ``placer tables --json`` prints."""
        facts = {} if self.made is None else self.made.result.to_json()
        out = None if self.path is None else str(self.path)
        return {"verdict": self.verdict.to_json(), "out": out} | facts

    def tables(self) -> tuple[list[TitledTable], list[str]]:
        """Return what ``placer tables`` shows: figures, and sentences after them."""
        if self.made is None:
            return [], []
        made, tables, lines = self.made.result, list[TitledTable](), list[str]()
        if made.heldout is not None:
            rows = [
                (
                    policy,
                    metrics.local_activation_rate,
                    metrics.remote_rank_copies_per_token,
                    metrics.home_imbalance_max,
                )
                for policy, metrics in made.heldout.items()
            ]
            columns = ("policy", "local rate", "copies/token", "home imbalance")
            tables.append(("on held-out sequences", columns, rows))
        lines.append(
            f"{self.vocab_size:,} token ids ({made.num_seen_ids:,} of them in the "
            f"profile), {self.num_ranks} ranks: a random home has local rate "
            f"{1 / self.num_ranks:.3f}"
        )
        if made.exact_layers:
            lines.append(
                f"MoE layers {', '.join(map(str, made.exact_layers))} are hash-routed: "
                "their rows are exact for every token id"
            )
        return tables, lines

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

    def write(self, path: AnyPath, *, force: bool = False) -> Self:
        """Write the table: the same table gives the same bytes.

        Returns
        -------
        Table
            The same table, which has a path now.

        Raises
        ------
        PlacerError
            If the file exists and ``force`` is false.
        """
        with writing(Path(path), force=force, kinds=["table"]):
            self.contents.write(Path(path))
        return replace(self, path=Path(path))

    def _shape(self) -> Shape:
        table = self.contents
        nodes = f"{table.num_nodes} node{'s' * (table.num_nodes > 1)}"
        return Shape(
            title=f"Table of {model_name(table.model)}",
            facts={
                "path": self.path,
                "routing": model_words(table.model),
                "ranks": f"{table.num_ranks} on {nodes}",
                "token ids": f"{table.vocab_size:,}",
                "lookback": table.lookback,
                "plan": table.plan_sha256,
            },
        )


def make_table(
    plan: "Plan",
    trace: "Trace",
    *,
    progress: Callable[[str], None] | None = None,
    **options: Unpack[TableArguments],
) -> Table:
    """Make the table of a plan: :meth:`placer.Plan.table`.

    Raises
    ------
    PlacerError
        If plan and trace are of different models, or the trace has no token ids.
    UsageError
        If an option is out of range.
    """
    from placer.planning.tables import TableOptions
    from placer.planning.tables import make_table as made_of
    from placer.table.build import DEFAULT_SHRINKAGE
    from placer.trace import Fold

    require_known(options, TableArguments)
    chosen = Fold.chosen(options.get("fold"), options.get("not_fold"))
    how = TableOptions(
        lookback=options.get("lookback"),
        shrinkage=options.get("shrinkage", DEFAULT_SHRINKAGE),
        with_token_score=options.get("token_score", False),
        with_combined=options.get("combined", False),
        embeddings=as_path(options.get("embeddings")),
        max_home_imbalance=options.get("max_home_imbalance"),
    )
    with plan.as_file() as file:
        made = made_of(
            file.path,
            trace.contents,
            fold=chosen,
            phase=options.get("phase"),
            options=how,
            progress=progress,
        )
    warnings = tuple(map(file.words, made.warnings))
    for text in warnings:
        warn(text)
    if made.profile.fold is None:
        warn("built from all sequences: none was held out, so no figures are shown")
    elif chosen is None:
        note(f"built from the tokens that the plan was solved on: {made.profile.options}")
    result = replace(made, warnings=warnings)
    origin = Made(result=result, plan=plan.path or Path("PLAN"), trace=trace.path)
    return Table(made.table, made=origin)
