"""Opening a file or directory of placer, recognised by its content."""

from collections.abc import Sequence
from pathlib import Path

from placer.affinity import Affinity
from placer.checkpoint.record import ExportRecord
from placer.checkpoint.source import RECORD_NAME
from placer.errors import PlacerError, UsageError
from placer.model import require_same_model
from placer.model.config_file import CONFIG_NAME, PARAMS_NAME, require_downloaded
from placer.placement import Plan
from placer.planning.frontier import TABLE_NAME
from placer.report.beside import (
    Beside,
    beside_on_counts,
    beside_on_trace,
    beside_recorded,
    heldout_of,
    require_comparable,
)
from placer.report.checkpoint import Checkpoint
from placer.report.results import EngineMap, Frontier, Result, result_of_json
from placer.report.statistics import TraceStatistics
from placer.run.documents import read_json
from placer.run.files import read_bytes
from placer.run.kinds import placer_metadata, safetensors_header
from placer.table import Table
from placer.trace import Trace

Artifact = TraceStatistics | Affinity | Plan | Beside | Table | Checkpoint | Result

_EXPECTED = (
    "expected a trace directory (trace.json), a checkpoint directory (config.json), "
    "plan.json, a folder of plans (frontier.csv), an affinity, a table, an engine's map, "
    "placer.json of an export, or what simulate or trace learning prints with --json"
)


def open_artifact(path: Path) -> Artifact:
    """Read what placer writes, an engine's map or a checkpoint.

    Raises
    ------
    PlacerError
        If ``path`` is none of them, or is damaged.
    """
    require_downloaded(path)
    if not path.exists():
        raise PlacerError(f"{path} does not exist", f"check the path: ls -l {path.parent}")
    if path.is_dir():
        return _open_directory(path)
    return EngineMap.read(path) or _open_file(path)


def _open_directory(path: Path) -> Artifact:
    if (path / "trace.json").is_file():
        return TraceStatistics.of(Trace(path))
    if (path / TABLE_NAME).is_file():
        return Frontier.read(path)
    if any((path / name).is_file() for name in (CONFIG_NAME, PARAMS_NAME)):
        return Checkpoint.read(path)
    if (path / "journal.json").is_file():
        raise PlacerError(
            f"{path} is an unfinished recording",
            "run the same `placer record` command again: it continues where it stopped",
        )
    raise PlacerError(f"{path} is not a file or directory that placer can read", _EXPECTED)


def _open_file(path: Path) -> Artifact:
    header = safetensors_header(path)
    if header is None:
        return _open_json(path)
    kind = placer_metadata(header, path).get("kind")
    if kind == "affinity":
        return Affinity.read(path)
    if kind == "table":
        return Table.read(path)
    if "sequence_ids" in header:
        raise PlacerError(
            f"{path} is one chunk of a trace",
            f"name the trace: placer inspect {path.parent}",
        )
    if (path.parent / "config.json").is_file():
        raise PlacerError(
            f"{path} is one file of a checkpoint",
            f"name the checkpoint: placer inspect {path.parent}",
        )
    raise PlacerError(f"{path} holds tensors, but placer did not write it", _EXPECTED)


def _open_json(path: Path) -> Artifact:
    if not read_bytes(path).lstrip().startswith(b"{"):
        raise PlacerError(f"{path} is not a file that placer can read", _EXPECTED)
    value = read_json(path, "file")
    if "physical_to_logical_map" in value:
        return Plan.read(path)
    if path.name == RECORD_NAME and "permutation" in value:
        return ExportRecord.read(path.parent)
    if path.name in ("trace.json", "config.json"):
        raise PlacerError(
            f"{path} is the header of a directory",
            f"name the directory: placer inspect {path.parent}",
        )
    result = result_of_json(path)
    if result is None:
        raise PlacerError(f"{path} is JSON, but not a plan", _EXPECTED)
    return result


def open_beside(path: Path, others: Sequence[Path]) -> Artifact:
    """Read an artifact; with a plan, also what it is shown on and compared with.

    Parameters
    ----------
    path
        What to look at.
    others
        With a plan: plans to compare with, and at most one trace or affinity file.

    Raises
    ------
    UsageError
        If they do not belong together.
    PlacerError
        If one is damaged, or they are of different models.
    """
    first = open_artifact(path)
    if not others:
        return first
    plans, counted = [], []
    for other in others:
        found = Trace(other) if (other / "trace.json").is_file() else open_artifact(other)
        if isinstance(found, Plan):
            plans.append((other, found))
        elif isinstance(found, Trace | Affinity):
            counted.append((other, found))
    if not isinstance(first, Plan) or len(plans) + len(counted) < len(others):
        raise UsageError(
            f"{others[0]} cannot be used with {path}: only a plan is shown on a trace or "
            "an affinity file, or compared with plans",
            "placer inspect PLAN TRACE",
        )
    if len(counted) > 1:
        raise UsageError(
            f"{counted[0][0]} and {counted[1][0]}: a plan is shown on one of them",
            "placer inspect PLAN TRACE",
        )
    require_comparable([(path, first), *plans])
    named = {other.name: plan for other, plan in plans}
    if not counted:
        return beside_recorded(first, named)
    ((source, tokens),) = counted
    require_same_model(first.model, str(path), tokens.model, str(source))
    if isinstance(tokens, Affinity):
        return beside_on_counts(first, named, tokens)
    return beside_on_trace(first, named, tokens, heldout_of(first, tokens))
