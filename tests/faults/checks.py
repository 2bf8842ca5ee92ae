"""What must hold after a disturbed run; each check returns what is wrong, in words."""

import errno
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.commands import Command
from tests.faults.lab import (
    CREATE,
    EVERY,
    FAIL,
    FAIL_ON,
    INTERRUPT,
    KILL,
    LINK,
    MKDIR,
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
Calls = tuple[tuple[str, str, str], ...]


def state_of(place: Path) -> State:
    """Return every file below (or at) a path by its name, with its bytes."""
    if place.is_file():
        return {"": place.read_bytes()}
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


@dataclass(slots=True, kw_only=True)
class Bench:
    """A command in a directory of its own, and what it writes undisturbed.

    Attributes
    ----------
    planted
        The fault of ``planted.py`` that runs have.
    """

    lab: Lab
    command: Command
    inputs: Path
    folder: Path
    planted: str = ""
    expected: State = field(default_factory=dict)
    undisturbed: Ran = field(init=False)

    def __post_init__(self) -> None:
        self.undisturbed = self.run()
        if self.undisturbed.code:
            raise RuntimeError(self.undisturbed.said)
        self.expected = state_of(self.out)
        self.clear()

    @property
    def out(self) -> Path:
        return self.folder / f"out{self.command.suffix}"

    def run(self, fault: Fault | None = None, *more: str) -> Ran:
        """Run the command, with the planted fault once it is known what is expected."""
        words = self.command.line(self.inputs, self.out, *more)
        planted = self.planted if self.expected else ""
        return self.lab.run(words, self.folder, fault, planted=planted)

    def lost(self) -> list[str]:
        """Return what a power cut could take after the command has ended well."""
        return lost_by_power_cut(self.run(Fault()).calls, self.out)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def put_older(self) -> State:
        """Put there what an earlier run may have written; return it."""
        self.clear()
        for name, content in self.expected.items():
            path = self.out / name if name else self.out
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content + b"older")
        return state_of(self.out)


def _found(bench: Bench, older: State) -> Iterator[str]:
    """Say how the target is neither as before nor complete."""
    found = state_of(bench.out) if bench.out.exists() else {}
    if found not in (older, bench.expected):
        hidden = [state_of(path) for path in bench.folder.glob(".out*") if path.is_dir()]
        if found or older not in hidden:
            yield f"the target is neither as before nor complete: {sorted(found)}"


def kill(bench: Bench, fault: Fault, *, force: bool) -> Iterator[str]:
    """Kill a run, look at what is there, and run it again."""
    older = bench.put_older() if force else {}
    more = ["--force"] if force else []
    ran = bench.run(fault, *more)
    # With --force it may make a call less, and end before its turn.
    if ran.code != -9 and (ran.code or len(ran.calls) >= fault.at):
        yield f"it was to be killed, but ended with {ran.code}: {ran.said}"
    yield from _found(bench, older)
    if not force and bench.out.exists():
        shutil.rmtree(bench.out) if bench.out.is_dir() else bench.out.unlink()
    again = bench.run(None, *more)
    if again.code:
        yield f"run again it fails: {again.said}"
    elif state_of(bench.out) != bench.expected:
        yield "run again it writes other bytes"
    bench.clear()


def kills(bench: Bench, number: int, seed: int) -> Iterator[str]:
    """Kill runs at seeded calls, in the middle of writes too; half replace older output."""
    rng = random.Random(seed)
    last = len(bench.undisturbed.calls)
    for n in range(number):
        # The last calls name the result and let go of the lock.
        at = rng.randint(1, last) if n % 3 else last - rng.randrange(min(last, 6))
        fault = Fault(mode=rng.choice((KILL, TORN)), at=at)
        for problem in kill(bench, fault, force=bool(n % 2) and bench.command.replaceable):
            yield f"{fault}: {problem}"


