"""What commands print: data on stdout, progress, warnings and hints on stderr."""

import json
import logging
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console

from placer import PlacerWarning, Verdict
from placer.cli.choices import among
from placer.cli.terminal import emphasised, table_lines, wrapped

if TYPE_CHECKING:
    from placer.api.shown import Result

# Whether only errors and the path of the result are printed; each command sets it.
_quiet = False
# Seconds from line to line of progress where stderr is no terminal.
_QUIET_S = 30.0

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of tables.")
]
DetailsOption = Annotated[
    bool,
    typer.Option("--details", help="Also print what explains the answer: all tables."),
]
FoldOption = Annotated[
    str | None,
    typer.Option(
        "--fold", metavar="K/N", help="Use only sequences whose id mod N is K, such as 0/2."
    ),
]
NotFoldOption = Annotated[
    str | None,
    typer.Option(
        "--not-fold", metavar="K/N", help="Use only sequences whose id mod N is not K."
    ),
]
SolvedFoldOption = Annotated[
    str | None,
    typer.Option(
        "--fold",
        metavar="K/N",
        help="Solve on the sequences whose id mod N is K, such as 0/2. The others judge.",
    ),
]
SolvedNotFoldOption = Annotated[
    str | None,
    typer.Option(
        "--not-fold",
        metavar="K/N",
        help="Solve on the sequences whose id mod N is not K. The others judge.",
    ),
]
PhaseOption = Annotated[
    str,
    typer.Option(
        "--phase",
        help="Use only tokens of this phase: prefill, decode or all.",
        autocompletion=among("prefill", "decode", "all"),
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace an earlier result at the same path.")
]
GpusPerNodeOption = Annotated[
    int, typer.Option(min=1, help="Number of expert-parallel ranks (GPUs) on each node.")
]
NodesOption = Annotated[int, typer.Option(min=1, help="Number of nodes.")]
SizedByOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Checkpoint whose config.json gives the sizes of the experts."
    ),
]
HiddenSizeOption = Annotated[
    int | None, typer.Option(help="Width of the hidden state, if --model is not given.")
]
ExpertSizeOption = Annotated[
    int | None,
    typer.Option(
        help="Intermediate size of an expert (moe_intermediate_size), if --model is not "
        "given."
    ),
]
WeightBytesOption = Annotated[
    float | None,
    typer.Option(
        help="Bytes per weight: 2 for bf16, 1 for fp8, 0.5 for fp4.",
        show_default="from --model, else the bytes per number that --engine sends",
    ),
]


TokensPerRankOption = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        show_default="64,256,4096",
        help="Tokens per rank in one forward pass. Sizes below 1024 are decode batches, "
        "others are prefill batches.",
    ),
]
BatchingOption = Annotated[
    str | None,
    typer.Option(
        metavar="decode|prefill",
        autocompletion=among("decode", "prefill"),
        help="Make all batches in the same way at every size. decode: one token of "
        "each sequence in turn. prefill: whole sequences, one after another.",
    ),
]


def claim(
    context: typer.Context,
    out: Path,
    inputs: Sequence[Path | None],
    *,
    force: bool,
    kinds: Sequence[str],
    directory: bool = False,
) -> None:
    """Claim what the command writes until it ends (:func:`placer.api.files.writing`).

    ``kinds`` are the results (:data:`placer.run.kinds.KINDS`) that it may replace.
    """
    from placer.api.files import writing

    context.with_resource(
        writing(out, inputs, force=force, kinds=kinds, directory=directory)
    )


def is_first() -> bool:
    """Return whether this process speaks for all of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def set_quiet(wanted: bool) -> None:
    """Print only JSON, errors and the path of the result from now on, or all again."""
    global _quiet
    _quiet = wanted


def is_quiet() -> bool:
    """Return whether only errors and the path of the result are printed."""
    return _quiet


@contextmanager
def progress_line(title: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that takes each step and shows it on stderr.

    A terminal has one changing line; a log gets a line with the current step from time to
    time. Only the first of torchrun's processes shows any.
    """
    if _quiet or not is_first():
        yield lambda text: None
        return
    if not sys.stderr.isatty():
        with _logged(title) as show:
            yield show
        return
    with Console(stderr=True).status(title) as status:
        yield lambda text: status.update(f"{title}: {text}")


