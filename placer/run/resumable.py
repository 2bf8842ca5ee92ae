"""Directories that an interrupted run can continue: a fixed name, a journal, a lock.

Until it is complete, ``OUT`` is the directory ``OUT.placer-partial``. The journal next to
it, ``.OUT.placer``, says what is written and which directory is placer's own. Then comes
one JSON line per finished part. It is the lock too, and removed last.
"""

import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from placer.errors import PlacerError, SourceChangedError, VerificationError
from placer.run.documents import parse_json
from placer.run.files import canonical_json
from placer.run.writing import claimed, journal_head, lock_path, rename_directory

# Errors after which the written parts are of no use.
_USELESS = (VerificationError, SourceChangedError)


@dataclass(slots=True, kw_only=True)
class Journal:
    """The finished parts of a directory.

    Attributes
    ----------
    finished
        What is known of each finished part, by its name, in the order of writing.
    """

    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    _stream: IO[str]
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, facts: Mapping[str, Any]) -> None:
        """Note that a part is finished: it is under its name, whole."""
        with self._lock:
            self.finished[name] = dict(facts)
            _append(self._stream, {"part": name, **facts})


@contextmanager
def resumable_directory(
    out: Path, identity: str, inputs: Iterable[Path] = ()
) -> Iterator[tuple[Path, Journal]]:
    """Yield a directory to fill and its journal; the directory becomes ``out`` at the end.

    A run that fails or is ended after it finished a part leaves both, and the same command
    continues there. If verification fails, a source changes, or no part is finished,
    nothing is left.

    Parameters
    ----------
    out
        The directory to write.
    identity
        A hash of all that decides the bytes.
    inputs
        Files and directories that are read.

    Raises
    ------
    UsageError
        If ``out`` is an input, or one of the two is inside the other.
    PlacerError
        If ``out`` exists, another process is writing it, or an unfinished directory there
        is not placer's, or of another identity and ``out`` is claimed without ``force``.
    """
    with claimed(out, inputs, directory=True) as claim:
        partial, stream = partial_path(out), claim.stream
        inode = journal_head(out).get("inode")
        if not partial.exists() and out.exists() and _inode(out) == inode:
            # Killed between the last two steps, below.
            out.rename(partial)
        finished = _begun(partial, out, stream, identity, force=claim.force)
        journal = Journal(finished=finished, _stream=stream)
        try:
            yield partial, journal
            rename_directory(partial, out, claim)
            lock_path(out).unlink()
        except BaseException as error:
            if not journal.finished or isinstance(error, _USELESS):
                shutil.rmtree(partial, ignore_errors=True)
                lock_path(out).unlink()
                if not isinstance(error, Exception):  # Ctrl-C or a signal
                    error.add_note(
                        "no part was finished, so nothing is kept: run the same command "
                        "again to start over"
                    )
            elif partial.exists():
                error.add_note(
                    f"{partial} keeps the finished parts: run the same command again to "
                    "continue"
                )
            raise


def partial_path(out: Path) -> Path:
    """Return the path next to ``out`` where it is written until it is complete."""
    return out.with_name(out.name + ".placer-partial")


def _begun(
    partial: Path, out: Path, stream: IO[str], identity: str, *, force: bool
) -> dict[str, dict[str, Any]]:
    """Return the finished parts of an earlier run; start again if there is none."""
    stream.seek(0)
    text = stream.read()
    lines, head = text.splitlines(), journal_head(out)
    if os.path.lexists(partial):
        own = head.get("inode") == _inode(partial)
        empty = partial.is_dir() and not partial.is_symlink() and not any(partial.iterdir())
        if not own and not empty:
            raise PlacerError(
                f"{partial} already exists, and placer did not make it (it has no journal)",
                "move it away, or choose another path",
            )
        if own and head.get("identity") == identity:
            if not text.endswith("\n"):
                # A line was cut off: its part is written again.
                os.write(stream.fileno(), b"\n")
            parts = [part for line in lines[1:] if (part := _parsed(line)) is not None]
            found = {part.pop("part"): part for part in parts if "part" in part}
            _remove_unfinished(partial, found)
            return found
        if own and len(lines) > 1 and not force:
            raise PlacerError(
                f"{partial} was begun with other input or other options",
                "use the same ones to continue; to start again, add --force",
            )
        shutil.rmtree(partial)
    stream.truncate(0)
    partial.mkdir()
    try:
        _append(stream, {"identity": identity, "inode": _inode(partial)})
    except BaseException:
        partial.rmdir()
        stream.truncate(0)
        raise
    return {}


def _remove_unfinished(partial: Path, finished: Mapping[str, object]) -> None:
    """Remove what was half written when a run was killed: nobody knows its names."""
    for path in partial.rglob("*"):
        if not path.is_dir() and path.relative_to(partial).as_posix() not in finished:
            path.unlink()


def _inode(path: Path) -> int:
    return os.lstat(path).st_ino


def _append(stream: IO[str], value: Mapping[str, Any]) -> None:
    # Not through the stream, which would try again when it is closed.
    os.write(stream.fileno(), f"{canonical_json(value)}\n".encode())
    os.fsync(stream.fileno())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        value = parse_json(line, "journal")
    except PlacerError:
        return None
    return value if isinstance(value, dict) else None
