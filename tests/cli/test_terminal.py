"""Tables and verdicts fit 80 columns; only a terminal gets emphasis."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from placer.cli.main import main
from placer.cli.terminal import emphasised, table_lines, wrapped
from placer.trace import Trace


def test_columns_that_do_not_fit_follow_under_the_same_names() -> None:
    columns = ("placement", "tokens/rank", *(f"figure number {n}" for n in range(6)))
    rows = [("plan", 64, *(n / 7 for n in range(6))), ("eplb", 256, *[1.5] * 6)]
    lines = [*table_lines(columns, rows)]
    assert max(map(len, lines)) <= 80
    parts = "\n".join(lines).split("\n\n")
    assert len(parts) > 1
    for part in parts:
        assert [line.split()[:2] for line in part.splitlines()[1:]] == [
            *(["plan", "64"], ["eplb", "256"])
        ]
    shown = re.findall(r"figure number \d", "\n".join(lines))
    assert shown == list(columns[2:]), "each figure once, in order"
    values = [float(one) for part in parts for one in part.splitlines()[1].split()[2:]]
    assert values == [round(n / 7, 3) for n in range(6)]


def test_a_long_text_goes_on_and_a_path_is_never_cut() -> None:
    path = "/" + "x" * 90
    told = [*table_lines(("fact", ""), [("words", "word " * 30), ("out", path)])]
    assert [len(line) <= 80 for line in told] == [*[True] * (len(told) - 1), False]
    assert " ".join(told).split().count("word") == 30
    assert told[-1].split() == ["out", path]


def test_a_percentage_stays_in_one_line() -> None:
    for shift in range(8):
        text = f"{'x' * (70 + shift)} the load is -0.2 % less"
        assert "-0.2 %" in wrapped(text)


@pytest.mark.parametrize(
    ("terminal", "no_color", "plain"),
    [(True, "", False), (True, "1", True), (False, "", True)],
)
def test_emphasis(
    terminal: bool, no_color: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    told = [emphasised("words", is_better=one) for one in (True, False, None)]
    assert (set(told) == {"words"}) is plain
    assert all("words" in one for one in told) and len({*told}) == (1 if plain else 3)


def test_what_commands_print_fits_80_columns(
    make_trace: Callable[..., Trace],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The answer comes first; only commands and paths to copy may be longer."""
    make_trace(num_sequences=80)
    monkeypatch.chdir(tmp_path)
    for line in (
        "advise trace --gpus-per-node 4",
        "solve trace --gpus-per-node 4 --fold 0/2 --out plan.json",
        "simulate plan.json trace --not-fold 0/2",
        "simulate plan.json trace --not-fold 0/2 --engine sglang",
        "check plan.json trace --not-fold 0/2",
        "inspect plan.json",
        "inspect trace",
        "affinity trace --out counts.safetensors",
        "export json plan.json --out map.json",
    ):
        details = any(word in line for word in ("advise", "solve", "simulate", "inspect"))
        for more in ([], ["--details", *["--force"] * ("--out" in line)])[: 1 + details]:
            with pytest.raises(SystemExit) as ended:
                main([*line.split(), *more])
            told = capsys.readouterr()
            assert ended.value.code == 0, told.err
            lines = told.out.splitlines()
            long = [
                one
                for one in lines
                if len(one) > 80
                and not one.startswith(("next: ", "then, "))
                and " " in one.split("  ")[-1].strip()
            ]
            assert long == [], line
            assert more or "sglang" in line or len(lines) <= 25, line
