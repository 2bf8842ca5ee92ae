"""The journal of an export: which files are finished, so that a killed one goes on.

It lies beside the directory that is written, as ``OUT.journal``: one JSON line that says
what the export is, then one line per finished shard. The directory is ``OUT.partial`` until
all is done; the journal is removed last.
"""

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from placer.errors import PlacerError
from placer.run.files import (
    canonical_json,
    partial_path,
    require_absent,
)


@dataclass(slots=True, kw_only=True)
class Journal:
    """The finished shards of one export.

    Attributes
    ----------
    finished
        What is known of each finished shard, by name.
    """

    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    _stream: IO[str]
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, facts: Mapping[str, Any]) -> None:
        """Note that a shard is finished: it is under its name, whole."""
        with self._lock:
            self.finished[name] = dict(facts)
            _append(self._stream, {"shard": name, **facts})

    @classmethod
    def open(cls, stream: IO[str], identity: str) -> Self:
        """Read what a run of the same identity finished; forget any other."""
        finished: dict[str, dict[str, Any]] = {}
        stream.seek(0)
        text = stream.read()
        lines = text.splitlines()
        journal = cls(finished=finished, _stream=stream)
        if not lines or _parsed(lines[0]) != {"export": identity}:
            stream.truncate(0)
            _append(stream, {"export": identity})
            return journal
        for line in lines[1:]:
            # A line may be cut off: its shard is written again.
            if (facts := _parsed(line)) is not None and "shard" in facts:
                finished[facts.pop("shard")] = facts
        if not text.endswith("\n"):
            stream.write("\n")
        return journal


@contextmanager
def resumable_directory(out: Path, identity: str) -> Iterator[tuple[Path, Journal]]:
    """Yield a directory to fill and its journal; the directory becomes ``out`` at the end.

    A run that is killed, or fails on the system's side after it finished a shard, leaves
    ``OUT.partial`` and the journal, and the same export goes on there. Any other failure
    leaves nothing.

    Parameters
    ----------
    out
        The directory to write.
    identity
        A hash of all that decides the bytes: another export does not go on with these.

    Raises
    ------
    PlacerError
        If ``out`` exists, another process is writing it, or the disk fails.
    """
    partial, path = partial_path(out), out.with_name(out.name + ".journal")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        require_absent(out)
    with _locked(path, out) as stream:
        journal = None
        try:
            journal = Journal.open(stream, identity)
            if journal.finished and out.exists() and not partial.exists():
                # Killed between the last two steps, below.
                out.rename(partial)
            elif not journal.finished and partial.exists():
                shutil.rmtree(partial)
            require_absent(out)
            partial.mkdir(exist_ok=True)
            yield partial, journal
            partial.rename(out)
            path.unlink()
        except (OSError, KeyboardInterrupt) as error:
            if journal is None or not journal.finished:
                _remove(partial, path)
                raise
            raise _interrupted(error, journal, partial, path) from error
        except BaseException:
            _remove(partial, path)
            raise


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[IO[str]]:
    with path.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PlacerError(
                f"another process is writing {out}",
                f"wait for it, or choose another --out: fuser {path}",
            ) from error
        yield stream


def _interrupted(
    error: BaseException, journal: Journal, partial: Path, path: Path
) -> PlacerError:
    reason = getattr(error, "strerror", None) or "interrupted"
    return PlacerError(
        f"{partial} is not complete: {reason}; {len(journal.finished)} shards are finished",
        f"the same command goes on there; to give up instead: rm -r {partial} {path}",
    )


def _remove(partial: Path, path: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    path.unlink(missing_ok=True)


def _append(stream: IO[str], value: Mapping[str, Any]) -> None:
    stream.write(canonical_json(value) + "\n")
    stream.flush()
    os.fsync(stream.fileno())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
