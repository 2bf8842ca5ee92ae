"""``--help`` is instant and complete: no heavy library is imported, nothing is unnamed."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

import placer
from placer.cli.examples import EXAMPLES
from placer.cli.headings import HEADINGS
from placer.cli.main import app, main
from placer.cli.usage import TOPICS

HEAVY = ("numpy", "ortools", "pandas", "plotly", "safetensors", "torch", "transformers")

ASK_FOR_HELP = f"""
import sys
from placer.cli.main import main
try:
    main([*sys.argv[1:], "--help"])
finally:
    loaded = sorted(set({HEAVY!r}) & set(sys.modules))
    sys.stderr.write("loaded: " + " ".join(loaded))
"""


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands, ``placer`` itself first, each with the words that call it."""

    def visit(
        words: tuple[str, ...], command: Any
    ) -> Iterator[tuple[tuple[str, ...], Any]]:
        yield words, command
        for name, child in getattr(command, "commands", {}).items():
            yield from visit((*words, name), child)

    yield from visit((), typer.main.get_command(app))


def name(words: tuple[str, ...]) -> str:
    return " ".join(("placer", *words))


COMMANDS = dict(commands())
LEAVES = {words: one for words, one in COMMANDS.items() if not hasattr(one, "commands")}


@pytest.mark.parametrize("words", COMMANDS, ids=name)
def test_help_answers_without_heavy_imports(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK_FOR_HELP, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: {name(words)} ")
    assert done.stderr == "loaded: "


@pytest.mark.parametrize("words", LEAVES, ids=name)
def test_command_and_every_option_say_what_they_do(words: tuple[str, ...]) -> None:
    command = LEAVES[words]
    assert command.help, f"{name(words)} has no help"
    unnamed = [one.name for one in command.params if not getattr(one, "help", None)]
    assert not unnamed, f"{name(words)}: no help for {', '.join(unnamed)}"


@pytest.mark.parametrize("words", LEAVES, ids=name)
def test_every_command_has_json_and_kebab_case_options(words: tuple[str, ...]) -> None:
    options = {flag for one in LEAVES[words].params for flag in (*one.opts,)}
    assert "--json" in options
    assert not [flag for flag in options if flag.startswith("--") and "_" in flag]


@pytest.mark.parametrize("words", LEAVES, ids=name)
def test_help_ends_with_examples_that_fit_the_screen(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines that a shell joins again; ``tests/test_hints.py`` parses each of them."""
    with pytest.raises(SystemExit) as done:
        main([*words, "--help"])
    assert done.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = "\n".join(lines[lines.index("Examples:") + 1 :])
    joined = re.sub(r" \\\n *", " ", shown)
    assert [line.strip() for line in joined.splitlines()] == [*EXAMPLES[words[-1]]]
    assert all(f"{name(words)} " in one for one in EXAMPLES[words[-1]])


@pytest.mark.parametrize("words", COMMANDS, ids=name)
def test_lists_of_commands_show_whole_sentences(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    lines = capsys.readouterr().out.splitlines()[1:]
    children = getattr(COMMANDS[words], "commands", {})
    listed = [
        line
        for line in lines
        if line[2:].partition(" ")[0] in children and line[2:3] != " "
    ]
    assert len(listed) == len(children)
    assert not [line for line in listed if line.endswith("...")]


def test_every_command_stands_under_one_topic() -> None:
    named = [name for names in TOPICS.values() for name in names]
    assert sorted(named) == sorted(COMMANDS[()].commands)


@pytest.mark.parametrize("words", [*HEADINGS])
def test_headings_name_options_that_exist_once(words: str) -> None:
    named = [name for names in HEADINGS[words].values() for name in names]
    assert len(named) == len(set(named))
    assert {*named} <= {one.name for one in COMMANDS[(words,)].params}


@pytest.mark.parametrize("words", COMMANDS, ids=name)
def test_the_short_option_of_help_works_everywhere(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for option in ("-h", "--help"):
        with pytest.raises(SystemExit) as done:
            main([*words, option])
        assert done.value.code == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and told[0].startswith("Usage: ")


def test_the_version_names_what_plans_depend_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    first, python, *libraries = capsys.readouterr().out.splitlines()
    assert first == f"placer {placer.__version__}"
    assert python.startswith("Python 3.")
    assert [line.partition(" ")[0] for line in libraries] == [
        *("torch", "ortools", "numba", "numpy")
    ]
