"""Mistakes in the command line itself, said as all errors of placer are."""

import re
from typing import Any

from typer.core import TyperGroup
from typer.exceptions import TyperException

from placer import UsageError
from placer.cli.examples import EXAMPLES

_DID_YOU_MEAN = ". Did you mean "
#: The commands in working order, by topic.
TOPICS = {
    "Collect traffic": ("record", "import", "trace", "affinity"),
    "Decide": ("advise", "solve", "prove", "tables"),
    "Deploy": ("export", "verify"),
    "Measure": ("simulate", "replay", "calibrate", "check"),
    "Look": ("inspect", "demo"),
}


class UsageGroup(TyperGroup):
    """The group of all commands. What typer refuses is raised as a ``UsageError``."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands under topics, in working order."""
        longest = max(map(len, self.commands))
        room = formatter.width - 6 - longest
        for topic, names in TOPICS.items():
            rows = [
                (name.ljust(longest), self.commands[name].get_short_help_str(room))
                for name in names
            ]
            with formatter.section(topic):
                formatter.write_dl(rows)

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Parse the options before the command."""
        try:
            return super().make_context(*args, **extra)
        except TyperException as error:
            if "\n" in error.message:  # no arguments: this is the help
                raise
            raise _usage_error(error, "placer") from None

    def invoke(self, ctx: Any) -> Any:
        """Parse the words of the command and run it."""
        try:
            return super().invoke(ctx)
        except TyperException as error:
            if "\n" in error.message:
                raise
            raise _usage_error(error, f"placer {ctx.invoked_subcommand}") from None


def _usage_error(error: TyperException, command: str) -> UsageError:
    """Return an error of typer in placer's words.

    ``command`` is the command where the error does not name one.
    """
    context = getattr(error, "ctx", None)
    if context is not None:
        command = context.command_path
    message, _, meant = _message(error, command).rstrip(".").partition(_DID_YOU_MEAN)
    if meant:
        return UsageError(message, f"did you mean {meant}")
    example = EXAMPLES.get(command.split()[-1])
    shown = f"for example: {example[0]}; all options" if example else "list what there is"
    return UsageError(message, f"{shown}: {command} --help")


def _message(error: TyperException, command: str) -> str:
    if hasattr(error, "possibilities"):  # an option that does not exist
        message = f"{command} has no option {getattr(error, 'option_name', '')}"
        near = " or ".join(error.possibilities or ())
        return f"{message}{_DID_YOU_MEAN}{near}?" if near else message
    parameter = getattr(error, "param", None)
    if parameter is None:
        extra = re.match(
            r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", error.message
        )
        if extra:
            return f"{command} was given an argument too many: {extra[1]}"
        return error.message[:1].lower() + error.message[1:]
    is_option = parameter.param_type_name == "option"
    name = parameter.opts[0] if is_option else parameter.metavar or parameter.name
    return f"{name} {_refusal(error)}" if error.message else f"{name} is missing"


def _refusal(error: TyperException) -> str:
    """Return what is wrong with a value; pydantic, which says it, knows the value."""
    rule = error.message.partition(",")[0].replace("Input should be", "must be")
    rule = rule.replace("a valid integer", "a whole number").replace("valid ", "")
    rule = rule.replace("greater than or equal to", "at least")
    rule = rule.replace("less than or equal to", "at most")
    cause: Any = error.__cause__
    return f"{rule}, got {cause.errors()[0]['input']}" if hasattr(cause, "errors") else rule
