"""Link costs and groups inside a world, against loops, brute force and DeepSpeed."""

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from placer.affinity import count_affinity
from placer.cli.main import app
from placer.errors import PlacerError, UsageError
from placer.model import ModelSpec
from placer.placement import Placement
from placer.placement.reference import contiguous, random
from placer.placement.topology import Topology
from placer.placement.world import WorldLayout, group_topology, read_costs
from placer.planning.planner import plan_from_trace
from placer.solver.balance.replicas import with_replicas
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.kernels.moves import anneal
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams
from placer.solver.problem.layer_profile import layer_tokens
from placer.solver.problem.scenarios import load_scenarios
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.proof.certificate import PairCertificate
from placer.solver.proof.copies import CopiesCertificate, token_sets
from placer.solver.search.evaluator import Evaluator, evaluate
from placer.solver.search.layer_state import RULES
from placer.solver.search.refine import refined
from placer.solver.solve import solve
from placer.trace import EVERYTHING, Chunk, Fold, Selection, Trace
from tests.plans import changed
from tests.solver.enumeration import every_placement, random_problem

SIZES = (8, 8, 8)
RING = tuple(tuple(min((a - b) % 4, (b - a) % 4) for b in range(4)) for a in range(4))
#: Two nodes of four GPUs: a pair shares NVLink, a node PCIe, nodes a network.
PAIRS = tuple(
    tuple(
        0 if a == b else 1 if a // 2 == b // 2 else 3 if a // 4 == b // 4 else 12
        for b in range(8)
    )
    for a in range(8)
)


def two_classes(num_nodes: int, width: int, inter: int, intra: int) -> tuple:
    size = num_nodes * width
    return tuple(
        tuple(
            0 if a == b else intra if a // width == b // width else inter
            for b in range(size)
        )
        for a in range(size)
    )


