"""The lab, built once; inputs of every command."""

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


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[labs.Lab]:
    if shutil.which("cc") is None:
        pytest.skip("the shim needs a C compiler: sudo apt install gcc")
    with labs.opened(tmp_path_factory.mktemp("lab")) as one:
        yield one


MakeBench = Callable[..., Bench]


@pytest.fixture
def bench(lab: labs.Lab, inputs: Path, tmp_path: Path) -> MakeBench:
    """Return a maker of a bench for a command, by its name."""

    def make(name: str, planted: str = "") -> Bench:
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        return Bench(
            lab=lab, command=COMMANDS[name], inputs=inputs, folder=folder, planted=planted
        )

    return make
