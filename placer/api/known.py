"""``placer.names``: the names that options take."""

from collections.abc import Iterable
from importlib import import_module

from placer.errors import one_of
from placer.target.map_formats import MAPS
from placer.target.map_formats import TARGETS as EXPORT_TARGETS

__all__ = [
    "EXPORT_TARGETS",
    "FORMATS",
    "LOAD_FORMATS",
    "MAP_FORMATS",
    "TOKEN_FORMATS",
    "names",
]

# Formats that are imported: routing of tokens, loads and maps of engines.
TOKEN_FORMATS = (
    "npz",
    "exflow",
    "csv",
    "jsonl",
    "json-requests",
    "sglang-routed",
    "sglang-dump",
    "vllm-routed",
)
LOAD_FORMATS = ("sglang-stat", "trtllm-statistic", "csv-loads", "load-matrix")
MAP_FORMATS = tuple(f"{name}-map" for name in MAPS)
#: All formats, tokens first.
FORMATS = (*TOKEN_FORMATS, *LOAD_FORMATS, *MAP_FORMATS)

# What has the names, imported when they are asked for: a mapping, a sequence or a function.
_PLACES = {
    "baselines": ("baseline", "BASELINES"),
    "engines": ("target.engine", "known_engines"),
    "engine_families": ("target.engine", "engine_families"),
    "exchanges": ("target.engine", "SOLVABLE_EXCHANGES"),
    "formats": ("api.known", "FORMATS"),
    "export_targets": ("target.map_formats", "TARGETS"),
    "hardware": ("target.hardware", "known_hardware"),
    "policies": ("placement.policy", "POLICIES"),
    "replayed_exchanges": ("replay.kinds", "EXCHANGE_KINDS"),
    "replica_choices": ("target.engine", "REPLICA_CHOICES"),
    "solvable_replica_choices": ("target.engine", "SOLVABLE_REPLICA_CHOICES"),
}


def names(of: str) -> list[str]:
    """Return the names that an option takes.

    Parameters
    ----------
    of
        ``baselines``, ``engines``, ``engine_families``, ``exchanges``, ``export_targets``,
        ``formats``, ``hardware``, ``policies``, ``replayed_exchanges``,
        ``replica_choices`` or ``solvable_replica_choices``.

    Raises
    ------
    UsageError
        If there are no such names.

    Examples
    --------
    >>> import placer
    >>> placer.names("policies")
    ['fixed', 'follow', 'token', 'request']
    """
    module, attribute = _PLACES[one_of("of", of, [*_PLACES])]
    found = getattr(import_module(f"placer.{module}"), attribute)
    known: Iterable[str] = found() if callable(found) else found
    return [*known]
