"""The last step of the demo: a plan for the trace of a real model."""

from pathlib import Path
from shlex import quote

from placer.demo.steps import Steps
from placer.placement import Plan
from placer.placement.topology import Topology
from placer.planning.request import SolveRequest
from placer.planning.solving import solve_request
from placer.run.session import Session
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams
from placer.trace import Selection

NAME = "gpt-oss-20b"
NUM_RANKS = 8
ENGINE = "sglang-deepep"
#: Solved on these sequences, judged on all others.
FOLD = "0/2"
# A short search without a proof: the demo should not take a minute more.
PARAMS = SolverParams(num_rounds=4, num_sweeps=4)
#: Said where the trace is not there.
ABSENT = (
    f"The last step is left out: it needs traces/{NAME}, which comes with the source of "
    "placer; run placer demo in the root of a source tree."
)


def shipped_trace() -> Path | None:
    """Return the trace beside this package or in the current directory, if there is one."""
    here = Path.cwd()
    for root in (here, Path(__file__).parents[2]):
        place = root / "traces" / NAME
        if (place / "trace.json").is_file():
            return place.relative_to(here) if place.is_relative_to(here) else place
    return None


def solve_trace(trace: Path, out: Path, steps: Steps) -> Plan:
    """Return a plan of one half of the sequences, judged on the other; write it to ``out``.

    Raises
    ------
    PlacerError
        If the trace is damaged.
    """
    steps.begin(
        f"placer solve {quote(str(trace))} --gpus-per-node {NUM_RANKS} --engine {ENGINE} "
        f"--fold {FOLD} --proof none --num-rounds {PARAMS.num_rounds} "
        f"--num-sweeps {PARAMS.num_sweeps} --out {quote(str(out))}"
    )
    request = SolveRequest(
        source=trace,
        selection=Selection.parse(FOLD, None, "all"),
        options=SolveOptions(
            topology=Topology(gpus_per_node=NUM_RANKS), proof="none", params=PARAMS
        ),
        engine=ENGINE,
    )
    session = Session(progress=steps.tell)
    plan = solve_request(request, steps.say, steps.say, session).plan
    if session.deadline.interrupted:
        raise KeyboardInterrupt
    plan.write(out)
    return plan
