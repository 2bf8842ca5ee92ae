"""Compiling the loops with numba, and keeping what was compiled.

numba's own cache compares a function's file only. A loop contains what it calls from other
files too, so here the key of the cache holds the source of all loops.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache


def sources_sha256(directory: Path) -> str:
    """Return the SHA-256 of all Python files of a directory, by name."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCES = sources_sha256(Path(__file__).parent)


class _Cache(FunctionCache):
    def _index_key(self, signature: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(signature, codegen), _SOURCES)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function at its first call, without the GIL, and keep it on disk."""
    dispatcher: Any = njit(nogil=True)(function)
    dispatcher._cache = _Cache(function)
    loop: Callable[..., Any] = dispatcher
    return loop
