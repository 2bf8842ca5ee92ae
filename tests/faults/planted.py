"""Faults that the suites must find, planted into placer in a child process."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from placer.run import writing


def _replace_everywhere(name: str, new: object) -> None:
    """Put ``new`` in place of a function of ``writing``, wherever it was imported."""
    old = getattr(writing, name)
    for module in [m for n, m in sys.modules.items() if n.startswith("placer.")]:
        if module is not writing and getattr(module, name, None) is old:
            setattr(module, name, new)
    setattr(writing, name, new)


def no_fsync() -> None:
    """Nothing is flushed to the disk."""
    os.fsync = lambda descriptor: None


def no_flush_of_directories() -> None:
    """The new name of a file is not flushed."""
    flush = writing.flush_to_disk

    def only_files(path: Path) -> None:
        if not path.is_dir():
            flush(path)

    writing.flush_to_disk = only_files


def no_lock() -> None:
    """Two processes may write one target."""
    writing.fcntl.flock = lambda stream, how: None


def named_before_it_is_written() -> None:
    """A file has its name while it is written."""

    @contextmanager
    def atomic_file(path: Path) -> Iterator[Path]:
        path.unlink(missing_ok=True)
        yield path
        writing.flush_to_disk(path)
        writing.flush_to_disk(path.parent)

    _replace_everywhere("atomic_file", atomic_file)


def old_removed_first() -> None:
    """What --force replaces is gone before the new one is there."""
    rename = writing.rename_directory

    def rename_directory(written: Path, out: Path, claim: writing.Claim) -> None:
        shutil.rmtree(out, ignore_errors=True)
        rename(written, out, claim)

    _replace_everywhere("rename_directory", rename_directory)


def temporaries_stay() -> None:
    """A file that could not be written is left under its random name."""
    Path.unlink = lambda self, missing_ok=False: None
    shutil.rmtree = lambda *args, **more: None


def errors_are_swallowed() -> None:
    """A file that could not be flushed counts as written."""
    flush = writing.flush_to_disk

    def quietly(path: Path) -> None:
        with suppress(OSError):
            flush(path)

    writing.flush_to_disk = quietly


def half_written_files_stay() -> None:
    """A run that goes on leaves what the killed one had under random names."""
    from placer.run import resumable

    resumable._remove_unfinished = lambda partial, finished: None


def directory_vanishes() -> None:
    """Somebody removes the directory before the first flush. Not placer's fault."""
    flush, remove = writing.flush_to_disk, shutil.rmtree

    def vanish(path: Path) -> None:
        remove(path.parent if path.parent.name != "out" else path.parents[1], True)
        flush(path)

    writing.flush_to_disk = vanish
