"""Refuse retired words: each has a plain English word in its place."""

import re
import sys
from pathlib import Path

RETIRED = {
    "asunder": "apart",
    "but for": "except for",
    "dearer": "more expensive",
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
_FILES = ("placer/**/*.py", "placer/**/*.toml", "docs/*.md", "*.md", "traces/*.md")


def main() -> None:
    """Print each retired word with its place; exit 1 if there is one."""
    words = re.compile(rf"\b({'|'.join(RETIRED)})\b", re.IGNORECASE)
    root = Path(__file__).resolve().parent.parent
    found = [
        f"{path.relative_to(root)}:{number}: {word}: say {RETIRED[word.lower()]}"
        for pattern in _FILES
        for path in sorted(root.glob(pattern))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word in words.findall(line)
    ]
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
