"""Runs commands in forked children whose changes to a directory are counted and disturbed.

One process imports all that the commands need, once. For every run it forks a child, which
arms the shim (shim.c: it sees the system calls of every library) and calls ``main``.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

CREATE, WRITE, SYNC, RENAME, REMOVE, MKDIR, LINK = (1 << n for n in range(7))
EVERY = 127
NOTHING, KILL, TORN, FAIL, FAIL_ON, SHORT, TERMINATE, INTERRUPT = range(8)
_SECONDS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to the ``at``-th of the calls of some ``kinds``."""

    mode: int = NOTHING
    at: int = 0
    error: int = 0
    kinds: int = EVERY


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A run that ended: its code (negative: a signal), stderr, the calls that it made."""

    code: int
    said: str
    calls: tuple[tuple[str, str, str], ...]


class Lab:
    """Runs commands; every run is a child of one process."""

    def __init__(self, process: "subprocess.Popen[str]", scratch: Path) -> None:
        self._process, self._scratch = process, scratch

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
        job = {
            "words": [str(word) for word in words],
            "below": str(below.resolve()),
            "fault": [fault.mode, fault.at, fault.error, fault.kinds],
            "planted": planted,
            "memory": memory,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        lines = (self._scratch / "calls").read_text().splitlines()
        return Ran(
            code=code,
            said=(self._scratch / "said").read_text(),
            calls=tuple(tuple(line.split("\t")) for line in lines),
        )


def build_shim(folder: Path) -> Path:
    """Compile the shim; raises where there is no C compiler."""
    library = folder / "shim.so"
    words = ["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c", "-ldl"]
    subprocess.run(list(map(str, words)), check=True, capture_output=True)
    return library


def environment(shim: Path) -> dict[str, str]:
    """Return the environment of a process that loads the shim, on one thread."""
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | one | {"LD_PRELOAD": str(shim), "PYTHONPATH": paths}


@contextmanager
def opened(scratch: Path) -> Iterator[Lab]:
    """Yield a lab that keeps what it needs in ``scratch``."""
    with subprocess.Popen(
        [sys.executable, __file__, str(scratch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(build_shim(scratch)),
        cwd=scratch,
    ) as process:
        yield Lab(process, scratch)
        process.stdin.close()


def _import_all() -> None:
    import importlib
    import pkgutil

    import placer

    for module in pkgutil.walk_packages(placer.__path__, "placer."):
        if module.name not in ("placer.baseline.metis", "placer.baseline.mtkahypar"):
            importlib.import_module(module.name)
    from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM  # noqa: F401


def _child(job: dict[str, object], scratch: Path) -> None:
    """Run a command with its fault; never returns."""
    from placer.cli.main import main
    from tests.faults import planted

    signal.alarm(_SECONDS)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = open(scratch / "said", "w", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    calls = os.open(scratch / "calls", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if job["planted"]:
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


def _serve(scratch: Path) -> None:
    sys.path.insert(0, str(ROOT))
    _import_all()
    for line in sys.stdin:
        job = json.loads(line)
        for name in ("said", "calls"):
            (scratch / name).write_text("")
        child = os.fork()
        if not child:
            _child(job, scratch)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(1, f"{code}\n".encode())


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
