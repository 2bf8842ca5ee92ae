"""Runs commands in forked children whose calls on files are counted and disturbed.

One process runs each command once, undisturbed: this imports and compiles what it needs.
For every further run the process forks a child, which arms the shim (shim.c: it sees the
system calls of every library) and calls ``main``.
"""

import ctypes
import errno
import gc
import io
import json
import os
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

CREATE, WRITE, SYNC, RENAME, REMOVE, MKDIR, LINK, OPEN, READ = (1 << n for n in range(9))
#: All that changes files, and all that reads them.
EVERY, READING = 127, OPEN | READ
#: What the log calls each kind.
NAMES = {
    CREATE: ("create",),
    WRITE: ("write", "copy", "truncate"),
    SYNC: ("sync",),
    RENAME: ("rename",),
    REMOVE: ("remove",),
    MKDIR: ("mkdir",),
    LINK: ("link",),
    OPEN: ("open",),
    READ: ("read",),
}
NOTHING, KILL, TORN, FAIL, FAIL_ON, SHORT, TERMINATE, INTERRUPT = range(8)
_MODES = ("undisturbed", "killed", "killed in a write", "fails", "fails from then on")
_MODES += ("short write", "SIGTERM", "Ctrl-C")
_SECONDS = 300

#: How many runs there were of each kind, and the CPU seconds of all of them.
RUNS: "Counter[str]" = Counter()
SPENT = [0.0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to the ``at``-th of the calls of some ``kinds``."""

    mode: int = NOTHING
    at: int = 0
    error: int = 0
    kinds: int = EVERY

    @property
    def name(self) -> str:
        """What happens, without the place: for counting."""
        if self.mode not in (FAIL, FAIL_ON):
            return _MODES[self.mode]
        what = " or ".join(NAMES[kind][0] for kind in NAMES if kind & self.kinds)
        return f"{what} {_MODES[self.mode]} with {errno.errorcode[self.error]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A run that ended: its code (negative: a signal), stderr, the calls that it made."""

    code: int
    said: str
    calls: tuple[tuple[str, str, str], ...]


class Lab:
    """Runs commands; every run is a child of one process."""

    def __init__(self, process: "subprocess.Popen[str]", shim: Path, scratch: Path) -> None:
        self._process, self._shim, self._scratch = process, shim, scratch
        self._warm: set[str] = set()

    def run(
        self,
        words: Sequence[object],
        below: Path,
        fault: Fault | None = None,
        *,
        planted: str = "",
        memory: int = 0,
    ) -> Ran:
        """Run a command; count and disturb what it does to files ``below`` a directory."""
        fault = fault or Fault()
        self._ask(_job(words, below, fault, planted=planted, memory=memory))
        RUNS[
            "with a planted fault" if planted else "little memory" if memory else fault.name
        ] += 1
        return self._ran(self._process.stdout.readline())

    def warm_up(self, words: Sequence[object]) -> None:
        """Run a command in the process itself, so that its children need not prepare."""
        self._ask({"warm": [str(word) for word in words]})
        if said := json.loads(self._process.stdout.readline()):
            raise RuntimeError(said)

    def run_fresh(self, words: Sequence[object], below: Path) -> Ran:
        """Run a command in a process of its own, with what a user's process has."""
        job = json.dumps(_job(words, below, Fault()))
        done = subprocess.run(
            [sys.executable, __file__, str(self._scratch), job],
            env=environment(self._shim),
            cwd=self._scratch,
            check=False,
        )
        return self._ran(f"{done.returncode} 0")

    def _ask(self, job: dict[str, object]) -> None:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def _ran(self, answer: str) -> Ran:
        code, seconds = answer.split()
        SPENT[0] += float(seconds)
        lines = (self._scratch / "calls").read_text().splitlines()
        return Ran(
            code=int(code),
            said=(self._scratch / "said").read_text(),
            calls=tuple(tuple(line.split("\t")) for line in lines),
        )


def _job(
    words: Sequence[object],
    below: Path,
    fault: Fault,
    *,
    planted: str = "",
    memory: int = 0,
) -> dict[str, object]:
    return {
        "words": [str(word) for word in words],
        "below": str(below.resolve()),
        "fault": [fault.mode, fault.at, fault.error, fault.kinds],
        "planted": planted,
        "memory": memory,
    }


def build_shim(folder: Path) -> Path:
    """Compile the shim; raises where there is no C compiler."""
    library = folder / "shim.so"
    words = ["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c", "-ldl"]
    subprocess.run(list(map(str, words)), check=True, capture_output=True)
    return library


def environment(shim: Path) -> dict[str, str]:
    """Return the environment of a process that loads the shim, on one thread."""
    # Threads do not live on in a forked child.
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    one |= {"TOKENIZERS_PARALLELISM": "false"}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | one | {"LD_PRELOAD": str(shim), "PYTHONPATH": paths}


@contextmanager
def opened(scratch: Path) -> Iterator[Lab]:
    """Yield a lab that keeps what it needs in ``scratch``."""
    shim = build_shim(scratch)
    with subprocess.Popen(
        [sys.executable, __file__, str(scratch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(shim),
        cwd=scratch,
    ) as process:
        yield Lab(process, shim, scratch)
        process.stdin.close()


def _child(job: dict[str, object], scratch: Path) -> None:
    """Run a command with its fault; never returns."""
    from placer.cli.main import main

    signal.alarm(_SECONDS)
    # In the background of a shell Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = open(scratch / "said", "w", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    calls = os.open(scratch / "calls", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if job["planted"]:
        from tests.faults import planted

        getattr(planted, str(job["planted"]))()
    if job["memory"]:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        limit = used + int(str(job["memory"]))
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    mode, at, error, kinds = job["fault"]
    arm = ctypes.CDLL(None).fault_arm
    arm.argtypes = [ctypes.c_char_p, *[ctypes.c_int, ctypes.c_long], *[ctypes.c_int] * 3]
    arm(os.fsencode(str(job["below"])), mode, at, error, kinds, calls)
    code = 99
    try:
        main(job["words"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _warm_up(words: list[str]) -> str:
    """Run a command in this process; return what it says where it fails."""
    from placer.cli.main import main

    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        try:
            main(words)
        except SystemExit as ended:
            return said.getvalue() if ended.code else ""
        finally:
            # Children then leave what is there alone, and it need not be copied.
            gc.collect()
            gc.freeze()
    return ""


def _serve(scratch: Path) -> None:
    import typer.main

    # The tree of all commands is the same in every run, and takes longer than most of them.
    typer.main.get_command = cache(typer.main.get_command)
    for line in sys.stdin:
        job = json.loads(line)
        if "warm" in job:
            os.write(1, f"{json.dumps(_warm_up(job['warm']))}\n".encode())
            continue
        for name in ("said", "calls"):
            (scratch / name).write_text("")
        child = os.fork()
        if not child:
            _child(job, scratch)
        _, status, used = os.wait4(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os.write(1, f"{code} {used.ru_utime + used.ru_stime}\n".encode())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if len(sys.argv) > 2:
        _child(json.loads(sys.argv[2]), Path(sys.argv[1]))
    _serve(Path(sys.argv[1]))
