"""Where expert-parallel ranks are: files of link costs, and groups in a larger world.

A job of W GPUs seldom is one expert-parallel group: tensor parallel ranks share their
tokens, and the other ranks are divided into groups that each hold all experts. Which links
a copy takes depends on where the ranks of a group sit. Groups are built as DeepSpeed does
(``_get_expert_parallel_ranks``, deepspeed/utils/groups.py of
https://github.com/deepspeedai/DeepSpeed; DeepSpeed-MoE, arXiv 2201.05596, section 5).
"""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from placer.errors import PlacerError, UsageError, one_of
from placer.placement.topology import INTER_COST, INTRA_COST, Topology, require_cost_matrix
from placer.run.documents import parse_json
from placer.run.files import read_text, sha256_file

EpGroups = Literal["consecutive", "strided"]
EP_GROUPS: tuple[EpGroups, ...] = get_args(EpGroups)
Costs = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldLayout:
    """The expert-parallel groups of a world of ranks.

    Attributes
    ----------
    num_nodes, gpus_per_node
        The world; its ranks are numbered node by node, tensor parallel ones next to each
        other.
    ep_size
        Ranks of an expert-parallel group.
    tensor_parallel_size
        Ranks that share their tokens.
    ep_groups
        Of the ranks that are alike except for their data, groups are ``consecutive`` ones
        (DeepSpeed's default), or ``strided`` (its ``use_data_before_expert_parallelism``).

    Raises
    ------
    UsageError
        If the sizes do not divide each other, or groups are placed differently on nodes.
    """

    num_nodes: int
    gpus_per_node: int
    ep_size: int
    tensor_parallel_size: int = 1
    ep_groups: EpGroups = "consecutive"

    def __post_init__(self) -> None:
        one_of("--ep-groups", self.ep_groups, EP_GROUPS)
        alike, rest = divmod(self.world_size, self.tensor_parallel_size)
        if rest:
            raise UsageError(
                f"{self.world_size} ranks do not divide into tensor parallel groups of "
                f"{self.tensor_parallel_size}",
                "change --tensor-parallel-size, --nodes or --gpus-per-node",
            )
        if alike % self.ep_size:
            raise UsageError(
                f"{alike} data parallel ranks ({self.world_size} / "
                f"{self.tensor_parallel_size} tensor parallel) do not divide into "
                f"expert-parallel groups of {self.ep_size}",
                "change --ep-size, --tensor-parallel-size, --nodes or --gpus-per-node",
            )
        self._require_alike()

    def _require_alike(self) -> None:
        """Refuse groups that a single plan cannot serve equally."""
        sizes = {tuple(Counter(map(self._node, group)).values()) for group in self.groups}
        if len(sizes) > 1 or len(set(next(iter(sizes)))) > 1:
            odd = " and ".join(sorted("+".join(map(str, one)) for one in sizes))
            raise UsageError(
                f"expert-parallel groups of {self.ep_size} have {odd} ranks on nodes of "
                f"{self.gpus_per_node}: one plan can serve all groups only if each has "
                "the same ranks on each node",
                "choose an --ep-size that divides the nodes evenly, or the other "
                "--ep-groups",
            )

    @property
    def world_size(self) -> int:
        """Number of ranks of the world, W."""
        return self.num_nodes * self.gpus_per_node

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """World ranks of every expert-parallel group; the r-th is its rank r."""
        width, found = self.tensor_parallel_size, []
        for first in range(width):
            alike = range(first, self.world_size, width)
            number = len(alike) // self.ep_size
            for index in range(number):
                part = (
                    alike[index * self.ep_size : (index + 1) * self.ep_size]
                    if self.ep_groups == "consecutive"
                    else alike[index::number]
                )
                found.append(tuple(part))
        return tuple(found)

    def _node(self, world_rank: int) -> int:
        return world_rank // self.gpus_per_node

    @property
    def nodes_per_group(self) -> int:
        """Nodes that the ranks of a group are on."""
        return len(set(map(self._node, self.groups[0])))

    def group_costs(self, costs: Costs) -> Costs:
        """Take the costs between the ranks of a group from the costs of the whole world.

        Raises
        ------
        UsageError
            If ``costs`` is not such a matrix, or groups do not see the same costs.
        """
        require_cost_matrix(costs, self.world_size)
        first, *others = self.groups
        found = tuple(tuple(costs[a][b] for b in first) for a in first)
        for group in others:
            if tuple(tuple(costs[a][b] for b in group) for a in group) != found:
                raise UsageError(
                    f"the topology's costs between ranks {list(group)} differ from those "
                    f"between {list(first)}: one plan can serve all groups only if their "
                    "costs are equal",
                    "solve for one group: leave out --ep-size and give only its costs",
                )
        return found

    def describe(self) -> str:
        """Return a sentence on where the groups are, and its effect."""
        shown = ", ".join(str(list(group)) for group in self.groups[:4])
        if len(self.groups) > 4:
            shown += ", ..."
        width = self.ep_size // self.nodes_per_group
        if self.nodes_per_group == 1:
            meaning = "each inside one node: no copy crosses nodes"
        elif width == 1:
            meaning = (
                "every rank on another node: every copy crosses nodes, as with --nodes "
                f"{self.ep_size} --gpus-per-node 1"
            )
        else:
            meaning = f"{width} ranks on each of {self.nodes_per_group} nodes"
        return (
            f"{len(self.groups)} expert-parallel groups of {self.ep_size} of "
            f"{self.world_size} ranks, {meaning}; world ranks {shown}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the layout as JSON values."""
        return {
            "world_size": self.world_size,
            "tensor_parallel_size": self.tensor_parallel_size,
            "ep_size": self.ep_size,
            "ep_groups": self.ep_groups,
            "groups": [list(group) for group in self.groups],
        }


def world_layout(
    *,
    num_nodes: int,
    gpus_per_node: int,
    ep_size: int | None,
    tensor_parallel_size: int,
    ep_groups: EpGroups,
) -> WorldLayout | None:
    """Return how groups are placed in the world; ``None`` for one group (no ``ep_size``).

    Raises
    ------
    UsageError
        If options place groups but there are none, or the groups do not fit.
    """
    if ep_size is not None:
        return WorldLayout(
            num_nodes=num_nodes,
            gpus_per_node=gpus_per_node,
            ep_size=ep_size,
            tensor_parallel_size=tensor_parallel_size,
            ep_groups=ep_groups,
        )
    if tensor_parallel_size != 1 or ep_groups != "consecutive":
        raise UsageError(
            "--tensor-parallel-size and --ep-groups say how expert-parallel groups are "
            "placed, but --ep-size is missing",
            "add --ep-size R, the ranks of a group",
        )
    return None


def read_costs(path: Path) -> Costs:
    """Read a matrix of link costs: JSON, or CSV with one row per line.

    JSON is rows of numbers, or an object whose ``cost`` is. Values must be whole: only
    their ratios count.

    Raises
    ------
    PlacerError
        If the file is missing or no such matrix.
    """
    text = read_text(path, what="topology")
    again = "write R rows of R whole numbers, as JSON or as .csv"
    try:
        if path.suffix.lower() == ".csv":
            rows: Any = [
                [float(cell) for cell in row]
                for row in csv.reader(text.splitlines())
                if row
            ]
        else:
            rows = parse_json(text, f"topology {path}")
    except (ValueError, csv.Error) as error:
        raise PlacerError(f"{path} is not a matrix of costs: {error}", again) from error
    if isinstance(rows, dict):
        rows = rows.get("cost")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise PlacerError(f"{path} holds no rows of costs", again)
    return tuple(tuple(_whole(path, value) for value in row) for row in rows)


def _whole(path: Path, value: Any) -> int:
    number = type(value) in (int, float)
    if not number or value != value or abs(value) >= 2**31 or value != int(value):
        raise PlacerError(
            f"{path}: a cost is {value!r}, not a whole number below 2^31",
            "multiply all costs until they are whole numbers: only their ratios count",
        )
    return int(value)


def group_topology(
    *,
    num_nodes: int,
    gpus_per_node: int,
    inter_cost: int | None = None,
    intra_cost: int | None = None,
    layout: WorldLayout | None = None,
    cost_file: Path | None = None,
) -> Topology:
    """Return the ranks of one expert-parallel group and what links between them cost.

    Parameters
    ----------
    num_nodes, gpus_per_node
        The group, or with ``layout`` the world.
    inter_cost, intra_cost
        As in ``Topology``; ``None`` for its defaults.
    layout
        How groups are placed in the world, or ``None``: the world is one group.
    cost_file
        Costs between all ranks of group or world, instead of the two others, or ``None``.

    Raises
    ------
    UsageError
        If both kinds of costs are given, or they do not fit the ranks, or there is one
        node, on which every copy costs the same.
    """
    if layout is not None:
        num_nodes = layout.nodes_per_group
        gpus_per_node = layout.ep_size // num_nodes
    if cost_file is None:
        _require_several_nodes(num_nodes, inter_cost, intra_cost)
        return Topology(
            num_nodes=num_nodes,
            gpus_per_node=gpus_per_node,
            inter_cost=INTER_COST if inter_cost is None else inter_cost,
            intra_cost=INTRA_COST if intra_cost is None else intra_cost,
        )
    if inter_cost is not None or intra_cost is not None:
        raise UsageError(
            "--topology gives the cost of every link, and so do --inter-cost and "
            "--intra-cost",
            "drop --topology, or --inter-cost and --intra-cost",
        )
    costs = read_costs(cost_file)
    return Topology(
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        cost=costs if layout is None else layout.group_costs(costs),
        cost_sha256=sha256_file(cost_file),
    )


def _require_several_nodes(
    num_nodes: int, inter_cost: int | None, intra_cost: int | None
) -> None:
    if num_nodes > 1:
        return
    for option, cost in (("--inter-cost", inter_cost), ("--intra-cost", intra_cost)):
        if cost is not None:
            raise UsageError(
                f"{option} {cost} is for links inside nodes or between them, but all "
                "ranks are on one node: every copy costs 1",
                f"drop {option}, or add --nodes N",
            )
