"""Files that one command combines: all of one model and one tokenizer, or refused."""

from collections.abc import Callable
from dataclasses import dataclass, field

from placer.model.spec import ModelSpec, common_model, require_same_model
from placer.model.tokenizer import require_same_tokenizer


@dataclass(slots=True)
class Combination:
    """What the files added so far have in common.

    Attributes
    ----------
    warn
        Takes a warning where a match rests on what one file does not say: one about the
        model and one about the tokenizer, however many files there are.
    """

    warn: Callable[[str], None] = lambda _: None
    _files: list[tuple[str, ModelSpec, str | None]] = field(default_factory=list)
    _warned: set[str] = field(default_factory=set)

    def add(self, name: str, model: ModelSpec, tokenizer: str | None) -> None:
        """Add a file, with the SHA-256 of its tokenizer where that is known.

        It is compared with each file before. A file that is bound to nothing may match two
        files that do not match each other, so comparing with one of them is not enough.

        Raises
        ------
        UsageError
            If its model or tokenizer differs from that of a file before.
        """
        for earlier, of, by in self._files:
            self._warn_once("model", require_same_model(of, earlier, model, name))
            self._warn_once(
                "tokenizer", require_same_tokenizer(by, earlier, tokenizer, name)
            )
        self._files.append((name, model, tokenizer))

    @property
    def model(self) -> ModelSpec:
        """The model of all; bound to a checkpoint only if all are."""
        return common_model([model for _, model, _ in self._files])

    @property
    def tokenizer_sha256(self) -> str | None:
        """The tokenizer of all, ``None`` if one does not say."""
        found = {tokenizer for *_, tokenizer in self._files}
        return found.pop() if len(found) == 1 else None

    def _warn_once(self, kind: str, warning: str | None) -> None:
        if warning is not None and kind not in self._warned:
            self._warned.add(kind)
            self.warn(warning)
