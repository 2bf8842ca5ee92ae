"""One placement, judged held out: the work of ``bench_solve.py``, done in processes.

Each result is a small JSON file in a folder that the sources of placer name, so that a
run that was stopped goes on where it was, and no figure outlives the code that it is of.
"""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

import placer
from placer.affinity import Affinity, count_affinity
from placer.baseline import BASELINES, BaselineProblem
from placer.placement.placement import Placement
from placer.placement.policy import Policy
from placer.placement.topology import Topology
from placer.planning.planner import plan_from_trace
from placer.run.session import Session
from placer.run.writing import atomic_file
from placer.simulation.metrics import PolicyTally
from placer.simulation.simulate import DEFAULT_BATCH_SIZE, count
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.problem.layer_profile import layer_tokens
from placer.solver.problem.scenarios import load_scenarios
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.search.evaluator import evaluate
from placer.target.engine import ReplicaChoice
from placer.trace import Chunk, Fold, Selection, Trace
from tests.plans import changed
from tests.referee import referee_result

# The referee's own rule: figures are checked against it.
_REPLICA_CHOICE: ReplicaChoice = "local-first"
#: Commands and reports print figures, they make none.
WITHOUT_FIGURES = ("cli", "report", "checkpoint", "replay", "runtime_map", "demo")

#: What a plan is solved for, beside its policy. The cap is 1.10 where none is named.
VARIANTS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "capped": {},
        "uncapped": {"max_imbalance": 64.0},
        "redundant": {},
        "redundant, 1.03": {"max_imbalance": 1.03},
        "robust": {"robust": "bootstrap", "max_imbalance": 1.11},
        "redundant, robust": {"robust": "bootstrap", "max_imbalance": 1.11},
        "even-receivers": {"receive_price": 10.0},
        "even-receivers, 2": {"receive_price": 2.0},
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """The traces, and what is measured."""

    traces: Path
    results: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Case(ABC):
    """Who is judged where: the profile is the fold ``part`` of 2, all else is held out."""

    trace: str
    num_nodes: int
    gpus_per_node: int
    part: int

    @property
    def topology(self) -> Topology:
        return Topology(num_nodes=self.num_nodes, gpus_per_node=self.gpus_per_node)

    @property
    def profile(self) -> Selection:
        return Selection(Fold(self.part, 2))

    @property
    def file_name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values()) + ".json"

    @property
    @abstractmethod
    def is_refereed(self) -> bool:
        """Whether the referee counts this placement too."""

    @abstractmethod
    def place(self, trace: Trace) -> tuple[Placement, dict[str, Any]]:
        """Return the placement, and what else is known of it."""

    def redundant_experts(self, name: str) -> int:
        """Return one redundant expert per rank for whoever has replicas."""
        return self.topology.num_ranks if "redundant" in name or name == "eplb" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved(Case):
    """A plan of placer; the first seed has a certificate, too."""

    variant: str = "capped"
    policy: Policy
    seed: int

    @property
    def is_refereed(self) -> bool:
        return self.seed == 0

    def place(self, trace: Trace) -> tuple[Placement, dict[str, Any]]:
        has_proof = self.seed == 0 and self.variant == "capped"
        options = SolveOptions(
            topology=self.topology,
            goal=Goal(
                policy=self.policy,
                exchange="per-rank" if self.num_nodes == 1 else "per-node",
                redundant_experts=self.redundant_experts(self.variant),
                replica_choice=_REPLICA_CHOICE,
                caps=Caps(relax=True),
            ),
            proof="quick" if has_proof else "none",
        )
        options = changed(options, **{"max_imbalance": 1.10} | VARIANTS[self.variant])
        plan = plan_from_trace(trace, options, self.profile, Session(seed=self.seed))
        pairs = plan.solver.pairs
        return plan.placement, {
            "gap": plan.solver.gap,
            "pairs_gap": None if pairs is None else pairs.gap,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline(Case):
    """The placement of another tool or paper."""

    name: str

    @property
    def is_refereed(self) -> bool:
        return True

    def place(self, trace: Trace) -> tuple[Placement, dict[str, Any]]:
        problem = BaselineProblem(
            trace=trace,
            selection=self.profile,
            topology=self.topology,
            redundant_experts=self.redundant_experts(self.name),
        )
        return BASELINES[self.name](problem), {}


def sources_sha256() -> str:
    """Return the hash of what figures depend on: placer's sources, and this file."""
    package = Path(placer.__file__).parent
    every = (path for path in package.rglob("*") if path.suffix in (".py", ".toml"))
    used = (p for p in every if p.relative_to(package).parts[0] not in WITHOUT_FIGURES)
    digest = hashlib.sha256()
    for path in sorted(used):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def measure(case: Case, folders: Folders) -> dict[str, Any]:
    """Return the figures of a case, from its file if it has been measured before.

    Raises
    ------
    UsageError
        If a baseline's partitioner is not installed, or cannot serve this case.
    """
    path = folders.results / case.file_name
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    trace = Trace(folders.traces / case.trace)
    began = time.process_time()
    placement, known = case.place(trace)
    known["cpu_seconds"] = time.process_time() - began
    found = asdict(case) | known | _judged(case, placement, folders)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(found), encoding="utf-8")
    return found


