"""Refuse retired words: each has a plain English word in its place."""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

# Refused in every file.
RETIRED = {
    "asunder": "apart",
    "but for": "except for",
    "commonest": "most common",
    "dearer": "more expensive",
    "evenest": "most even",
    "foretell": "predict",
    "foretells": "predicts",
    "foretold": "predicted",
    "heed": "follow, use",
    "heeds": "follows, uses",
    "is no question": "has no effect",
    "likeliest": "most likely",
    "mend": "repair",
    "mended": "repaired",
    "mends": "repairs",
    "nought": "nothing, 0",
    "surest": "most certain",
    "thereof": "of it",
    "upon": "on",
    "whence": "from where",
    "wherein": "in which",
    "wish": "request",
    "worth to": "worth",
}
# Refused in the help, messages and tables that placer prints, and in the documentation.
RETIRED_IN_TEXTS = {
    "alone": "only",
    "anew": "again",
    "asked for": "requested",
    "beside": "next to, compared with, with",
    "besides": "also",
    "cannot be meant": "is out of range",
    "flatter": "are too good",
    "for want of": "because",
    "go on": "continue",
    "goes on": "continues",
    "in its place": "instead",
    "in place of": "instead of",
    "lie": "be",
    "lies": "is",
    "likewise": "in the same way",
    "mind:": "note:",
    "of its own": "its own",
    "of their own": "their own",
    "stand": "be, appear",
    "stands": "is, appears",
    "surer": "more certain, more confident",
    "tell": "show, say",
    "tells": "shows, says",
    "told": "shown, said",
    "whatever": "for every",
    "whichever": "the one that",
}
# Its older entries keep the words of their time.
_HISTORY = "CHANGELOG.md"
_FILES = ("placer/**/*.py", "placer/**/*.toml", "docs/**/*.md", "*.md", "traces/*.md")


def main() -> None:
    """Print each retired word with its place; exit 1 if there is one."""
    root = Path(__file__).resolve().parent.parent
    found: list[str] = []
    for pattern in _FILES:
        for path in sorted(root.glob(pattern)):
            text, name = path.read_text(encoding="utf-8"), path.relative_to(root)
            lines = enumerate(text.splitlines(), 1)
            found += (f"{name}:{place}" for place in _retired(lines, RETIRED))
            texts: Iterator[tuple[int, str]] = iter(())
            if path.suffix == ".py":
                texts = _messages(ast.parse(text))
            elif path.name != _HISTORY and path.suffix == ".md":
                texts = _written(text)
            found += (f"{name}:{place}" for place in _retired(texts, RETIRED_IN_TEXTS))
    if found:
        sys.exit("\n".join(found))


def _retired(lines: Iterator[tuple[int, str]], words: Mapping[str, str]) -> Iterator[str]:
    """Yield line number, word and remedy of each retired word in numbered texts."""
    pattern = re.compile(rf"(?<!\w)({'|'.join(words)})(?!\w)", re.IGNORECASE)
    for number, line in lines:
        for word in pattern.findall(line):
            yield f"{number}: {word}: say {words[word.lower()]}"


def _written(text: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a document that no command printed."""
    is_printed = False
    for number, line in enumerate(text.splitlines(), 1):
        is_printed = (is_printed or "[[[cog" in line) and "[[[end]]]" not in line
        if not is_printed:
            yield number, line


def _messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of each string of two or more words that is no docstring."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and " " in text.strip() and id(node) not in docstrings:
            yield node.lineno, text


if __name__ == "__main__":
    main()