def price_of_copies(
    chunk: Chunk, placement: Placement, policy: str, exchange: str, topology: Topology
) -> float:
    """Follow every token with sets and loops; mean over (token, layer) and first homes."""
    cost, width, size = topology.cost, topology.gpus_per_node, topology.num_ranks

    def sent(home: int, ranks: set[int]) -> float:
        if exchange == "per-rank":
            return sum(cost[home][rank] for rank in ranks)
        total = 0
        for node in {rank // width for rank in ranks}:
            landing = node * width + home % width
            total += cost[home][landing]
            total += sum(cost[landing][rank] for rank in ranks if rank // width == node)
        return total

    total = 0.0
    for token, first in itertools.product(range(chunk.num_tokens), range(size)):
        home = first
        for layer, ids in enumerate(chunk.experts):
            rank_of = placement.expert_rank(layer)
            ranks = [int(rank_of[expert]) for expert in ids[token]]
            total += sent(home, set(ranks)) / size
            if policy == "follow":
                home = max(ranks, key=lambda r: (ranks.count(r), -ranks.index(r)))
                total += sent(home, set(ranks)) / size
    return total / chunk.num_tokens / len(chunk.experts)


def traffic(chunk: Chunk, sizes: tuple[int, ...], topology: Topology, **options: object):
    load = load_scenarios(chunk, sizes, "none", 0)
    fields = {"policy": "fixed", "max_load": tuple(np.array([1e9]) for _ in load)}
    return TrafficProblem(
        experts=layer_tokens(chunk), topology=topology, load=load, **(fields | options)
    )


@pytest.mark.parametrize("exchange", ["per-rank", "per-node"])
@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize(
    "topology",
    [
        Topology(gpus_per_node=4, cost=RING),
        Topology(num_nodes=2, gpus_per_node=2, cost=RING),
        Topology(num_nodes=2, gpus_per_node=4, cost=PAIRS),
    ],
    ids=["ring", "ring of two nodes", "pairs"],
)
def test_a_copy_costs_what_the_matrix_says(
    make_chunk: Callable[..., Chunk], topology: Topology, policy: str, exchange: str
) -> None:
    sizes = (2 * topology.num_ranks,) * 3
    chunk = make_chunk(num_tokens=20, num_experts=sizes, top_k=3)
    problem = traffic(chunk, sizes, topology, policy=policy, exchange=exchange)
    start = random(sizes, topology.num_ranks, topology.num_nodes, seed=3)
    better = refined(start, problem, SolverParams(num_sweeps=3))
    prices = []
    for one in (start, better):
        found = evaluate(problem, one).copies
        plain = price_of_copies(chunk, one, policy, exchange, topology)
        assert found == pytest.approx(plain)
        prices.append(plain)
    assert prices[1] < prices[0]


@pytest.mark.parametrize("seed", range(4))
def test_plans_on_a_ring_are_the_best_there_are(
    make_chunk: Callable[..., Chunk], seed: int
) -> None:
    """One layer of six experts on a path of three ranks, whose middle is nearer to all."""
    path = ((0, 1, 5), (1, 0, 1), (5, 1, 0))
    chunk = make_chunk(num_tokens=50, num_experts=(6,), top_k=2, seed=seed)
    topology = Topology(gpus_per_node=3, cost=path)
    options = SolveOptions(
        topology=topology, goal=Goal(caps=Caps(max_imbalance=3.0)), proof="none"
    )
    affinity = count_affinity([chunk], ModelSpec(num_experts=(6,), top_k=2), {})
    placement, report = solve(affinity, options, None, chunk)
    orders = set(itertools.permutations((0, 0, 1, 1, 2, 2)))
    prices = [
        price_of_copies(
            chunk,
            Placement.from_expert_rank([np.array(one)], 3),
            "fixed",
            "per-rank",
            topology,
        )
        for one in sorted(orders)
    ]
    assert report.status == "optimal"
    assert report.objective == pytest.approx(min(prices), abs=1e-6)
    reached = price_of_copies(chunk, placement, "fixed", "per-rank", topology)
    assert reached == pytest.approx(min(prices))


def test_a_plan_for_pairs_is_cheaper_on_them_than_one_for_nodes(
    make_chunk: Callable[..., Chunk],
) -> None:
    """Tokens stay with one of four groups of four experts, which fill two ranks each.

    Nodes alone say which two groups share one; pairs that a group belongs on a pair.
    """
    sizes, rng = (16, 16, 16), np.random.default_rng(0)
    chunk = make_chunk(num_tokens=400, num_experts=sizes, top_k=3)
    group, layers = rng.integers(4, size=400), []
    for _ in sizes:
        names = rng.permutation(16).reshape(4, 4)
        places = rng.permuted(np.tile(np.arange(4), (400, 1)), axis=1)[:, :3]
        layers.append(names[group[:, None], places].astype(np.uint8))
    chunk = replace(chunk, experts=tuple(layers))
    affinity = count_affinity([chunk], ModelSpec(num_experts=sizes, top_k=3), {})
    pairs = Topology(num_nodes=2, gpus_per_node=4, cost=PAIRS)
    nodes = Topology(num_nodes=2, gpus_per_node=4, inter_cost=12, intra_cost=3)
    prices = []
    for topology in (pairs, nodes):
        options = SolveOptions(
            topology=topology,
            goal=Goal(policy="follow", caps=Caps(relax=True)),
            proof="none",
        )
        placement, _ = solve(affinity, options, None, chunk)
        prices.append(price_of_copies(chunk, placement, "follow", "per-rank", pairs))
    assert prices[0] < 0.9 * prices[1]


@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"policy": "follow"},
        {"exchange": "per-node"},
        {"policy": "follow", "redundant_experts": 4, "replica_choice": "local-first"},
        {"preserve_groups": True, "relax": True, "max_imbalance": 2.0},
    ],
    ids=["fixed", "follow", "per-node", "replicas", "groups"],
)
def test_a_matrix_of_two_classes_gives_the_plan_of_two_classes(
    make_chunk: Callable[..., Chunk], num_nodes: int, changes: dict[str, object]
) -> None:
    sizes = (12, 12)
    chunk = make_chunk(num_tokens=300, num_experts=sizes, top_k=3)
    model = ModelSpec(num_experts=sizes, top_k=3, n_group=4)
    affinity = count_affinity([chunk], model, {})
    width = 4 // num_nodes
    classes = Topology(num_nodes=num_nodes, gpus_per_node=width, inter_cost=5, intra_cost=2)
    inside = 1 if num_nodes == 1 else 2
    matrix = replace(
        classes,
        inter_cost=99,
        intra_cost=1,
        cost=two_classes(num_nodes, width, 5, inside),
    )
    found = []
    for topology in (classes, matrix):
        params = SolverParams(num_rounds=3, num_sweeps=3)
        options = SolveOptions(topology=topology, params=params)
        options = changed(options, **{"relax": True} | changes)
        placement, report = solve(affinity, options, None, chunk)
        found.append((placement.to_json(), msgspec.structs.replace(report, seconds=None)))
    assert found[0] == found[1]


def random_costs(num_ranks: int, seed: int) -> tuple:
    upper = np.triu(np.random.default_rng(seed).integers(0, 9, (num_ranks, num_ranks)), 1)
    return tuple(map(tuple, (upper + upper.T).tolist()))


