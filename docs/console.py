"""Real commands and their real output, for the cog blocks of the documentation.

A block of a page reads::

    <!-- [[[cog
    import console
    console.show("placer --version")
    ]]] -->
    <!-- [[[end]]] -->

``make docs`` fills in what the commands print, and ``make check`` fails where the text
and the commands no longer agree. Commands run at the root of the repository; what they
write belongs below ``build/``. A command that several pages show runs once.
"""

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import cog

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100
_FENCE = "```"
# What a log file is told now and then, which depends on the machine.
_PROGRESS = re.compile(r"\w+, after \d+ s(: |$)")


def show(command: str, *, varies: bool = False, exit_code: int = 0) -> None:
    """Write a shell command and what it prints, as a ``console`` block.

    Parameters
    ----------
    command
        One shell command, as a reader would type it at the root of the repository.
    varies
        The figures differ by machine or run, such as seconds. The text that already
        stands there is kept where it differs in figures alone.
    exit_code
        What the command must exit with.

    Raises
    ------
    RuntimeError
        If it exits with another code: documentation does not show accidents.
    """
    printed = _run(command, exit_code)
    if varies:
        previous = _previous(command)
        if previous is not None and _masked(previous) == _masked(printed):
            printed = previous
    cog.outl(f"{_FENCE}console\n$ {command}\n{printed}{_FENCE}")


def show_commands() -> None:
    """Write a section with the help of every command of ``placer``."""
    for words in command_names():
        cog.outl(f"\n## {' '.join(words)}\n")
        help_of(*words[1:])


def help_of(*command: str) -> None:
    """Write what ``placer COMMAND --help`` prints."""
    cog.outl(f"{_FENCE}text\n{_run(' '.join(['placer', *command, '--help']))}{_FENCE}")


def families() -> None:
    """Write the table of model families, from their data files."""
    from placer.model import known_architectures

    rows = []
    for one in known_architectures():
        recorded, exported = "recorded", "permuted checkpoint"
        if one.unsupported:
            recorded, exported = (
                f"refused: {one.unsupported}",
                "refused for the same reason",
            )
        elif one.unrecorded:
            recorded = f"refused: {one.unrecorded}"
        if one.layout is None and not one.unsupported:
            exported = "refused: the names of its tensors are not known"
        rows += [(model_type, recorded, exported) for model_type in one.model_types]
    cog.outl(
        "| `model_type` | `placer record` | `placer export checkpoint` |\n|---|---|---|"
    )
    for model_type, recorded, exported in sorted(rows):
        cog.outl(f"| `{model_type}` | {recorded} | {exported} |")


def engines() -> None:
    """Write the table of engines, from their data file, and their conditions."""
    from placer.target.engine import known_engines

    cog.outl(
        "| `--engine` | run for | dispatch | combine | replica choice | `placer export` |\n"
        "|---|---|---|---|---|---|"
    )
    for engine in known_engines().values():
        ways = [f"{w.exchange}, {w.element}" for w in (engine.dispatch, engine.combine)]
        cells = [f"`{engine.name}`", ", ".join(engine.phases), *ways]
        cells += [engine.replica_choice or "none", engine.map_format]
        cog.outl(f"| {' | '.join(cells)} |")
    for engine in known_engines().values():
        cog.outl(
            f"\n**`{engine.name}`**: {engine.selected_by}. {' '.join(engine.notes)} "
            f"What it sends was read in {engine.read_in}; see <{engine.source}>."
        )


@cache
def clear(directory: str) -> None:
    """Remove what an earlier run wrote below ``build/``: placer overwrites nothing.

    What this run wrote is kept: pages that share a directory share its commands.
    """
    path = (ROOT / directory).resolve()
    if not path.is_relative_to(ROOT / "build") or path == ROOT / "build":
        raise RuntimeError(f"{directory} is not below build/")
    shutil.rmtree(path, ignore_errors=True)


def command_names() -> list[tuple[str, ...]]:
    """Return all commands, ``placer`` first, each as its words."""
    import typer.main

    from placer.cli.main import app

    found: list[tuple[str, ...]] = []

    def visit(words: tuple[str, ...], command: object) -> None:
        found.append(words)
        for name, child in getattr(command, "commands", {}).items():
            visit((*words, name), child)

    visit(("placer",), typer.main.get_command(app))
    return found


@cache
def _run(command: str, exit_code: int = 0) -> str:
    """Return stdout and stderr in the order of printing, as a terminal would show them."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    environment = kept | {
        "COLUMNS": str(WIDTH),
        "NO_COLOR": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "TERM": "dumb",
    }
    done = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode != exit_code:
        raise RuntimeError(
            f"{command!r} exited with {done.returncode}, not {exit_code}:\n{done.stdout}"
        )
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "".join(f"{line}\n" for line in lines if not _PROGRESS.match(line))


def _previous(command: str) -> str | None:
    """Return what the document shows of this command now."""
    start = f"{_FENCE}console\n$ {command}\n"
    _, found, rest = cog.previous.partition(start)
    return rest.partition(_FENCE)[0] if found else None


def _masked(text: str) -> str:
    """Replace figures, and the spaces that align them, by marks."""
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", text))
