"""Every kind of file that placer writes, made in one process from relative paths.

Run in a directory that holds ``inputs``: writes ``out``.
"""

from pathlib import Path

from tests.faults.commands import COMMANDS, run

#: What is written, by the command of tests/faults that writes it. Recordings stand apart.
WRITTEN = [name for name in COMMANDS if not name.startswith("record")]


def walk(inputs: Path, out: Path) -> None:
    """Run all commands."""
    out.mkdir()
    for number, name in enumerate(WRITTEN):
        command = COMMANDS[name]
        run(*command.line(inputs, out / f"{number:02}{command.suffix}"))
    for name in ("trace", "counts", "exported", "plan.json"):
        run("inspect", inputs / name, "--html", out / f"{name}.html")
    # In either order these are the same counts.
    run("affinity", inputs / "other", inputs / "rest", "--out", out / "ab")


if __name__ == "__main__":
    walk(Path("inputs"), Path("out"))