@pytest.mark.parametrize("seed", range(30))
def test_bounds_of_pairs_hold_for_any_matrix(seed: int) -> None:
    """Six experts on three ranks of a node, or four on two nodes of two ranks."""
    if seed % 2:
        topology = Topology(num_nodes=2, gpus_per_node=2, cost=random_costs(4, seed))
        problem = random_problem((4, 4), topology, seed)
    else:
        topology = Topology(gpus_per_node=3, cost=random_costs(3, seed))
        problem = random_problem((6, 6), topology, seed)
    problem = replace(problem, max_load=(1e9, 1e9))
    best = min(problem.objective(one) for one in every_placement(problem))
    certificate = PairCertificate(problem)
    certificate.improve(20)
    assert certificate.bound <= best


@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize("seed", range(6))
def test_bounds_of_copies_hold_for_any_matrix(
    make_chunk: Callable[..., Chunk], seed: int, policy: str
) -> None:
    chunk = make_chunk(num_tokens=20, num_experts=(6,), top_k=2, seed=seed)
    topology = Topology(gpus_per_node=3, cost=random_costs(3, seed))
    load = [load[0] for load in load_scenarios(chunk, (6,), "none", 0)]
    certificate = CopiesCertificate(token_sets([chunk]), load, [1e9], 3)
    certificate.improve(20)
    best = min(
        price_of_copies(
            chunk,
            Placement.from_expert_rank([np.array(one)], 3),
            policy,
            "per-rank",
            topology,
        )
        for one in sorted(set(itertools.permutations((0, 0, 1, 1, 2, 2))))
    )
    bound = certificate.cost_bound(policy, topology) / (3 * chunk.num_tokens)
    from_one_rank = min(map(sum, topology.cost)) / 3
    assert from_one_rank < bound <= best + 1e-9


def test_least_costs_are_of_links_inside_and_between_nodes() -> None:
    assert Topology(num_nodes=2, gpus_per_node=4, cost=PAIRS).least_costs() == (1, 12)
    assert Topology(gpus_per_node=8, cost=PAIRS).least_costs() == (1, 1)
    assert Topology(num_nodes=8, cost=PAIRS).least_costs() == (1, 1)
    assert Topology(
        num_nodes=2, gpus_per_node=2, inter_cost=5, intra_cost=2
    ).least_costs() == (2, 5)
    assert Topology(gpus_per_node=4, inter_cost=5, intra_cost=2).least_costs() == (1, 1)
    assert Topology(num_nodes=4, inter_cost=5, intra_cost=2).least_costs() == (5, 5)
    # A node whose ranks are further apart than nodes are.
    far = ((0, 9, 4, 4), (9, 0, 4, 4), (4, 4, 0, 9), (4, 4, 9, 0))
    assert Topology(num_nodes=2, gpus_per_node=2, cost=far).least_costs() == (4, 4)
    assert Topology().least_costs() == (0, 0)


def test_copies_near_the_home_are_chosen_by_its_node_while_moves_are_tried(
    make_chunk: Callable[..., Chunk],
) -> None:
    """What the moves add up to is the price of where they end."""
    chunk = make_chunk(num_tokens=400, top_k=2)
    topology = Topology(num_nodes=2, gpus_per_node=2, inter_cost=5, intra_cost=2)
    problem = traffic(chunk, SIZES, topology, replica_choice="local-first")
    loads = [load[0] for load in problem.load]
    start = with_replicas(contiguous(SIZES, 4, 2), loads, 8)
    evaluator = Evaluator(problem, start)
    before = evaluator.price_per_layer()
    kind, rule = np.zeros(SIZES[0], dtype=np.int64), RULES["local-first"]
    changes = [
        anneal(evaluator.tokens(n), evaluator.prices[n], state, kind, rule, 40.0, 500, 1)
        for n, state in enumerate(evaluator.states)
    ]
    assert any(changes)
    assert before + changes == pytest.approx(evaluator.price_per_layer())


@pytest.mark.parametrize(
    ("world", "expected"),
    [
        # The examples of DeepSpeed's own documentation (deepspeed/utils/groups.py).
        (
            {"num_nodes": 2, "gpus_per_node": 8, "ep_size": 4, "tensor_parallel_size": 2},
            [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]],
        ),
        (
            {"num_nodes": 1, "gpus_per_node": 8, "ep_size": 2},
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        (
            {"num_nodes": 2, "gpus_per_node": 2, "ep_size": 2, "ep_groups": "strided"},
            [[0, 2], [1, 3]],
        ),
        (
            {
                "num_nodes": 4,
                "gpus_per_node": 8,
                "ep_size": 8,
                "tensor_parallel_size": 2,
                "ep_groups": "strided",
            },
            [
                [0, 4, 8, 12, 16, 20, 24, 28],
                [2, 6, 10, 14, 18, 22, 26, 30],
                [1, 5, 9, 13, 17, 21, 25, 29],
                [3, 7, 11, 15, 19, 23, 27, 31],
            ],
        ),
    ],
)
def test_groups_are_deepspeeds(world: dict, expected: list[list[int]]) -> None:
    assert [list(group) for group in WorldLayout(**world).groups] == expected


