"""What all commands share: lists and examples in the help, and a look for the inputs."""

import inspect
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand

from placer import PlacerError
from placer.cli.examples import EXAMPLES
from placer.cli.headings import HEADINGS
from placer.cli.output import is_first, is_quiet, said_at_once, set_quiet

#: Of the context: the words of the command line after the command.
WORDS = "placer.words"
_OUTPUTS = ("out", "html", "certificate")
# These may be names of the Hugging Face hub.
_MODELS = ("model", "original", "path")
_EXAMPLE_WIDTH = 74
# The share of letters that two names have in common, as difflib counts it.
_ALIKE = 0.8
_MOST_ALIKE = 3
# The kinds (placer.run.kinds) that a path may be, by what the help calls it. Of others,
# such as the folder that verify compares, the command itself says what is wrong.
_KINDS = {
    "TRACE": ("trace",),
    "TRACE|AFFINITY": ("trace", "affinity"),
    "PLAN": ("plan",),
    "MODEL": ("checkpoint", "export"),
    "ORIGINAL": ("checkpoint", "export"),
    "EXPORTED": ("export", "ranks", "checkpoint"),
}


class InputCommand(TyperCommand):
    """A command that shows examples, and fails at once if an input is missing.

    All have ``--quiet``: then only errors are printed, and the path of what was written.
    """

    def __init__(self, *args: Any, **extra: Any) -> None:
        super().__init__(*args, **extra)
        shared = typer.Typer(add_completion=False)
        shared.command()(_shared_options)
        self.params += typer.main.get_command(shared).params

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, those of a long list under headings."""
        headings = HEADINGS.get(str(self.name), {})
        sections: dict[str, list[Any]] = {"Arguments": []}
        sections |= {heading: [] for heading in headings}
        sections["Options"] = []
        of = {name: heading for heading, names in headings.items() for name in names}
        for one in self.get_params(ctx):
            record = one.get_help_record(ctx)
            is_argument = one.param_type_name == "argument"
            heading = "Arguments" if is_argument else of.get(str(one.name), "Options")
            if record is not None:
                sections[heading].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the docstring. Indented paragraphs are lists, whose lines are kept."""
        text = inspect.cleandoc(self.help or "")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(re.sub(r"\n\n(?=  )", "\n\n\b\n", text))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples. Lines that are too long are continued as a shell reads it."""
        with formatter.section("Examples"):
            for command in EXAMPLES[str(self.name)]:
                # An option stays with its value.
                lines = textwrap.wrap(
                    re.sub(r"(--[a-z-]+) (?!-)", r"\1\0", command),
                    _EXAMPLE_WIDTH,
                    subsequent_indent="    ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                for line in [*(f"{line} \\" for line in lines[:-1]), lines[-1]]:
                    formatter.write(f"  {line}\n".replace("\0", " "))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the words of the command line: hints repeat them."""
        ctx.meta[WORDS] = [*args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Look for the inputs, then run."""
        try:
            with said_at_once():
                return self._run(ctx)
        finally:
            set_quiet(False)

    def _run(self, ctx: Any) -> Any:
        inputs = list(_inputs(ctx))
        for one in inputs:
            if one.path.exists():
                continue
            if one.name in _MODELS:
                from placer.api.files import require_downloaded

                require_downloaded(one.path)
            raise PlacerError(f"{one.path} does not exist", _near(one))
        _require_kinds(ctx, inputs)
        result = super().invoke(ctx)
        if is_quiet() and not ctx.params.get("as_json") and is_first():
            for name in _OUTPUTS:
                if (written := ctx.params.get(name)) is not None:
                    sys.stdout.write(f"{written}\n")
        return result


def _shared_options(
    quiet: Annotated[
        bool,
        typer.Option(
            *("-q", "--quiet"),
            help="Print only errors, the path of what is written, and the answer of a "
            "command that judges.",
            callback=set_quiet,
            expose_value=False,
        ),
    ] = False,
) -> None:
    """Give all commands this option."""


@dataclass(frozen=True, slots=True)
class _Input:
    """A path that the command reads.

    Attributes
    ----------
    name
        Of the parameter in the code.
    path
        What was given.
    kinds
        What it may be (:data:`placer.run.kinds.KINDS`), empty where that is not known.
    is_argument
        Whether its place says what it is, so that it may be swapped with another.
    """

    name: str
    path: Path
    kinds: tuple[str, ...]
    is_argument: bool


def _inputs(ctx: Any) -> Iterator[_Input]:
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name)
        kinds = _kinds(str(parameter.metavar).strip("[]"), ctx.params)
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, Path) and parameter.name not in _OUTPUTS:
                is_argument = parameter.param_type_name == "argument"
                yield _Input(parameter.name, one, kinds, is_argument)


def _kinds(word: str, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the kinds that help calls ``word``, with the options that are given."""
    if word == "TRACE" and given.get("merge"):
        return ("affinity",)
    if word == "PLAN" and given.get("inverse"):
        return ("export", "checkpoint")
    if word == "PLAN" and given.get("target") == "ktransformers":
        return ("plan", "affinity")
    return _KINDS.get(word, ())


def _require_kinds(ctx: Any, inputs: Sequence[_Input]) -> None:
    """Refuse inputs of another kind, such as swapped ones, and say the right order."""
    from placer.api.files import require_input

    words = [
        str(one.metavar).strip("[]")
        for one in ctx.command.params
        if one.param_type_name == "argument"
    ]
    for one in inputs:
        if one.kinds:
            takes = f"it takes: {ctx.command_path} {' '.join(words)}"
            hint = _in_order(ctx, inputs, one) or takes
            require_input(one.path, one.kinds, hint if one.is_argument else None)


def _in_order(ctx: Any, inputs: Sequence[_Input], wrong: _Input) -> str | None:
    """Return the command with two arguments swapped, where that is what is wrong."""
    from placer.api.files import kind_of

    for other in inputs:
        if (
            other.is_argument
            and kind_of(wrong.path) in other.kinds
            and kind_of(other.path) in wrong.kinds
        ):
            swapped = {str(wrong.path): str(other.path), str(other.path): str(wrong.path)}
            words = ctx.meta[WORDS]
            if any(words.count(word) != 1 for word in swapped):
                return None
            words = [swapped.get(word, word) for word in words]
            return f"in this order: {shlex.join([*ctx.command_path.split(), *words])}"
    return None


def _near(missing: _Input) -> str:
    """Suggest names in the same folder that are alike, or how to look."""
    from placer.api.files import kind_of

    folder = missing.path.parent
    while not folder.exists():
        folder = folder.parent
    sought = missing.path.relative_to(folder).parts[0]
    alike = [
        str(one)
        for one in sorted(folder.iterdir() if folder.is_dir() else ())
        if one.name != sought  # it may be a link to nothing
        and _is_alike(sought, one.name)
        and (not missing.kinds or kind_of(one) in (None, *missing.kinds))
    ]
    rest = missing.path.relative_to(folder).parts[1:]
    whole = [path for one in alike if (path := Path(one, *rest)).exists()]
    alike = [*map(str, whole)] or alike
    if alike:
        return f"did you mean {' or '.join(alike[:_MOST_ALIKE])}?"
    return f"check the path: ls -l {folder}"


def _is_alike(sought: str, name: str) -> bool:
    """Return whether one name may be meant by the other: a typing error or no suffix."""
    one, other = Path(sought), Path(name)
    likeness = SequenceMatcher(None, one.stem, other.stem).ratio()
    return likeness == 1 or (one.suffix == other.suffix and likeness >= _ALIKE)