@lru_cache(maxsize=1)
def _read(directory: Path, profile: Selection) -> tuple[Affinity, Chunk, Chunk]:
    trace = Trace(directory)
    affinity = count_affinity(trace.chunks(profile), trace.model, {})
    return affinity, trace.read(profile), trace.read(profile.complement())


def _judged(case: Case, placement: Placement, folders: Folders) -> dict[str, Any]:
    """Return what is held out, the copies of each sequence, and the profile's objective."""
    affinity, profile, heldout = _read(folders.traces / case.trace, case.profile)
    tallies = count(placement, heldout, replica_choice=_REPLICA_CHOICE)
    found: dict[str, Any] = {}
    for policy in ("fixed", "follow"):
        found[policy] = {
            "heldout": tallies[policy].metrics().to_json(),
            "copies_of_sequence": _by_sequence(tallies[policy], heldout),
            "price_on_profile": _price(case.topology, policy, placement, profile),
        }
    found["imbalance_on_profile"] = [
        _imbalance(placement, layer, load) for layer, load in enumerate(affinity.load)
    ]
    if case.is_refereed:
        expected = referee_result(placement, heldout, DEFAULT_BATCH_SIZE)
        found["referee_difference"] = max(
            abs(value - expected[policy][name])
            for policy in ("fixed", "follow")
            for name, value in found[policy]["heldout"].items()
        )
    return found


def _by_sequence(tally: PolicyTally, tokens: Chunk) -> dict[str, list[int]]:
    _, sequence = np.unique(tokens.sequence_ids, return_inverse=True)
    sums = {"rank": tally.copies_of_token, "node": tally.node_copies_of_token}
    return {
        name: np.bincount(sequence, weights=copies).astype(int).tolist()
        for name, copies in sums.items()
    }


def _price(topology: Topology, policy: Any, placement: Placement, profile: Chunk) -> float:
    """Return the price of the copies on the profile: what a plan minimises."""
    load = load_scenarios(profile, placement.num_experts, "none", 0)
    problem = TrafficProblem(
        experts=layer_tokens(profile),
        topology=topology,
        policy=policy,
        exchange="per-rank" if topology.num_nodes == 1 else "per-node",
        load=load,
        max_load=tuple(one.sum(axis=1) for one in load),
        replica_choice=_REPLICA_CHOICE,
    )
    return evaluate(problem, placement).copies


def _imbalance(placement: Placement, layer: int, load: Any) -> float | None:
    """Return max/mean rank load; none with replicas, whose share the engine chooses."""
    if placement.has_replicas:
        return None
    ranks = np.bincount(placement.expert_rank(layer), weights=load)
    return float(ranks.max() / ranks.mean())