def _said_badly(ran: Ran) -> Iterator[str]:
    lines = [line for line in ran.said.splitlines() if not line.startswith("warning: ")]
    told = [line for line in lines if line.startswith("placer: ")]
    if "Traceback" in ran.said or len(told) != 1:
        yield f"it says {ran.said!r}"


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


def _runs_again(bench: Bench) -> Iterator[str]:
    """Say how a run without a fault does not write what is expected."""
    if not bench.command.replaceable and bench.out.exists():
        shutil.rmtree(bench.out)
    again = bench.run(None, "--force")
    if again.code or state_of(bench.out) != bench.expected:
        yield f"run again: {again.code} {again.said}"


def fail(bench: Bench, fault: Fault, *, must_fail: bool, force: bool) -> Iterator[str]:
    """Let a call fail: one sentence and nothing that looks complete, or no harm at all."""
    older = bench.put_older() if force else {}
    more = ["--force"] if force else []
    ran = bench.run(fault, *more)
    if ran.code == 0:
        if must_fail:
            yield "the failure is not told"
        if state_of(bench.out) != bench.expected:
            yield "it ends well with other bytes"
    elif ran.code != 1:
        yield f"it ends with {ran.code}: {ran.said}"
    else:
        yield from _said_badly(ran)
        yield from _found(bench, older)
    yield from _left(bench)
    yield from _runs_again(bench)
    bench.clear()


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
_NAMES = {
    CREATE: ("create",),
    WRITE: ("write", "copy"),
    SYNC: ("sync",),
    RENAME: ("rename",),
    MKDIR: ("mkdir",),
    LINK: ("link",),
}


def failures(bench: Bench) -> list[tuple[Fault, bool]]:
    """Return every failure of every call that an undisturbed run makes."""
    calls = [what for what, *_ in bench.undisturbed.calls]
    return [
        (Fault(mode=mode, at=at, error=error, kinds=kind), must_fail)
        for kind, mode, error, must_fail in FAILURES
        for at in range(1, sum(what in _NAMES[kind] for what in calls) + 1)
    ]


def failing(bench: Bench, number: int | None, seed: int) -> Iterator[str]:
    """Let calls fail once, all of them or a seeded sample of ``number``."""
    chosen = failures(bench)
    if number is not None and number < len(chosen):
        chosen = random.Random(seed).sample(chosen, number)
    for n, (fault, must_fail) in enumerate(chosen):
        force = bool(n % 2) and bench.command.replaceable
        for problem in fail(bench, fault, must_fail=must_fail, force=force):
            yield f"{fault}: {problem}"


def signalled(bench: Bench, number: int, seed: int) -> Iterator[str]:
    """Send SIGTERM or SIGINT at seeded calls: one word, the right code, nothing left."""
    rng = random.Random(seed)
    last = len(bench.undisturbed.calls)
    for n in range(number):
        mode, code = ((TERMINATE, 143), (INTERRUPT, 130))[n % 2]
        fault = Fault(mode=mode, at=rng.randint(1, last), kinds=EVERY)
        force = bool(n // 2 % 2) and bench.command.replaceable
        older = bench.put_older() if force else {}
        ran = bench.run(fault, *(["--force"] if force else []))
        for problem in _after_signal(bench, ran, older, code):
            yield f"{fault}, force {force}: {problem}"
        bench.clear()


def _after_signal(bench: Bench, ran: Ran, older: State, code: int) -> Iterator[str]:
    # What came after the last step changes nothing any more.
    if ran.code not in (code, 0):
        yield f"it ends with {ran.code}: {ran.said}"
    if ran.code:
        yield from _said_badly(ran)
    yield from _found(bench, older)
    yield from _left(bench)
    yield from _runs_again(bench)


def lost_by_power_cut(calls: Calls, out: Path) -> list[str]:
    """Return what a power cut could take of a target although the command has ended well.

    A file is safe if it was flushed after its last write; a name, if its directory was
    flushed after the renaming.
    """
    safe: set[str] = set()
    unnamed: dict[str, str] = {}
    for what, one, other in calls:
        if what in ("write", "copy"):
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
