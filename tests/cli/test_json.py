"""What ``--json`` prints is JSON, also where a figure does not exist."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from placer.cli.main import app
from placer.cli.output import print_json
from placer.errors import PlacerError
from placer.placement.reference import contiguous
from placer.trace import Trace

#: Little enough that means, intervals, shares and ratios have nothing to be made of.
LITTLE = {
    "one token": {"num_tokens": 1, "num_sequences": 1},
    "one sequence": {"num_tokens": 40, "num_sequences": 1},
    "one expert per token": {"num_tokens": 40, "top_k": 1},
    "every expert": {"num_tokens": 40, "top_k": 8},
    "sequences of one token": {"num_tokens": 60, "num_sequences": 45},
    "one layer": {"num_tokens": 40, "num_experts": (8,)},
}
QUICK = "--num-sweeps 1 --num-rounds 1"
COMMANDS = (
    "trace validate TRACE",
    "trace links TRACE",
    "trace sample TRACE --sequences 1 --out OUT/sample",
    "trace dedup TRACE --out OUT/dedup",
    "trace split TRACE --fold 0/2 --out OUT/split",
    "trace merge TRACE --out OUT/merged",
    "trace learning TRACE --gpus-per-node RANKS --tokens 10 --fold 0/2",
    "affinity TRACE --workers 1 --out OUT/counts",
    "advise TRACE --gpus-per-node RANKS",
    f"solve TRACE --gpus-per-node RANKS {QUICK} --relax-cap --out OUT/solved",
    f"solve TRACE --gpus-per-node RANKS {QUICK} --policy follow --out OUT/follow",
    "solve TRACE --gpus-per-node RANKS --objective balance --out OUT/balance",
    "solve OUT/counts --gpus-per-node RANKS --objective balance --out OUT/of_counts",
    "inspect TRACE",
    "inspect PLAN",
    "inspect OUT/counts",
    "tables PLAN TRACE --out OUT/table",
    "simulate PLAN TRACE",
    "simulate PLAN TRACE --hardware h100 --hidden-size 64 --expert-size 64",
    "simulate PLAN TRACE --table OUT/table",
    "prove PLAN TRACE --certificate OUT/certificate",
    "prove PLAN TRACE --check OUT/certificate",
    "check PLAN TRACE",
    "export json PLAN --out OUT/map.json",
)


def no_number(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("little", LITTLE)
def test_every_command_prints_json_of_what_is_hardly_there(
    little: str,
    ranks: int,
    make_trace: Callable[..., Trace],
    write_plan: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """A command answers with JSON, or refuses and prints none."""
    trace = make_trace(**LITTLE[little])
    plan = write_plan(trace.model, contiguous(trace.model.num_experts, ranks))
    (tmp_path / "out").mkdir()
    names = {
        "TRACE": str(trace.directory),
        "PLAN": str(plan),
        "OUT": str(tmp_path / "out"),
        "RANKS": str(ranks),
    }
    answered = 0
    for line in COMMANDS:
        for name, value in names.items():
            line = line.replace(name, value)
        found = CliRunner().invoke(app, [*line.split(), "--json"])
        assert isinstance(found.exception, PlacerError | SystemExit | None), line
        if found.stdout:
            json.loads(found.stdout, parse_constant=no_number)
            answered += 1


def test_what_is_no_number_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    nan, infinite = float("nan"), float("inf")
    print_json({"a": [nan, (1.5, -infinite)], "b": {"c": np.float64("nan"), "d": "NaN"}})
    printed = json.loads(capsys.readouterr().out, parse_constant=no_number)
    assert printed == {"a": [None, [1.5, None]], "b": {"c": None, "d": "NaN"}}
