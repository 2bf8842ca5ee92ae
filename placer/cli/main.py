"""The entry point: all commands, and one place where errors become exit codes."""

import errno
import io
import os
import platform
import signal
import sys
from collections.abc import Sequence

import typer

from placer import PlacerError, __version__
from placer.cli.advise import advise
from placer.cli.affinity import affinity
from placer.cli.calibrate import calibrate
from placer.cli.check import check
from placer.cli.demo import demo
from placer.cli.export import export
from placer.cli.import_ import import_
from placer.cli.inputs import InputCommand
from placer.cli.inspect import inspect
from placer.cli.learning import learning
from placer.cli.links import links
from placer.cli.prove import prove
from placer.cli.record import record
from placer.cli.replay import replay
from placer.cli.simulate import simulate
from placer.cli.solve import solve
from placer.cli.tables import tables
from placer.cli.trace import trace_app
from placer.cli.usage import UsageGroup
from placer.cli.verify import verify
from placer.run.worker import fails_first

app = typer.Typer(
    name="placer",
    cls=UsageGroup,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


#: Their versions say what may differ between two machines.
_BUILT_ON = ("torch", "ortools", "numba", "numpy")


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    typer.echo(f"placer {__version__}")
    typer.echo(f"Python {platform.python_version()} on {platform.platform()}")
    for name in _BUILT_ON:
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} is not installed")
    raise typer.Exit


@app.callback()
def _common(
    version: bool = typer.Option(
        False,
        "--version",
        callback=_print_version,
        is_eager=True,
        help="Print the versions of placer, Python and the main libraries.",
    ),
) -> None:
    """Decide which rank holds which expert of a Mixture-of-Experts model.

    The usual steps: record or import a trace, then advise, solve, export and verify. placer
    demo runs all steps on a small model. docs/glossary.md explains the terms.
    """


app.command("record", cls=InputCommand)(record)
app.command("import", cls=InputCommand)(import_)
trace_app.command("links", cls=InputCommand)(links)
trace_app.command("learning", cls=InputCommand)(learning)
app.add_typer(trace_app, name="trace")
app.command("affinity", cls=InputCommand)(affinity)
app.command("advise", cls=InputCommand)(advise)
app.command("solve", cls=InputCommand)(solve)
app.command("prove", cls=InputCommand)(prove)
app.command("tables", cls=InputCommand)(tables)
app.command("export", cls=InputCommand)(export)
app.command("verify", cls=InputCommand)(verify)
app.command("simulate", cls=InputCommand)(simulate)
app.command("replay", cls=InputCommand)(replay)
app.command("calibrate", cls=InputCommand)(calibrate)
app.command("check", cls=InputCommand)(check)
app.command("inspect", cls=InputCommand)(inspect)
app.command("demo", cls=InputCommand)(demo)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no solution, 4 not proved in time
    (only with ``--require-optimal``), 5 verification failed, 6 traffic has
    drifted from the plan (only ``check``). ``PLACER_DEBUG=1`` shows
    the traceback of a failure.
    """
    _prepare_streams()
    _end_by_exception()
    try:
        _run(argv)
    except PlacerError as error:
        if os.environ.get("PLACER_DEBUG"):
            raise
        _fail(error.message, [error.hint, *_notes(error)], error.exit_code)
    except OSError as error:
        if os.environ.get("PLACER_DEBUG"):
            raise
        message, hint = _explain(error)
        _fail(message, [hint, *_notes(error)], 1)
    except KeyboardInterrupt as error:
        _fail(f"interrupted{_nothing_kept(error)}", _notes(error), 130)
    except _Ended as error:
        _fail(f"ended by a signal{_nothing_kept(error)}", _notes(error), error.exit_code)
    except Exception as error:
        if os.environ.get("PLACER_DEBUG"):
            raise
        if _lacks_memory(error):
            hint = (
                "use a machine with more memory, or fewer tokens: "
                "placer trace sample TRACE --sequences N --out SMALL"
            )
            _fail("memory ran out", [hint, *_notes(error)], 1)
        reason = str(error).strip().partition("\n")[0]
        sys.stderr.write(
            f"placer failed: {type(error).__name__}: {reason}; "
            "run again with PLACER_DEBUG=1 for the traceback\n"
            + "".join(f"hint: {line}\n" for line in _notes(error))
        )
        sys.exit(1)


class _Ended(BaseException):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def _end_by_exception() -> None:
    """Let SIGTERM and SIGHUP end as Ctrl-C does: unfinished output is then removed.

    Workers of torchrun end at once, as the others wait for them; so do forked processes.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return
    own = os.getpid()

    def end(number: int, _frame: object) -> None:
        if os.getpid() != own:
            os._exit(128 + number)
        raise _Ended(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup has it ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def _notes(error: BaseException) -> list[str]:
    """Return what was kept for the next run."""
    return getattr(error, "__notes__", [])


def _nothing_kept(error: BaseException) -> str:
    """Say so where no note tells what was kept: unfinished output is removed."""
    return "" if _notes(error) else ": no result was written"


def _prepare_streams() -> None:
    """Let both output streams take any text, even one that is closed or knows ASCII."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(argv: Sequence[str] | None) -> None:
    """Run the command line; a worker that fails because another one did says nothing."""
    try:
        app(args=list(argv) if argv is not None else None, prog_name="placer")
    except SystemExit as ended:
        # typer makes a silent exit of Ctrl-C, and drops what was kept for the next run.
        cause = ended.__context__ and ended.__context__.__cause__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise
    except Exception:
        if fails_first():
            raise
        sys.exit(1)


def _lacks_memory(error: Exception) -> bool:
    """Return whether memory ran out; the loader and torch say so in words alone."""
    words = ("failed to map segment", "allocate memory", "can't start new thread")
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(word in said for word in words)


def _explain(error: OSError) -> tuple[str, str | None]:
    place = error.filename or "the output"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the device of {place}", "free some space: df -h"
    return f"{place}: {error.strerror or error}", None


def _fail(message: str, hints: Sequence[str | None], exit_code: int) -> None:
    sys.stderr.write(f"placer: {message}\n")
    for hint in filter(None, hints):
        sys.stderr.write(f"hint: {hint}\n")
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
