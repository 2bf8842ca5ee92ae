"""Every command refuses a pipe in place of a file, at once and in one sentence."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from placer.cli.main import main
from placer.trace import Trace

COMMANDS = {
    "inspect": "inspect PIPE",
    "inspect on": "inspect PLAN PIPE",
    "import npz": "import npz PIPE --out OUT",
    "import exflow": "import exflow PIPE --out OUT",
    "import csv": "import csv PIPE --out OUT",
    "import sglang": "import sglang-routed PIPE --model MODEL --out OUT",
    "import vllm": "import vllm-routed PIPE --out OUT",
    "import csv-loads": "import csv-loads PIPE --model MODEL --out OUT",
    "import sglang-stat": "import sglang-stat PIPE --model MODEL --out OUT",
    "record": "record MODEL --corpus PIPE --out OUT",
    "affinity --merge": "affinity --merge PIPE --out OUT",
    "solve": "solve PIPE --gpus-per-node 2 --out OUT",
    "solve --topology": "solve TRACE --gpus-per-node 2 --topology PIPE --out OUT",
    "solve --start": "solve TRACE --gpus-per-node 2 --start PIPE --out OUT",
    "tables": "tables PIPE TRACE --out OUT",
    "export": "export json PIPE --out OUT.json",
    "simulate": "simulate PIPE TRACE",
    "simulate --table": "simulate PLAN TRACE --table PIPE",
    "check": "check PIPE TRACE",
    "prove": "prove PIPE TRACE",
    "prove --check": "prove PLAN TRACE --check PIPE",
    "verify": "verify MODEL PIPE.pt PLAN",
    "advise": "advise PIPE --gpus-per-node 2 --engine sglang",
}


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """End a command that waits for a pipe to be written."""

    def end(*_: object) -> None:
        pytest.fail("it waits for the pipe")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_pipe_is_refused(
    name: str,
    tiny_model: Path,
    make_plan: Callable[..., Path],
    make_trace: Callable[..., Trace],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for suffix in ("", ".pt"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
    paths = {
        "PIPE": tmp_path / "pipe",
        "PIPE.pt": tmp_path / "pipe.pt",
        "OUT": tmp_path / "out",
        "OUT.json": tmp_path / "out.json",
        "MODEL": tiny_model,
        "PLAN": make_plan(tiny_model),
        "TRACE": make_trace().directory,
    }
    words = [str(paths.get(word, word)) for word in COMMANDS[name].split()]
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr()
    assert ended.value.code in (1, 2), printed.err
    assert "pipe" in printed.err.splitlines()[0]
    assert "Traceback" not in printed.err
    assert not paths["OUT"].exists()
