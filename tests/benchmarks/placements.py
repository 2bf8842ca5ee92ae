"""One solved plan, judged held out: the work of ``bench_solve.py``, done in processes.

Each result is a small JSON file in a folder that the sources of placer name, so that a
run that was stopped goes on where it was, and no figure outlives the code that it is of.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import placer
from placer.affinity import Affinity, count_affinity
from placer.files import atomic_file
from placer.plan.options import SolveOptions
from placer.plan.placement import Placement
from placer.plan.plan import Policy
from placer.plan.problem import Topology
from placer.plan.solve import solve
from placer.simulation.baselines import balanced, contiguous
from placer.simulation.intervals import copies_ratio
from placer.simulation.metrics import PolicyMetrics
from placer.simulation.simulate import DEFAULT_BATCH_SIZE, count
from placer.trace import Chunk, Fold, Trace
from tests.referee import load_referee, referee_result

#: Commands and reports print figures, they make none.
WITHOUT_FIGURES = ("cli", "report", "checkpoint", "replay", "runtime_map", "demo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is solved: the profile is the fold ``part`` of 2, all else is held out."""

    trace: str
    num_nodes: int
    gpus_per_node: int
    policy: Policy
    part: int
    seed: int

    @property
    def fold(self) -> Fold:
        return Fold(self.part, 2)

    @property
    def file_name(self) -> str:
        shape = f"{self.num_nodes}x{self.gpus_per_node}"
        return f"{self.trace}-{shape}-{self.policy}-{self.part}-{self.seed}.json"

    @property
    def is_first(self) -> bool:
        """Whether this seed is the one with a certificate, an interval and the referee."""
        return self.seed == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """The traces, what is measured, and ``score.py``."""

    traces: Path
    results: Path
    referee: Path


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
    """Return the figures of a case, from its file if it has been measured before."""
    path = folders.results / case.file_name
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    found = _measure(case, folders)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def _measure(case: Case, folders: Folders) -> dict[str, Any]:
    affinity, profile, heldout = _read(folders.traces / case.trace, case.fold)
    topology = Topology(num_nodes=case.num_nodes, gpus_per_node=case.gpus_per_node)
    options = SolveOptions(
        topology=topology,
        policy=case.policy,
        exchange="per-rank" if case.num_nodes == 1 else "per-node",
        relax_cap=True,
        proof="quick" if case.is_first else "none",
        seed=case.seed,
    )
    began = time.process_time()
    placement, report = solve(affinity, options, None, profile)
    seconds = time.process_time() - began
    tallies = count(placement, heldout)
    base = contiguous(affinity.model.num_experts, topology.num_ranks, topology.num_nodes)
    base_tally = count(base, heldout)[case.policy]
    even = balanced(affinity.load, topology.num_ranks, topology.num_nodes)
    judged = {policy: tally.metrics() for policy, tally in tallies.items()}
    found = asdict(case) | {
        "cpu_seconds": seconds,
        "placer": judged[case.policy].to_json(),
        "contiguous": base_tally.metrics().to_json(),
        "balanced": count(even, heldout)[case.policy].metrics().to_json(),
    }
    if not case.is_first:
        return found
    own = tallies[case.policy]
    copies = "copies_of_token" if case.num_nodes == 1 else "node_copies_of_token"
    ratio = copies_ratio(
        getattr(own, copies), getattr(base_tally, copies), heldout.sequence_ids, None, ()
    )
    return found | {
        "interval": None if ratio is None else [ratio.low, ratio.high],
        "gap": report.gap,
        "pairs_gap": None if report.pairs is None else report.pairs.gap,
        "referee_difference": _difference(judged, placement, heldout, folders.referee),
    }


@lru_cache(maxsize=1)
def _read(directory: Path, fold: Fold) -> tuple[Affinity, Chunk, Chunk]:
    trace = Trace(directory)
    affinity = count_affinity(trace.chunks(fold), trace.model, {})
    return affinity, trace.read(fold), trace.read(fold.complement())


def _difference(
    judged: dict[str, PolicyMetrics], placement: Placement, tokens: Chunk, referee: Path
) -> float:
    """Return how far any figure is from the referee's, which rounds to 1e-4."""
    expected = referee_result(load_referee(referee), placement, tokens, DEFAULT_BATCH_SIZE)
    return max(
        abs(value - expected[policy][name])
        for policy, metrics in judged.items()
        for name, value in metrics.to_json().items()
    )
