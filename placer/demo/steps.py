"""The steps of the demo, told one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from placer.run.progress import Progress


@dataclass(slots=True, kw_only=True)
class Steps:
    """Tells each step, and where within it the demo is.

    Attributes
    ----------
    total
        How many steps there are.
    say
        Called with the command that does the same as a step.
    progress
        Called with one line for each part of a step, or ``None``.
    folder
        The directory that is written; it becomes ``out`` after the last step.
    out
        What the steps call the directory.
    number
        Of the step that runs, from 1; 0 before the first.
    """

    total: int
    say: Callable[[str], None]
    progress: Progress | None = None
    folder: Path
    out: Path
    number: int = 0

    def begin(self, command: str) -> None:
        """Tell the next step."""
        self.number += 1
        self.say(self.words(command))
        words = command.split()
        self.tell(words[1] if words[0] == "placer" else words[0])

    def tell(self, text: str) -> None:
        """Tell where in the step the demo is."""
        if self.progress is not None:
            self.progress(f"step {self.number} of {self.total}: {self.words(text)}")

    def words(self, text: str) -> str:
        """Return a sentence with the name that the directory has at the end."""
        return text.replace(str(self.folder), str(self.out))
