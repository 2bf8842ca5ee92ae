"""Text to record over: files and directories, one domain each, cut into sequences."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from placer.errors import PlacerError, UsageError

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """One domain of text.

    Attributes
    ----------
    domain
        Its name in the trace.
    path
        A UTF-8 text file, or a directory of such files (searched recursively; hidden
        files and those that are no UTF-8 are left out). Each file is one document.
    """

    domain: str
    path: Path

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise PlacerError(
                f"corpus {self.path} does not exist",
                f"check the path: ls {self.path.parent}",
            )
        if not self.domain:
            raise UsageError(f"the corpus {self.path} needs a domain name")

    def files(self) -> list[Path]:
        """Return the files of the corpus, sorted by path.

        Raises
        ------
        PlacerError
            If there is none.
        """
        if self.path.is_file():
            return [self.path]
        found = sorted(
            path
            for path in self.path.rglob("*")
            if path.is_file() and not _hidden(path.relative_to(self.path))
        )
        if not found:
            raise PlacerError(
                f"corpus directory {self.path} holds no file",
                "give a directory of text files",
            )
        return found

    def documents(self, seed: int | None = None) -> Iterator[str]:
        """Yield the texts, by path, or in an order drawn from ``seed``."""
        files = self.files()
        if seed is not None:
            order = np.random.default_rng(seed).permutation(len(files))
            files = [files[n] for n in order]
        for path in files:
            text = _read_text(path)
            if text and text.strip():
                yield text

    def sha256(self) -> str:
        """Return one hash over names and contents of all files."""
        digest = hashlib.sha256()
        for path in self.files():
            name = (
                path.name if path == self.path else path.relative_to(self.path).as_posix()
            )
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{name}\0{content}\n".encode())
        return digest.hexdigest()


def name_corpora(paths: Sequence[Path], named: Sequence[str]) -> list[Corpus]:
    """Build corpora from ``--corpus PATH`` and ``--domain NAME=PATH``.

    Raises
    ------
    UsageError
        If none is given, two share a domain, or ``--domain`` has no ``=``.
    """
    corpora = [Corpus(domain=path.resolve().stem, path=path) for path in paths]
    for text in named:
        domain, equals, path = text.partition("=")
        if not equals or not domain or not path:
            raise UsageError(
                f"--domain is written NAME=PATH, got {text!r}",
                "for example --domain code=src/",
            )
        corpora.append(Corpus(domain=domain, path=Path(path)))
    if not corpora:
        raise UsageError(
            "no text to record over", "give --corpus FILE, or --domain NAME=PATH"
        )
    names = [corpus.domain for corpus in corpora]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"two corpora are named {name!r}",
                f"name them: --domain {name}-1=PATH --domain {name}-2=PATH",
            )
    return corpora


def token_sequences(
    corpus: Corpus,
    encode: Encode,
    *,
    sequence_length: int,
    max_tokens: int | None,
    seed: int,
) -> Iterator[list[int]]:
    """Yield the corpus as sequences of token ids, never across two documents.

    Parameters
    ----------
    corpus
        The text.
    encode
        Tokenizer: text to ids.
    sequence_length
        Most tokens of a sequence; a rest of a single token is dropped.
    max_tokens
        Stop after so many tokens; documents are then drawn in an order that ``seed``
        gives, so that the cut is no matter of file names.
    """
    left = max_tokens
    for text in corpus.documents(seed if max_tokens is not None else None):
        ids = list(encode(text))
        for start in range(0, len(ids), sequence_length):
            sequence = ids[start : start + sequence_length]
            if left is not None:
                sequence = sequence[:left]
                left -= len(sequence)
            if len(sequence) > 1:
                yield sequence
            if left is not None and left < 2:
                return


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _read_text(path: Path) -> str | None:
    """Return the text of a file, ``None`` if it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
