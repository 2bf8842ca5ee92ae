"""What must hold after a disturbed run; each check returns what is wrong, in words."""

import errno
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from placer.run.writing import claimed
from tests.faults.commands import Command
from tests.faults.lab import (
    CREATE,
    FAIL,
    FAIL_ON,
    INTERRUPT,
    KILL,
    LINK,
    MKDIR,
    NAMES,
    OPEN,
    READ,
    READING,
    RENAME,
    SHORT,
    SYNC,
    TERMINATE,
    TORN,
    WRITE,
    Fault,
    Lab,
    Ran,
)

State = dict[str, bytes]
#: The end of the names of placer's temporary files, and the names of safetensors' own.
_RANDOM = r"\.[0-9a-f]{16}\b|\.tmp\w{6}\b"
Calls = tuple[tuple[str, str, str], ...]
One = TypeVar("One")


def state_of(place: Path) -> State:
    """Return every file below (or at) a path by its name, with its bytes."""
    if place.is_file():
        return {"": place.read_bytes()}
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


@dataclass(kw_only=True)
class Bench:
    """A command in a directory of its own, and what it writes undisturbed.

    Attributes
    ----------
    planted
        The fault of ``planted.py`` that runs have.
    calls
        The calls of an undisturbed run, without and with older output that it replaces.
    mended
        From which states of the directory the same command was seen to write all.
    """

    lab: Lab
    command: Command
    inputs: Path
    folder: Path
    planted: str = ""
    expected: State = field(default_factory=dict)
    calls: dict[bool, Calls] = field(default_factory=dict)
    mended: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.clear()
        self.lab.warm_up(self.command.line(self.inputs, self.out))
        for force in [False, True] if self.command.replaceable else [False]:
            self.put_older() if force else self.clear()
            ran = self._undisturbed(*["--force"] * force)
            self.expected = state_of(self.out)
            self.calls[force] = ran.calls
        self.clear()

    @property
    def out(self) -> Path:
        return self.folder / f"out{self.command.suffix}"

    def run(self, fault: Fault | None = None, *more: str) -> Ran:
        """Run the command."""
        words = self.command.line(self.inputs, self.out, *more)
        return self.lab.run(words, self.folder, fault, planted=self.planted)

    def with_planted(self, fault: str) -> "Bench":
        """Return the same bench, whose further runs have a fault of ``planted.py``."""
        other = copy(self)
        other.planted, other.mended = fault, set()
        return other

    @cached_property
    def reads(self) -> Calls:
        """How an undisturbed run opens and reads its inputs."""
        self.clear()
        words = self.command.line(self.inputs, self.out)
        return self.lab.run(words, self.inputs, Fault(kinds=READING)).calls

    def file_of(self, fault: Fault) -> str:
        """Return the input that a failing opening or read is of."""
        names = [name for what, name, _ in self.reads if what in NAMES[fault.kinds]]
        return names[fault.at - 1]

    def lost(self) -> list[str]:
        """Return what a power cut could take after the command has ended well."""
        return lost_by_power_cut(self.run().calls, self.out)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def put_older(self) -> State:
        """Put there what an earlier run may have written; return it."""
        self.clear()
        for name, content in self.expected.items():
            path = self.out / name if name else self.out
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content + b"older")
        return state_of(self.out)

    def begin(self, *, force: bool) -> tuple[State, list[str]]:
        """Prepare a run; return what is there before it, and its further words."""
        if force:
            return self.put_older(), ["--force"]
        self.clear()
        return {}, []

    def runs_again(self, *more: str) -> Iterator[str]:
        """Say how the same command does not write what is expected.

        It is run once from each state of the directory: from equal ones it does the same.
        """
        # --force does not replace what nobody knows to be of placer.
        if self.out.exists() and not (more and self.command.replaceable):
            shutil.rmtree(self.out) if self.out.is_dir() else self.out.unlink()
        state = repr((more, fingerprint(self.folder)))
        if state in self.mended:
            return
        again = self.run(None, *more)
        if again.code:
            yield f"run again it fails: {again.said}"
        elif state_of(self.out) != self.expected:
            yield "run again it writes other bytes"
        else:
            self.mended.add(state)

    def _undisturbed(self, *more: str) -> Ran:
        ran = self.run(None, *more)
        if ran.code:
            raise RuntimeError(ran.said)
        return ran


