"""English and Python text that is part of every Python installation.

Three domains, cut into documents: the standard library's source code without its
docstrings (``code``), the docstrings (``docstrings``), and the language reference of
``pydoc_data.topics`` (``topics``). A document belongs to one split, chosen by a hash of
its name, so the split is the same on every machine and Python version.
"""

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "profile", "heldout"]

DOMAINS = ("code", "docstrings", "topics")

# Not prose and not ordinary code, or absent from some installations.
_SKIPPED_DIRECTORIES = {
    "__pycache__",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text with its origin.

    Attributes
    ----------
    name
        Path below the standard library, or the name of the topic.
    domain
        One of :data:`DOMAINS`.
    text
        The text itself, never empty.
    """

    name: str
    domain: str
    text: str

    @property
    def split(self) -> Split:
        """Two tenths of the names are never trained on: one to profile, one held out."""
        return split_of(self.name)


def split_of(name: str) -> Split:
    """Return the split of all documents of a name."""
    tenth = hashlib.sha256(name.encode()).digest()[0] % 10
    return "heldout" if tenth == 0 else "profile" if tenth == 1 else "train"


@cache
def documents(split: Split) -> tuple[Document, ...]:
    """Return the documents of a split, sorted by domain and name."""
    found = [*_library_documents(split), *_topic_documents(split)]
    return tuple(sorted(found, key=lambda one: (one.domain, one.name)))


def _topic_documents(split: Split) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        if split_of(name) == split:
            yield Document(name=name, domain="topics", text=text.strip() + "\n")


def _library_documents(split: Split) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if _SKIPPED_DIRECTORIES.intersection(relative.parts) or split_of(name) != split:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # deliberately broken or foreign files are no text to learn from
        docstrings, code = _separate(source, tree)
        if code.strip():
            yield Document(name=name, domain="code", text=code)
        if docstrings:
            text = "\n\n".join(docstrings) + "\n"
            yield Document(name=name, domain="docstrings", text=text)


def _separate(source: str, tree: ast.Module) -> tuple[list[str], str]:
    """Split a module into its docstrings and its source without them."""
    lines = source.splitlines(keepends=True)
    docstrings: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ):
            continue
        text = ast.get_docstring(node, clean=False)
        if not text:
            continue
        docstrings.append(inspect.cleandoc(text))
        statement = node.body[0]
        for number in range(statement.lineno - 1, statement.end_lineno or 0):
            lines[number] = ""
    return docstrings, "".join(lines)
