"""Text to record: files and directories, one domain each, cut into sequences."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from placer.errors import PlacerError, UsageError
from placer.run.documents import parse_json
from placer.run.files import memory_bytes, open_regular, read_bytes, sha256_file
from placer.trace.header import MAX_DOMAINS

#: A text, or the messages of a chat, each with its role and content.
Document = str | list[dict[str, Any]]
Encode = Callable[[Document], Sequence[int]]

STANDARD_INPUT = Path("-")
_TEXT_FIELD = "text"
_CHAT_FIELD = "messages"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """One domain of text.

    Attributes
    ----------
    domain
        Its name in the trace.
    path
        A UTF-8 text file, or a directory of such files (searched recursively; hidden
        files and those that are no UTF-8 are left out). Each file is one document, and
        so is each line of a ``.jsonl`` file.
    field
        The field of a ``.jsonl`` line that holds its text, or its chat: a list of
        messages. By default ``text``, or ``messages`` where there is none.
    content
        The text itself, for standard input; ``path`` then only names it.
    """

    domain: str
    path: Path
    field: str | None = None
    content: str | None = None

    def __post_init__(self) -> None:
        if self.content is None and not (self.path.is_file() or self.path.is_dir()):
            raise PlacerError(
                f"corpus {self.path} "
                + ("is not a text file" if self.path.exists() else "does not exist"),
                f"check the path: ls {self.path.parent}",
            )
        if not self.domain or not self.domain.isprintable():
            raise UsageError(
                f"the corpus {str(self.path)!r} needs a domain name of printable text, "
                f"got {self.domain!r}",
                "name it: --domain NAME=PATH",
            )

    def files(self) -> list[Path]:
        """Return the files of the corpus, sorted by path; none for standard input.

        Raises
        ------
        PlacerError
            If there is none in its directory.
        """
        if self.content is not None:
            return []
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

    def documents(self, seed: int | None = None) -> Iterator[Document]:
        """Yield the documents, by path and line, or in an order drawn from ``seed``.

        Raises
        ------
        PlacerError
            If a line of a ``.jsonl`` file is not a JSON object or lacks the field.
        """
        if self.content is not None:
            yield from [self.content] if self.content.strip() else []
            return
        places: Iterable[_Place] = (
            place for path in self.files() for place in _places(path)
        )
        if seed is not None:
            drawn = list(places)
            order = np.random.default_rng(seed).permutation(len(drawn))
            places = (drawn[n] for n in order)
        for place in places:
            document = self._read(place)
            if document and (not isinstance(document, str) or document.strip()):
                yield document

    def sha256(self) -> str:
        """Return one hash over names and contents of all files."""
        digest = hashlib.sha256((self.content or "").encode())
        for path in self.files():
            whole = path == self.path
            name = path.name if whole else path.relative_to(self.path).as_posix()
            line = f"{name}\0{sha256_file(path)}\n"
            # File names are bytes, which need not be UTF-8.
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _read(self, place: "_Place") -> Document | None:
        if place.offset is None:
            return _read_text(place.path)
        with open_regular(place.path) as stream:
            stream.seek(place.offset)
            line = stream.readline()
        where = f"{place.path}, line at byte {place.offset}"
        value = parse_json(line, where)
        fields = [self.field] if self.field else [_TEXT_FIELD, _CHAT_FIELD]
        found = value if isinstance(value, dict) else {}
        document = next((found[name] for name in fields if name in found), None)
        if not isinstance(document, str) and not _is_chat(document):
            raise PlacerError(
                f"{where}, holds no text or chat in {' or '.join(fields)}; "
                f"it has {', '.join(map(str, found)) or 'no field'}",
                "give the field: --field NAME",
            )
        return document


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a document is: a file, or the byte at which a line of one begins."""

    path: Path
    offset: int | None


def name_corpora(
    paths: Sequence[Path], named: Sequence[str], field: str | None = None
) -> list[Corpus]:
    """Build corpora from ``--corpus PATH``, ``--domain NAME=PATH`` and ``--field NAME``.

    The path ``-`` is standard input, which is read here.

    Raises
    ------
    UsageError
        If none is given, two share a domain, or ``--domain`` has no ``=``.
    """
    corpora = [_corpus(None, path, field) for path in paths]
    for text in named:
        domain, equals, path = text.partition("=")
        if not equals or not domain or not path:
            raise UsageError(
                f"--domain has the form NAME=PATH, got {text!r}",
                "for example --domain code=src/",
            )
        corpora.append(_corpus(domain, Path(path), field))
    if not corpora:
        raise UsageError("no text to record", "give --corpus FILE, or --domain NAME=PATH")
    names = [corpus.domain for corpus in corpora]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"two corpora are named {name!r}",
                f"name them: --domain {name}-1=PATH --domain {name}-2=PATH",
            )
    if len(corpora) > MAX_DOMAINS:
        raise UsageError(
            f"{len(corpora)} corpora are given, but a trace has at most {MAX_DOMAINS} "
            "domains",
            "put the files into fewer directories: each directory is one corpus",
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
        Stop after this many tokens; documents are then drawn in an order that ``seed``
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


def tokenized(tokenizer: Any, document: Document) -> list[int]:
    """Return the token ids of a text, or of a chat in the tokenizer's template.

    Raises
    ------
    PlacerError
        If the template cannot be applied.
    """
    if isinstance(document, str):
        return list(tokenizer(document, verbose=False)["input_ids"])
    try:
        text = tokenizer.apply_chat_template(document, tokenize=False)
    except Exception as error:  # templates are programs, and raise what they like
        raise PlacerError(
            f"the tokenizer cannot apply a chat template: {error}",
            "give a field that holds plain text: --field NAME",
        ) from error
    # The template has put the special tokens where they belong.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def token_windows(
    tokenizer: Any, texts: Sequence[str], max_tokens: int, length: int
) -> Iterator[list[int]]:
    """Yield the first ``max_tokens`` tokens of some texts, at most ``length`` at once."""
    left = max_tokens
    for text in texts:
        ids = tokenized(tokenizer, text)[:left]
        for start in range(0, len(ids), length):
            yield ids[start : start + length]
        left -= len(ids)
        if left <= 0:
            return


def _corpus(domain: str | None, path: Path, field: str | None) -> Corpus:
    if path == STANDARD_INPUT:
        content = sys.stdin.buffer.read().decode("utf-8", errors="replace")
        return Corpus(domain=domain or "stdin", path=path, content=content)
    return Corpus(domain=domain or path.resolve().stem, path=path, field=field)


def _places(path: Path) -> Iterator[_Place]:
    if path.suffix != ".jsonl":
        yield _Place(path, None)
        return
    offset = 0
    with open_regular(path) as stream:
        for line in stream:
            if line.strip():
                yield _Place(path, offset)
            offset += len(line)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and {"role", "content"} <= set(one) for one in value
    )


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _read_text(path: Path) -> str | None:
    """Return the text of a file, ``None`` if it is not UTF-8."""
    try:
        return read_bytes(path, memory_bytes(), "corpus").decode("utf-8")
    except UnicodeDecodeError:
        return None
