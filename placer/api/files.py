"""Files of the API: those that users name, and those of objects that were not written."""

import logging
import shlex
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from placer.errors import PlacerError, PlacerWarning
from placer.model.config_file import require_downloaded as require_downloaded
from placer.placement.engine_map import require_no_map_as
from placer.run.files import sha256_file
from placer.run.kinds import kind_of as kind_of
from placer.run.kinds import named, require_kind, require_replaceable, require_suffix
from placer.run.writing import claimed

AnyPath = str | Path


def warn(text: str) -> None:
    """Give a warning that a command would print."""
    warnings.warn(text, PlacerWarning, stacklevel=2)


def note(text: str) -> None:
    """Log a note that a command would print: logger ``placer``, level INFO."""
    logging.getLogger("placer").info(text)


def as_path(path: AnyPath | None) -> Path | None:
    """Return a path that is given."""
    return None if path is None else Path(path)


def command_line(
    command: str, inputs: Iterable[Path | str], options: Mapping[str, object]
) -> str:
    """Return the command that does the same, with the options that have a value."""
    words = ["placer", command, *map(str, inputs)]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is True:
                words.append(option)
            elif one is not None and one is not False:
                words += [option, str(one)]
    return shlex.join(words)


@contextmanager
def writing(
    out: Path,
    inputs: Iterable[Path | None] = (),
    *,
    force: bool,
    kinds: Iterable[str],
    directory: bool = False,
) -> Iterator[None]:
    """Claim what is written inside the block.

    Parameters
    ----------
    out
        What will be written.
    inputs
        What is read; it is never replaced.
    force
        Whether an earlier result may be replaced.
    kinds
        The results (:data:`placer.run.kinds.KINDS`) that it may replace.
    directory
        Whether a directory is written, or a file.

    Raises
    ------
    PlacerError
        If ``out`` exists and may not be replaced, or another process is writing it.
    UsageError
        If ``out`` is an input, one of the two is inside the other, or its name ends as
        files of another kind do.
    """
    read, kinds = [path for path in inputs if path is not None], list(kinds)
    with claimed(out, read, directory=directory, force=force):
        require_replaceable(out, kinds)
        require_suffix(out, kinds)
        yield


def require_input(path: Path, kinds: Collection[str], order: str | None) -> None:
    """Refuse an input of another kind, such as one of two that were swapped.

    Parameters
    ----------
    path
        What is there.
    kinds
        What it may be, of :data:`placer.run.kinds.KINDS`. What has no kind passes: its
        reader says why.
    order
        The hint, or ``None`` where the place of the path says nothing of its kind.

    Raises
    ------
    PlacerError
        If it is of another kind, or the map of an engine in place of a trace.
    """
    if order is not None:
        require_kind(path, kinds, order)
    if "trace" in kinds:
        require_no_map_as(path, named(kinds))


def require_unchanged(path: Path, sha256: str) -> None:
    """Refuse a file that is not the one that was opened.

    Raises
    ------
    PlacerError
        If it changed.
    """
    if sha256_file(path) != sha256:
        raise PlacerError(
            f"{path} changed after it was opened",
            f"open it again: placer.open({str(path)!r})",
        )


@dataclass(frozen=True, slots=True)
class UsedFile:
    """A file of an object, and what sentences call it where it is a temporary one."""

    path: Path
    called: str | None = None

    def words(self, text: str) -> str:
        """Return a sentence without the path of a temporary file: it is of no use."""
        return text if self.called is None else text.replace(str(self.path), self.called)


@contextmanager
def temporary_file(
    name: str, write: Callable[[Path], None], called: str
) -> Iterator[UsedFile]:
    """Yield a file of an object that was not written, for the length of the block.

    Errors call it as ``called``.
    """
    with TemporaryDirectory(prefix="placer-") as folder:
        file = UsedFile(Path(folder) / name, called)
        write(file.path)
        try:
            yield file
        except PlacerError as error:
            error.reword(file.words)
            raise
