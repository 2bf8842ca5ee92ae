"""Mistakes in the command line are told in one sentence, as all errors are."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

from placer.cli.examples import EXAMPLES
from placer.cli.main import app, main
from placer.trace import Trace

Captured = pytest.CaptureFixture[str]
GROUP = typer.main.get_command(app)
COMMANDS = sorted(set(GROUP.commands) - {"trace"}) + [
    f"trace {name}" for name in sorted(GROUP.commands["trace"].commands)
]


def said(line: str, capsys: Captured) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line))
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    message, hint = told.err.splitlines()
    assert message.startswith("placer: ")
    assert hint.startswith("hint: ")
    return [message.removeprefix("placer: "), hint.removeprefix("hint: ")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("replay PLAN MODEL", "--trace is missing"),
        ("check plan", "TRACE|AFFINITY is missing"),
        ("simulate", "PLAN is missing"),
        ("trace sample x --sequences 2", "--out is missing"),
        ("verify a b c d", "placer verify was given an argument too many: d"),
        ("inspect a --zzz", "placer inspect has no option --zzz"),
        ("solve x --nodes 0", "--nodes must be at least 1, got 0"),
        ("solve x --gpus-per-node a", "--gpus-per-node must be a whole number, got a"),
        ("record x --out", "option '--out' requires an argument"),
        ("trace sample x --out", "option '--out' requires an argument"),
        ("trace zzz", "no such command 'zzz'"),
        ("--zzz", "placer has no option --zzz"),
    ],
)
def test_mistakes(line: str, message: str, capsys: Captured) -> None:
    told, hint = said(line, capsys)
    assert told == message
    assert hint.endswith("--help")


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("solv x", "no such command 'solv'", "did you mean 'solve'?"),
        (
            "solve x --num-sweep 3",
            "placer solve has no option --num-sweep",
            "did you mean --num-sweeps or --num-rounds?",
        ),
        (
            "import x.npz npz",
            "x.npz is not a format, but npz is: the format comes first",
            "placer import npz x.npz --out OUT",
        ),
    ],
)
def test_what_was_meant_is_offered(
    line: str, message: str, hint: str, capsys: Captured
) -> None:
    assert said(line, capsys) == [message, hint]


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("export sglnag plan.json", "sglang"),
        ("import npy x", "npz"),
        ("trace split . --phase decod", "decode"),
    ],
)
def test_near_misses_of_values_are_offered(
    line: str,
    near: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_trace: Callable[..., Trace],
    capsys: Captured,
) -> None:
    monkeypatch.chdir(make_trace().directory)
    for name in ("plan.json", "x"):
        Path(name).write_text("{}")
    told = said(f"{line} --out {tmp_path / 'out'}", capsys)
    assert told[1].startswith(f"did you mean {near}? ")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_example_and_the_help_follow(command: str, capsys: Captured) -> None:
    _, hint = said(f"{command} --zzz", capsys)
    example = EXAMPLES[command.split()[-1]][0]
    assert hint == f"for example: {example}; all options: placer {command} --help"
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert re.search(r"^Usage: placer", capsys.readouterr().out)
