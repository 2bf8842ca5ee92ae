"""What all commands share: lists and examples in the help, and a look for the inputs."""

import inspect
import re
import textwrap
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from placer.cli.examples import EXAMPLES
from placer.errors import PlacerError

_OUTPUTS = ("out", "html")
# These may be names of the Hugging Face hub.
_MODELS = ("model", "original", "path")
_EXAMPLE_WIDTH = 74
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
    """A command that shows examples, and fails at once if an input is missing."""

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

    def invoke(self, ctx: Any) -> Any:
        """Look for the inputs, then run."""
        for name, path in _inputs(ctx):
            if path.exists():
                continue
            if name in _MODELS:
                from placer.model.config_file import require_downloaded

                require_downloaded(path)
            raise PlacerError(f"{path} does not exist", _near(path))
        _require_kinds(ctx)
        return super().invoke(ctx)


def _inputs(ctx: Any) -> Iterator[tuple[str, Path]]:
    for name, value in ctx.params.items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, Path) and name not in _OUTPUTS:
                yield name, one


def _require_kinds(ctx: Any) -> None:
    """Refuse arguments of another kind, such as swapped ones, and say the right order."""
    from placer.run.kinds import require_kind

    wanted = [
        (one.name, str(one.metavar).strip("[]"))
        for one in ctx.command.params
        if one.param_type_name == "argument"
    ]
    order = f"the order is: {ctx.command_path} {' '.join(word for _, word in wanted)}"
    for name, word in wanted:
        kinds = _KINDS.get(word, ())
        if word == "TRACE" and ctx.params.get("merge"):
            kinds = ("affinity",)
        if word == "PLAN" and ctx.params.get("inverse"):
            kinds = ("export", "checkpoint")
        if word == "PLAN" and ctx.params.get("target") == "ktransformers":
            kinds = ("plan", "affinity")
        value = ctx.params[name]
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if kinds and isinstance(one, Path):
                require_kind(one, kinds, order)


def _near(path: Path) -> str:
    """Suggest similar names in the same folder, or how to look."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    sought = path.relative_to(folder).parts[0]
    names = [one.name for one in folder.iterdir()] if folder.is_dir() else []
    names = [name for name in names if name != sought]  # a link to nothing
    if alike := get_close_matches(sought, sorted(names)):
        return f"did you mean {' or '.join(str(folder / name) for name in alike)}?"
    return f"check the path: ls -l {folder}"
