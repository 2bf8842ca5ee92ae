"""A lab for each module; benches of every command; what was counted."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import lab as labs
from tests.faults.checks import Bench
from tests.faults.commands import COMMANDS, make_inputs


@pytest.fixture(scope="session")
def inputs(tiny_sharded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(tiny_sharded_model, folder)
    return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[labs.Lab]:
    if shutil.which("cc") is None:
        pytest.skip("the shim needs a C compiler: sudo apt install gcc")
    with labs.opened(tmp_path_factory.mktemp("lab")) as one:
        yield one


MakeBench = Callable[[str], Bench]


@pytest.fixture(scope="module")
def bench(
    lab: labs.Lab, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> MakeBench:
    """Return a maker of a bench for a command, by its name."""
    benches: dict[str, Bench] = {}

    def make(name: str) -> Bench:
        if name not in benches:
            folder = tmp_path_factory.mktemp("bench") / "folder"
            benches[name] = Bench(
                lab=lab, command=COMMANDS[name], inputs=inputs, folder=folder
            )
        benches[name].clear()
        return benches[name]

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many runs there were of each kind."""
    for name, number in sorted(labs.RUNS.items()):
        terminalreporter.write_line(f"{number:6,} x {name}")
    if labs.RUNS:
        terminalreporter.write_line(f"{labs.SPENT[0]:,.0f} CPU seconds of these runs")
