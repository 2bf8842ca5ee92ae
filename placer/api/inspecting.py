"""``placer.inspect``: what is in a file or folder, and its report."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from placer.api.files import AnyPath, writing
from placer.api.shown import Result, TitledTable
from placer.report.artifact import open_beside
from placer.report.html import write_page
from placer.report.inspect import summarize
from placer.report.plan_summary import RANK_LOAD
from placer.report.summary import Summary
from placer.run.verdict import Verdict


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Inspected(Result):
    """What a file or folder holds: :func:`placer.inspect` makes one.

    Attributes
    ----------
    contents
        What the rest of placer works with; not part of the stable API.
    name
        The file's name.
    inputs
        What was read.
    shows_load
        Whether the load of each rank was asked for.
    """

    contents: Summary
    name: str
    inputs: tuple[Path, ...]
    shows_load: bool

    @property
    def kind(self) -> str:
        """What it is, such as ``trace`` or ``plan``."""
        return self.contents.kind

    @property
    def flat_facts(self) -> dict[str, object]:
        """One value for each name; those of objects have dotted names."""
        return self.contents.flat_facts()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What would mislead a reader of the figures, one sentence each."""
        return self.contents.headline.misleading

    @property
    def figures(self) -> list[tuple[str, float | None, float, str]]:
        """The figures that matter most: name, before, after and unit."""
        tiles = self.contents.headline.tiles
        return [(one.title, one.before, one.after, one.unit) for one in tiles]

    def tables(self, *, details: bool = False) -> list[TitledTable]:
        """Return what ``placer inspect`` shows: all tables, or only those asked for."""
        return [
            (one.title, one.columns, one.rows)
            for one in self.contents.tables
            if details or (self.shows_load and one.title == RANK_LOAD)
        ]

    def write_html(self, path: AnyPath, *, force: bool = False) -> None:
        """Write the report: one HTML file with charts, which works offline.

        Raises
        ------
        PlacerError
            If the file exists and ``force`` is false.
        """
        with writing(Path(path), self.inputs, force=force, kinds=[]):
            write_page(Path(path), self.name, self.contents)


def inspect(path: AnyPath, *others: AnyPath, load: AnyPath | None = None) -> Inspected:
    """Show what a file or folder holds, as ``placer inspect`` does.

    Parameters
    ----------
    path
        A trace, affinity file, plan, folder of plans, table, checkpoint, export record,
        map of an engine, or what ``simulate`` or ``trace learning`` print with ``--json``.
    *others
        With a plan: a trace or affinity file to show it on, and plans to compare with.
    load
        With a plan: like one of the others, and also name the busiest rank of each layer.

    Raises
    ------
    PlacerError
        If a file is none of these, or is damaged.
    UsageError
        If they do not belong together.

    Examples
    --------
    >>> import placer
    >>> placer.inspect("traces/demo/model").kind
    'checkpoint'
    """
    first, beside = Path(path), [Path(one) for one in others]
    beside += [] if load is None else [Path(load)]
    found = summarize(open_beside(first, beside))
    return Inspected(
        title=found.kind,
        verdict=Verdict(
            answer=(found.headline.verdict,), next=_naming(first, found.headline.next)
        ),
        facts=found.to_json(),
        contents=found,
        name=first.name,
        inputs=(first, *beside),
        shows_load=load is not None,
    )


def _naming(path: Path, command: str | None) -> str | None:
    """Name the inspected file in the next command, whose first placeholder it is.

    Reports keep the placeholder: their bytes do not depend on where a file lies.
    """
    if command is None:
        return None
    words = command.split()
    place = next(n for n, word in enumerate(words) if word.isupper())
    words[place] = quote(str(path))
    return " ".join(words)
