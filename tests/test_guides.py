"""The tutorial and the guides show real output, lead on, and name commands that exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from placer.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path
    for folder in ("start", "guides")
    for path in sorted((ROOT / "docs" / folder).glob("*.md"))
]
IDS = [path.stem for path in PAGES]
OPTION = re.compile(r"--[a-z][a-z0-9-]+")


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_output_is_that_of_commands_which_make_docs_runs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    made = re.findall(r"\[\[\[cog\n(.*?)\]\]\] -->\n(.*?)<!-- \[\[\[end", text, re.DOTALL)
    for source, output in made:
        commands = re.findall(r'console\.show\("(.+?)"', source)
        assert re.findall(r"^\$ (.+)$", output, re.MULTILINE) == commands
    assert text.count("```console") == sum(output.count("```console") for _, output in made)


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_a_page_ends_with_what_to_read_next(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\nNext: ") == 1
    assert text.rsplit("\n\n", 1)[1].startswith("Next: ")


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_commands_in_text_have_the_options_that_they_name(path: Path) -> None:
    """Those that are not run: their files do not ship."""
    text = path.read_text(encoding="utf-8")
    typed = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    named = re.findall(r"^(placer .+?)(?: +#.*)?$", typed, re.MULTILINE)
    named += re.findall(r"`(placer [^`\n]+)`", text)
    for line in named:
        command, words = typer.main.get_command(app), shlex.split(line)[1:]
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        known = {one for option in command.params for one in option.opts} | {"--help"}
        assert not getattr(command, "commands", {}) or not words or words[0].startswith("-")
        assert {word for word in words if OPTION.fullmatch(word)} <= known, line