def fingerprint(folder: Path) -> str:
    """Return a hash of all that lies in a directory, but for random names and inodes."""
    whole = sha256()
    inodes = {str(path.lstat().st_ino): path.name for path in folder.iterdir()}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        whole.update(re.sub(_RANDOM, ".random", name).encode() + b"\0")
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".placer" and path.parent == folder:
                content = re.sub(
                    rb'"inode":(\d+)',
                    lambda found: inodes.get(found[1].decode(), "gone").encode(),
                    content,
                )
            whole.update(sha256(content).digest())
    return whole.hexdigest()


def normal(calls: Calls, folder: Path) -> list[tuple[str, ...]]:
    """Return calls with names relative to a directory and no random ones, sorted.

    Threads that export shards make them in any order.
    """
    return sorted(
        tuple(re.sub(_RANDOM, ".random", word.replace(str(folder), "")) for word in call)
        for call in calls
    )


def ends(every: Sequence[One]) -> list[One]:
    """Return the first, the middle and the last."""
    return [every[at] for at in sorted({0, len(every) // 2, len(every) - 1}) if every]


def sampled(every: Sequence[One], number: int | None, bench: Bench) -> Sequence[One]:
    """Return all, or a sample of ``number``, another for each command."""
    if number is None or number >= len(every):
        return every
    return random.Random(bench.command.words).sample(every, number)


def _found(bench: Bench, older: State) -> Iterator[str]:
    """Say how the target is neither as before nor complete."""
    found = state_of(bench.out) if bench.out.exists() else {}
    if found not in (older, bench.expected):
        hidden = [state_of(path) for path in bench.folder.glob(".out*") if path.is_dir()]
        if found or older not in hidden:
            yield f"the target is neither as before nor complete: {sorted(found)}"


def moments(bench: Bench, *, force: bool) -> list[int]:
    """Return the calls before which the disk is not as before the last one.

    Between two calls nothing changes, and a flush changes nothing that a killed process
    could leave.
    """
    whats = [what for what, *_ in bench.calls[force]]
    return [at for at in range(1, len(whats) + 1) if at == 1 or whats[at - 2] != "sync"]


def all_kills(bench: Bench) -> list[tuple[Fault, bool]]:
    """Return a kill before every call that changes a file, and one inside every write."""
    return [
        (Fault(mode=mode, at=at), force)
        for force, calls in bench.calls.items()
        for mode in (KILL, TORN)
        for at in moments(bench, force=force)
        if mode == KILL or calls[at - 1][0] in ("write", "copy")
    ]


def kill(bench: Bench, fault: Fault, *, force: bool) -> Iterator[str]:
    """Kill a run, look at what is there, and run it again."""
    older, more = bench.begin(force=force)
    ran = bench.run(fault, *more)
    if ran.code != -9:
        yield f"it was to be killed, but ended with {ran.code}: {ran.said}"
    yield from _found(bench, older)
    yield from bench.runs_again(*more)


def kills(bench: Bench, number: int | None) -> Iterator[str]:
    """Kill runs at every moment, or at a seeded sample of them; then run them again."""
    for fault, force in sampled(all_kills(bench), number, bench):
        for problem in kill(bench, fault, force=force):
            yield f"{fault}, force {force}: {problem}"


def said_badly(ran: Ran) -> Iterator[str]:
    lines = [line for line in ran.said.splitlines() if not line.startswith("warning: ")]
    told = [line for line in lines if line.startswith("placer: ")]
    if "Traceback" in ran.said or len(told) != 1:
        yield f"it says {ran.said!r}"


def _said_falsely(bench: Bench, ran: Ran, older: State) -> Iterator[str]:
    now = state_of(bench.out) if bench.out.exists() else {}
    if "no result was written" in ran.said and now != older:
        yield f"it says {ran.said!r}, but a result is there"


def _left(bench: Bench) -> Iterator[str]:
    """Say what else lies there; an unfinished directory that can be gone on with may."""
    allowed = {bench.out.name}
    if bench.command.resumable:
        allowed |= {f"{bench.out.name}.placer-partial", f".{bench.out.name}.placer"}
    # A lock that a signal met before it was taken may be another's: it stays, empty.
    lock = bench.folder / f".{bench.out.name}.placer"
    if lock.exists() and not lock.stat().st_size:
        allowed.add(lock.name)
    if left := {path.name for path in bench.folder.iterdir()} - allowed:
        yield f"{left} is left"


def fail(bench: Bench, fault: Fault, *, must_fail: bool, force: bool) -> Iterator[str]:
    """Let a call fail: one sentence and nothing that looks complete, or no harm at all."""
    older, more = bench.begin(force=force)
    ran = bench.run(fault, *more)
    if ran.code == 0:
        if must_fail:
            yield "the failure is not told"
        if state_of(bench.out) != bench.expected:
            yield "it ends well with other bytes"
    elif ran.code != 1:
        yield f"it ends with {ran.code}: {ran.said}"
    else:
        yield from said_badly(ran)
        yield from _found(bench, older)
    yield from _left(bench)
    yield from bench.runs_again("--force")


#: Kinds of calls, how they fail, and whether the command must then fail.
FAILURES = (
    (CREATE, FAIL, errno.ENOSPC, True),
    (CREATE, FAIL, errno.EACCES, True),
    (WRITE, FAIL, errno.ENOSPC, True),
    (WRITE, FAIL_ON, errno.ENOSPC, True),
    (WRITE, FAIL, errno.EIO, True),
    (WRITE, SHORT, 0, False),
    (SYNC, FAIL, errno.EIO, True),
    (SYNC, FAIL, errno.ENOSPC, True),
    (RENAME, FAIL, errno.EIO, True),
    (RENAME, FAIL, errno.ENOSPC, True),
    (MKDIR, FAIL, errno.ENOSPC, False),
    (LINK, FAIL, errno.EPERM, False),
)


def failures(bench: Bench) -> list[tuple[Fault, bool, bool]]:
    """Return every failure of every call, whether it must be told, and ``force``.

    Where older output is replaced only the first, middle and last call of a kind fail, and
    every renaming: the others are made as without it. A copy by the kernel that fails with
    EIO is made by reading and writing, which some file systems need.
    """
    found = []
    for force, calls in bench.calls.items():
        for kind, mode, error, must_fail in FAILURES:
            last = sum(what in NAMES[kind] for what, *_ in calls)
            places = range(1, last + 1)
            if force and kind != RENAME:
                places = ends(places)
            copies = any(what == "copy" for what, *_ in calls)
            told = must_fail and not (copies and (kind, error) == (WRITE, errno.EIO))
            for at in places:
                fault = Fault(mode=mode, at=at, error=error, kinds=kind)
                found.append((fault, told, force))
    return found


def failing(bench: Bench, number: int | None) -> Iterator[str]:
    """Let calls fail once, all of them or a seeded sample of ``number``."""
    for fault, must_fail, force in sampled(failures(bench), number, bench):
        for problem in fail(bench, fault, must_fail=must_fail, force=force):
            yield f"{fault}, force {force}: {problem}"


def signalled(bench: Bench, number: int | None) -> Iterator[str]:
    """Send SIGTERM or SIGINT at every moment: one sentence, the code, nothing left."""
    every = [
        (at, force, ((TERMINATE, 143), (INTERRUPT, 130))[at % 2])
        for force in bench.calls
        for at in moments(bench, force=force)
    ]
    for at, force, (mode, code) in sampled(every, number, bench):
        older, more = bench.begin(force=force)
        ran = bench.run(Fault(mode=mode, at=at), *more)
        for problem in _after_signal(bench, ran, older, code):
            yield f"signal {code - 128} at {at}, force {force}: {problem}"


def _after_signal(bench: Bench, ran: Ran, older: State, code: int) -> Iterator[str]:
    # What came after the last step changes nothing any more.
    if ran.code not in (code, 0):
        yield f"it ends with {ran.code}: {ran.said}"
    if ran.code:
        yield from said_badly(ran)
        yield from _said_falsely(bench, ran, older)
    yield from _found(bench, older)
    yield from _left(bench)
    yield from bench.runs_again("--force")


#: How an input that vanishes, is forbidden or lies on a broken disk fails.
UNREADABLE = ((OPEN, errno.ENOENT), (OPEN, errno.EACCES), (READ, errno.EIO))


def all_unreadable(bench: Bench) -> list[Fault]:
    """Return how inputs can fail: at each opening, and the first, middle and last read."""
    found = []
    for kind, error in UNREADABLE:
        places: dict[str, list[int]] = {}
        names = [name for what, name, _ in bench.reads if what in NAMES[kind]]
        for at, name in enumerate(names, 1):
            places.setdefault(name, []).append(at)
        for every in places.values():
            for at in every if error == errno.ENOENT else ends(every):
                found.append(Fault(mode=FAIL, at=at, error=error, kinds=kind))
    return found


def unreadable(bench: Bench, number: int | None) -> Iterator[str]:
    """Let inputs vanish or be unreadable at any moment: it is told, or does no harm."""
    for fault in sampled(all_unreadable(bench), number, bench):
        bench.clear()
        words = bench.command.line(bench.inputs, bench.out)
        ran = bench.lab.run(words, bench.inputs, fault)
        found = state_of(bench.out) if bench.out.exists() else {}
        where = f"{fault}, {bench.file_of(fault)}"
        if ran.code == 0 and found != bench.expected:
            yield f"{where}: it ends well with other bytes"
        elif ran.code and ran.code != 1:
            yield f"{where}: it ends with {ran.code}: {ran.said}"
        elif ran.code:
            for problem in (*said_badly(ran), *_found(bench, {}), *_left(bench)):
                yield f"{where}: {problem}"


def read_only(bench: Bench) -> Iterator[str]:
    """Let nothing be created: the file system is read-only."""
    bench.clear()
    fault = Fault(mode=FAIL_ON, at=1, error=errno.EROFS, kinds=CREATE | MKDIR)
    yield from _told(bench, bench.run(fault), "Read-only file system")


def vanishing(bench: Bench) -> Iterator[str]:
    """Let the directory of the output vanish before the first flush."""
    bench.clear()
    ran = bench.with_planted("directory_vanishes").run()
    yield from _told(bench, ran, "No such file or directory")


def refused_beside_another(bench: Bench) -> list[str]:
    """Run a command whose target another process, this one, is writing."""
    bench.clear()
    with claimed(bench.out, directory=bench.command.directory):
        ran = bench.run(Fault(), "--force")
    return list(_told(bench, ran, "another process is writing"))


def _told(bench: Bench, ran: Ran, words: str) -> Iterator[str]:
    if ran.code != 1:
        yield f"it ends with {ran.code}"
        return
    yield from said_badly(ran)
    if words not in ran.said:
        yield f"it says {ran.said!r}"
    if bench.out.exists():
        yield "the target is there"
    if bench.folder.exists():
        yield from _left(bench)


def lost_by_power_cut(calls: Calls, out: Path) -> list[str]:
    """Return what a power cut could take of a target although the command has ended well.

    A file is safe if it was flushed after its last write; a name, if its directory was
    flushed after the renaming.
    """
    safe: set[str] = set()
    unnamed: dict[str, str] = {}
    for what, one, other in calls:
        if what in NAMES[WRITE]:
            safe.discard(one)
        elif what == "sync":
            safe.add(one)
            unnamed = {name: folder for name, folder in unnamed.items() if folder != one}
        elif what == "link":
            safe.add(other)
        elif what == "rename":
            safe = {_renamed(name, one, other) for name in safe}
            unnamed = {
                _renamed(name, one, other): _renamed(folder, one, other)
                for name, folder in unnamed.items()
            }
            unnamed[other] = str(Path(other).parent)
    files = [str(out / name) if name else str(out) for name in state_of(out)]
    return [
        *(f"the bytes of {name}" for name in files if name not in safe),
        *(f"the name {name}" for name in unnamed if name in (str(out), *files)),
    ]


def _renamed(name: str, one: str, other: str) -> str:
    return other + name[len(one) :] if name == one or name.startswith(f"{one}/") else name
