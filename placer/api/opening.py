"""``placer.open``: any file or directory of placer, recognised by its content."""

from pathlib import Path

from placer.affinity import Affinity as Counts
from placer.api.affinity import Affinity
from placer.api.files import AnyPath, as_path, warn
from placer.api.plan import Plan
from placer.api.table import Table
from placer.api.trace import Trace
from placer.errors import PlacerError, UsageError, one_of
from placer.placement import Plan as SolvedPlan
from placer.placement.topology import Topology
from placer.report.artifact import open_artifact
from placer.report.checkpoint import Checkpoint
from placer.report.results import EngineMap
from placer.run.kinds import kind_of
from placer.runtime_map.imported import read_map
from placer.table import Table as TokenTable
from placer.target.map_formats import MAPS

_MAP = "-map"
#: What :func:`placer.open` returns.
Opened = Trace | Affinity | Plan | Table | Checkpoint


def open(
    path: AnyPath,
    format: str | None = None,
    *,
    nodes: int = 1,
    gpus_per_node: int | None = None,
    model: AnyPath | None = None,
) -> Opened:
    """Open a file or directory that placer or an engine wrote.

    Parameters
    ----------
    path
        A trace, an affinity file, a plan, a table, a checkpoint (exported ones too), or,
        with ``format``, the map of an engine.
    format
        The map's: ``sglang``, ``trtllm``, ``vllm-ascend``, ``vllm-pr49572``, ``vllm-das``,
        ``eplb``, ``csv`` or ``json``.
    nodes, gpus_per_node
        With ``format``: nodes, and expert-parallel ranks on each.
    model
        With ``format``: the model that the map is for. Its ``config.json`` is enough.

    Returns
    -------
    Trace, Affinity, Plan, Table or Checkpoint
        Of a map, the plan that it is.

    Raises
    ------
    PlacerError
        If there is no such file, it is none of them, or it is damaged.
    UsageError
        If ``format`` is not known, or ``gpus_per_node`` is missing.

    Examples
    --------
    >>> import placer
    >>> placer.open("traces/gpt-oss-20b")
    Trace of gpt-oss-20b
      path     traces/gpt-oss-20b
      routing  24 MoE layers of 32 experts, top-4
      tokens   75,735 in 266 sequences
      domains  business, computing, general, history, law, medicine, mind, other, stem
    """
    file = Path(path)
    if format is not None:
        return _open_map(format, file, nodes, gpus_per_node, as_path(model))
    if nodes != 1 or gpus_per_node is not None or model is not None:
        raise UsageError(
            "nodes, gpus_per_node and model are for the map of an engine",
            f"name its format: {', '.join(MAPS)}",
        )
    if kind_of(file) == "trace":
        return Trace.read(file)
    match open_artifact(file):
        case Counts():
            return Affinity.read(file)
        case SolvedPlan():
            return Plan.read(file)
        case TokenTable():
            return Table.read(file)
        case Checkpoint() as found:
            return found
        case EngineMap() as found:
            raise UsageError(
                f"{file} is the map of an engine: say which ranks it is for",
                f"placer.open({str(path)!r}, {found.format!r}, gpus_per_node=...)",
            )
        case _:
            raise PlacerError(
                f"{file} is not a kind of file that placer.open reads",
                f"look at it: placer inspect {file}",
            )


def read_source(path: AnyPath) -> Trace | Affinity:
    """Open a trace, or an affinity file.

    Raises
    ------
    PlacerError
        If it is neither, or is damaged.
    """
    return Affinity.read(path) if Path(path).is_file() else Trace.read(path)


def _open_map(
    format_: str, path: Path, nodes: int, gpus_per_node: int | None, model: Path | None
) -> Plan:
    name = one_of("format", format_.removesuffix(_MAP), [*MAPS])
    if gpus_per_node is None:
        raise UsageError(
            f"the map {path} needs the ranks that it is for",
            f"placer.open({str(path)!r}, {name!r}, nodes={nodes}, gpus_per_node=...)",
        )
    topology = Topology(num_nodes=nodes, gpus_per_node=gpus_per_node)
    plan, warning = read_map(name, path, topology, model)
    if warning is not None:
        warn(warning)
    if not plan.model.top_k:
        warn(
            "the map does not name its model: only shapes are compared with other files, "
            "and each row is read as an MoE layer. Name the model: model=DIRECTORY"
        )
    return Plan(plan)