@pytest.mark.parametrize("ep_groups", ["consecutive", "strided"])
@pytest.mark.parametrize(
    "sizes", [(16, 1, 4), (16, 2, 4), (32, 4, 8), (8, 2, 2), (8, 1, 8)]
)
def test_groups_are_those_that_deepspeed_makes(
    sizes: tuple[int, int, int], ep_groups: str
) -> None:
    groups = pytest.importorskip("deepspeed.utils.groups", reason="DeepSpeed is missing")
    world, tensor, expert = sizes
    layout = WorldLayout(
        num_nodes=1,
        gpus_per_node=world,
        ep_size=expert,
        tensor_parallel_size=tensor,
        ep_groups=ep_groups,
    )
    theirs, _ = groups._get_expert_parallel_ranks(
        world, tensor, expert, use_data_before_expert_parallel_=ep_groups == "strided"
    )
    assert [list(group) for group in layout.groups] == [list(group) for group in theirs]


@pytest.mark.parametrize(
    ("world", "nodes", "words"),
    [
        ({"ep_size": 4}, 1, "inside one node: no copy crosses nodes"),
        ({"ep_size": 2, "ep_groups": "strided"}, 2, "as with --nodes 2 --gpus-per-node 1"),
        ({"ep_size": 8, "tensor_parallel_size": 2}, 2, "4 ranks on each of 2 nodes"),
    ],
)
def test_a_group_is_a_topology_of_its_own(world: dict, nodes: int, words: str) -> None:
    layout = WorldLayout(num_nodes=2, gpus_per_node=8, **world)
    assert words in layout.describe()
    topology = group_topology(num_nodes=2, gpus_per_node=8, layout=layout)
    assert topology == Topology(num_nodes=nodes, gpus_per_node=world["ep_size"] // nodes)


@pytest.mark.parametrize(
    ("world", "match"),
    [
        ({"ep_size": 3}, "16 data parallel ranks .* of 3"),
        ({"ep_size": 8, "tensor_parallel_size": 3}, "tensor parallel groups of 3"),
        ({"ep_size": 16, "tensor_parallel_size": 2}, r"8 data parallel ranks \(16 / 2"),
        ({"ep_size": 4, "ep_groups": "random"}, "--ep-groups random is not known"),
        ({"ep_size": 4, "num_nodes": 4, "gpus_per_node": 6}, r"2\+2 and 4 ranks on nodes"),
    ],
)
def test_worlds_that_do_not_divide_are_told(world: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        WorldLayout(**({"num_nodes": 2, "gpus_per_node": 8} | world))


def test_costs_of_a_world_are_taken_for_its_groups(tmp_path: Path) -> None:
    path = tmp_path / "links.csv"
    path.write_text("\n".join(",".join(map(str, row)) for row in PAIRS) + "\n")
    layout = WorldLayout(num_nodes=2, gpus_per_node=4, ep_size=4, ep_groups="strided")
    topology = group_topology(num_nodes=2, gpus_per_node=4, layout=layout, cost_file=path)
    assert topology.cost == two_classes(2, 2, 12, 3)  # world ranks 0, 2, 4, 6
    assert topology.cost_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    uneven = np.array(PAIRS)
    uneven[1, 3] = uneven[3, 1] = 7
    path.write_text("\n".join(",".join(map(str, row)) for row in uneven.tolist()))
    with pytest.raises(UsageError, match=r"costs between ranks \[1, 3, 5, 7\] differ"):
        group_topology(num_nodes=2, gpus_per_node=4, layout=layout, cost_file=path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("[[0, 3], [3, 0]]", "links.json"),
        ('{"cost": [[0, 3.0], [3, 0]], "unit": "hops"}', "links.json"),
        ("0,3\n3,0\n", "links.csv"),
        ("0, 3.0\n\n3, 0", "links.CSV"),
    ],
)
def test_costs_are_read(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_costs(tmp_path / name) == ((0, 3), (3, 0))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[[0, 1], [1]]", "2 rows of 1 and 2 costs, but there are 2 ranks"),
        ("[[0, 1, 1], [1, 0, 1], [1, 1, 0]]", "3 rows of 3 costs, but there are 2 ranks"),
        ("[]", "0 rows"),
        ("[[0, -1], [-1, 0]]", "from rank 0 to rank 1 is -1: a cost must not be negative"),
        ("[[0, 1], [1, 2]]", "from rank 1 to rank 1 is 2: the cost from a rank to itself"),
        ("[[0, 1], [2, 0]]", "is 1, and 2 back"),
        ("[[0, 1.5], [1.5, 0]]", r"a cost is 1\.5, not a whole number"),
        ("[[0, NaN], [1, 0]]", "a cost is nan"),
        ("[[0, 1e300], [1, 0]]", "not a whole number below"),
        ('[[0, "a"], [1, 0]]', "a cost is 'a'"),
        ("[[0, true], [1, 0]]", "a cost is True"),
        ('{"links": 3}', "holds no rows of costs"),
        ("[0, 1]", "holds no rows of costs"),
        ("{", "is not valid JSON"),
    ],
)
def test_what_is_no_matrix_is_told(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "links.json"
    path.write_text(text)
    with pytest.raises(PlacerError, match=match):
        group_topology(num_nodes=1, gpus_per_node=2, cost_file=path)


def test_other_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "links.csv").write_text("0,one\n1,0\n")
    with pytest.raises(PlacerError, match="is not a matrix of costs"):
        read_costs(tmp_path / "links.csv")
    (tmp_path / "links.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlacerError, match="is not UTF-8: byte 0 is 0xff"):
        read_costs(tmp_path / "links.json")
    with pytest.raises(PlacerError, match=r"topology .* does not exist"):
        read_costs(tmp_path / "absent.json")
    (tmp_path / "links.json").write_text("[[0, 1], [1, 0]]")
    with pytest.raises(UsageError, match="--topology gives the cost of every link"):
        group_topology(
            num_nodes=1, gpus_per_node=2, inter_cost=8, cost_file=tmp_path / "links.json"
        )


@pytest.mark.parametrize("policy", ["fixed", "follow"])
def test_prices_of_a_plan_are_those_of_what_was_held_out(
    make_trace: Callable[..., Trace], policy: str
) -> None:
    trace = make_trace(num_experts=(16, 16), num_tokens=80, num_sequences=6)
    topology = Topology(num_nodes=2, gpus_per_node=4, cost=PAIRS)
    options = SolveOptions(
        topology=topology, goal=Goal(policy=policy, caps=Caps(relax=True)), proof="none"
    )
    plan = plan_from_trace(trace, options, Selection(Fold(0, 2)))
    heldout = trace.read(Selection(Fold(1, 2)))
    expected = {
        "contiguous": contiguous((16, 16), 8, 2),
        "placer": plan.placement,
    }
    for name, placement in expected.items():
        plain = price_of_copies(heldout, placement, policy, "per-rank", topology)
        assert plan.metrics["prices"][name] == pytest.approx(plain, abs=1e-5)
    one = replace(options, topology=Topology(gpus_per_node=8))
    assert "prices" not in plan_from_trace(trace, one, EVERYTHING).metrics


def test_a_plan_says_which_links_and_which_groups(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    make_trace(num_experts=(8, 8), num_sequences=6)
    links, plan = tmp_path / "links.json", tmp_path / "plan.json"
    links.write_text(json.dumps(PAIRS))
    words = ["solve", str(tmp_path / "trace"), "--nodes", "2", "--gpus-per-node", "4"]
    words += ["--proof", "none", "--relax-cap", "--out", str(plan), "--force"]
    groups = ["--ep-size", "2", "--tensor-parallel-size", "2", "--ep-groups", "strided"]
    more = ["--topology", str(links), *groups]
    told = CliRunner().invoke(app, [*words, *more], catch_exceptions=False).stderr
    assert "world ranks [0, 4], [2, 6], [1, 5], [3, 7]" in told
    written = json.loads(plan.read_text())
    assert (written["num_ranks"], written["num_nodes"]) == (2, 2)
    provenance = written["provenance"]
    assert provenance["topology"] == {
        "sha256": hashlib.sha256(links.read_bytes()).hexdigest(),
        "cost": [[0, 12], [12, 0]],
    }
    assert provenance["inter_cost"] is None
    assert provenance["layout"] == {
        "world_size": 8,
        "tensor_parallel_size": 2,
        "ep_size": 2,
        "ep_groups": "strided",
        "groups": [[0, 4], [2, 6], [1, 5], [3, 7]],
    }
    with pytest.raises(UsageError, match="--ep-size is missing"):
        CliRunner().invoke(app, [*words, *groups[2:]], catch_exceptions=False)
