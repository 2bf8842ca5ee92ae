"""Opening a file or directory of placer, recognised by its content."""

from pathlib import Path

from placer.affinity import Affinity
from placer.errors import PlacerError
from placer.model.config_file import CONFIG_NAME, PARAMS_NAME, require_downloaded
from placer.placement import Plan
from placer.placement.engine_map import require_no_map
from placer.report.checkpoint import Checkpoint
from placer.report.statistics import TraceStatistics
from placer.run.documents import read_json
from placer.run.files import read_bytes
from placer.run.kinds import placer_metadata, safetensors_header
from placer.table import Table
from placer.trace import Trace

Artifact = TraceStatistics | Affinity | Plan | Table | Checkpoint

_EXPECTED = (
    "expected a trace directory (trace.json), a checkpoint directory (config.json), "
    "plan.json, an affinity or a table"
)


def open_artifact(path: Path) -> Artifact:
    """Read a trace, affinity, plan, table or checkpoint.

    Raises
    ------
    PlacerError
        If ``path`` is none of them, or is damaged.
    """
    require_downloaded(path)
    if not path.exists():
        raise PlacerError(f"{path} does not exist", f"check the path: ls -l {path.parent}")
    require_no_map(path)
    return _open_directory(path) if path.is_dir() else _open_file(path)


def _open_directory(path: Path) -> Artifact:
    if (path / "trace.json").is_file():
        return TraceStatistics.of(Trace(path))
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
    if path.name in ("trace.json", "config.json"):
        raise PlacerError(
            f"{path} is the header of a directory",
            f"name the directory: placer inspect {path.parent}",
        )
    raise PlacerError(f"{path} is JSON, but not a plan", _EXPECTED)
