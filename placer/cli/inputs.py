"""Inputs are looked for before anything else: a path is often misspelled."""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from placer.errors import PlacerError

_OUTPUTS = ("out", "html")
# These may be names of the Hugging Face hub.
_MODELS = ("model", "original", "path")


class InputCommand(TyperCommand):
    """A command that fails at once where a file or directory that it reads is missing."""

    def invoke(self, ctx: Any) -> Any:
        """Look for the inputs, then run."""
        for name, path in _inputs(ctx):
            if path.exists():
                continue
            if name in _MODELS:
                from placer.model.config_file import require_downloaded

                require_downloaded(path)
            raise PlacerError(f"{path} does not exist", _near(path))
        return super().invoke(ctx)


def _inputs(ctx: Any) -> Iterator[tuple[str, Path]]:
    for name, value in ctx.params.items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, Path) and name not in _OUTPUTS:
                yield name, one


def _near(path: Path) -> str:
    """Name what lies in the same folder under a name alike, or how to look."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    sought = path.relative_to(folder).parts[0]
    names = [one.name for one in folder.iterdir()] if folder.is_dir() else []
    if alike := get_close_matches(sought, sorted(names)):
        return f"did you mean {' or '.join(str(folder / name) for name in alike)}?"
    return f"check the path: ls -l {folder}"