@contextmanager
def _logged(title: str) -> Iterator[Callable[[str], None]]:
    step, ended = "", threading.Event()

    def show(text: str) -> None:
        nonlocal step
        step = f": {text}"

    def repeat() -> None:
        began = time.monotonic()
        while not ended.wait(_QUIET_S):
            note(f"{title}, after {time.monotonic() - began:.0f} s{step}")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield show
    finally:
        ended.set()
        thread.join()


@contextmanager
def token_progress() -> Iterator[Callable[[int], None]]:
    """Yield a function that shows how many tokens are recorded, and how fast."""
    first: tuple[int, float] | None = None
    with progress_line("record") as tell:
        tell("loading the model")

        def show(num_tokens: int) -> None:
            nonlocal first
            first = first or (num_tokens, time.monotonic())
            done, seconds = num_tokens - first[0], time.monotonic() - first[1]
            rate = f", {done / seconds:,.0f} tokens/s" if done else ""
            tell(f"{num_tokens:,} tokens{rate}")

        yield show


def print_json(value: Any) -> None:
    """Print one JSON object on stdout; null stands for a figure that is no number.

    Python would write NaN and Infinity, which are not JSON.
    """
    sys.stdout.write(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None
) -> None:
    """Print a table for people; numbers are right-aligned."""
    if title is not None:
        print_line(wrapped(title))
    for line in table_lines(columns, rows):
        print_line(line)


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """Print a table of facts, without those that are not known."""
    known = [(name, plain(one)) for name, one in facts.items() if one is not None]
    print_table((title, ""), known)


def print_result(found: "Result", *, as_json: bool, always: bool = True) -> None:
    """Print a result: the verdict, its facts, and the command to run next."""
    if as_json:
        print_json(found.to_json())
        return
    print_verdict(found.verdict, always=always)
    print_facts(found.title, found.facts)
    print_next(found.verdict)


def plain(value: object) -> str:
    """Write a fact in one line."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        if len(value) > 1 and len({*map(str, value)}) == 1:
            return f"{value[0]} in each of {len(value)}"
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.6g}"
    return str(value)


def print_line(text: str) -> None:
    """Print one line of data on stdout."""
    if _quiet:
        return
    sys.stdout.write(text + "\n")


def print_verdict(verdict: Verdict, *, always: bool = False) -> None:
    """Print the answer, how sure it is and what it costs.

    ``always`` with ``--quiet`` too: the command writes no file.
    """
    if _quiet and not always:
        return
    for text in verdict.answer:
        line = emphasised(wrapped(text), is_better=verdict.is_better)
        sys.stdout.write(f"{line}\n")
    for text in verdict.more:
        print_line(wrapped(text))


def print_next(verdict: Verdict) -> None:
    """Print the command to run next, in one line that can be copied."""
    if verdict.next is not None:
        print_line(f"next: {verdict.next}")


def print_tables(
    tables: Iterable[tuple[str | None, Sequence[str], Sequence[Sequence[object]]]],
) -> None:
    """Print tables, each with its title, an empty line between them."""
    for number, (title, columns, rows) in enumerate(tables):
        if number:
            print_line("")
        print_table(columns, rows, title)


@contextmanager
def said_at_once() -> Iterator[None]:
    """Print what the API warns of, and what it notes, when it does."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, PlacerWarning):
            warn(str(message))
        else:
            usual(message, category, filename, lineno, file, line)

    logger, noted = logging.getLogger("placer"), _Noted()
    with warnings.catch_warnings():
        warnings.simplefilter("always", PlacerWarning)
        usual = warnings.showwarning
        warnings.showwarning = show
        level = logger.level
        logger.addHandler(noted)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(noted)
            logger.setLevel(level)


class _Noted(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def warn(text: str) -> None:
    """Print a warning on stderr."""
    if _quiet:
        return
    sys.stderr.write(f"warning: {text}\n")


def note(text: str) -> None:
    """Print a hint on stderr."""
    if _quiet:
        return
    sys.stderr.write(f"{text}\n")
