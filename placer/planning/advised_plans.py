"""The plans that advice compares, and the commands that make them.

Each is solved for what ``placer solve`` solves for by its command, but in a few seconds.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from placer.model import ModelSpec
from placer.placement.topology import Topology
from placer.planning.engine_options import Loading, loads_map, require_loadable, solved_for
from placer.planning.question import Question
from placer.solver.balance.replicas import redundant_experts_that_fit
from placer.solver.caps import MAX_IMBALANCE, Caps
from placer.solver.goal import Goal, Objective
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams
from placer.solver.start import Start
from placer.trace import Fold, Selection

PROFILE = Fold(0, 2)
# Enough to see what there is to gain; `placer solve` gets the rest.
QUICK = SolveOptions(
    topology=Topology(gpus_per_node=1),
    goal=Goal(caps=Caps(relax=True)),
    proof="none",
    params=SolverParams(num_rounds=3, num_sweeps=3, num_starts=1, num_tokens=16_384),
)

# Balance further from even than this is worth a word on redundant experts.
_FAR_FROM_EVEN = 1.1

#: Plans by name: for balance only; for traffic, no rank busier than EPLB's busiest; for
#: traffic under the default cap.
BALANCED = "balanced"
GUARDED = "placed (EPLB's load)"
CAPPED = f"placed (cap {MAX_IMBALANCE:.2f})"


def balanced_options(question: Question, model: ModelSpec) -> SolveOptions:
    """Return what ``placer solve --objective balance`` solves for."""
    asked = _options(question, model, "balance")
    return replace(asked, goal=asked.goal.balanced)


def with_more_replicas(
    question: Question, model: ModelSpec, imbalance: float
) -> Question | None:
    """Return the question with one further slot per rank.

    ``None`` where an imbalance is too little to be worth a word on it, the engine loads no
    map of the model, or the slots do not fit.
    """
    topology, engine = question.topology, question.known_engine
    more = question.redundant_experts + topology.num_ranks
    if imbalance <= _FAR_FROM_EVEN:
        return None
    if engine is not None and not loads_map(engine, model):
        return None
    blocks = topology.num_nodes if model.n_group > 1 else 1
    fitting = redundant_experts_that_fit(model.num_experts, topology.num_ranks, blocks)
    if more not in islice(fitting, 2):
        return None
    return replace(question, redundant_experts=more)


def advised_plans(question: Question, model: ModelSpec) -> dict[str, SolveOptions]:
    """Return what each plan is solved for, by name; those for traffic where it can change.

    Raises
    ------
    UsageError
        If the engine could load no plan of the model.
    """
    plans = {BALANCED: balanced_options(question, model)}
    if question.sent is None or question.topology.num_ranks == 1:
        return plans
    placed = _options(question, model, "traffic")
    if placed.goal.objective == "balance":  # as it is solved for this engine
        return plans
    placed = placed.guarded()
    if placed.goal.caps.below_eplb:
        plans[GUARDED] = placed
        capped = Caps(max_imbalance=MAX_IMBALANCE, relax=True)
        placed = replace(placed, goal=replace(placed.goal, caps=capped))
    plans[CAPPED] = placed
    return plans


def _options(question: Question, model: ModelSpec, objective: Objective) -> SolveOptions:
    engine, has_replicas = question.known_engine, question.redundant_experts > 0
    served = solved_for(
        None if engine is None else engine.name,
        question.policy,
        objective,
        _exchange(question),
        question.replica_choice,
        has_replicas=has_replicas,
    )
    loading = Loading()
    if engine is not None:
        loading = require_loadable(
            engine,
            model,
            redundant_experts=question.redundant_experts,
            topology=question.topology,
        )
    return replace(
        QUICK,
        topology=question.topology,
        goal=replace(
            QUICK.goal,
            objective=served.objective,
            policy=question.policy,
            # On one node both count the same copies.
            exchange=served.exchange if question.topology.num_nodes > 1 else "per-rank",
            redundant_experts=question.redundant_experts,
            replica_choice=served.replica_choice,
        ),
        start=Start(
            preserve_groups=loading.keeps_groups,
            ignore_groups=not (loading.keeps_groups or served.groups_count),
        ),
    )


def _exchange(question: Question) -> str | None:
    """Return the ``--exchange`` that ``placer solve`` takes where no engine is named."""
    between = question.topology.num_nodes > 1 and question.known_engine is None
    return "per-node" if between else None


def solve_command(
    question: Question, options: SolveOptions, source: Path, out: str = "plan.json"
) -> str:
    """Return the command that solves for the options of one of :func:`advised_plans`."""
    engine = question.known_engine
    parts = [*_begun("solve", question, source)]
    parts += _goal_words(question, options.goal)
    goal = options.goal
    if goal.redundant_experts:
        parts += [f"--redundant-experts {goal.redundant_experts}"]
    if engine is not None:
        parts += [f"--engine {engine.name}"]
    elif goal.replica_choice is not None and not source.is_file():
        parts += [f"--replica-choice {goal.replica_choice}"]
    if not source.is_file():
        parts += [Selection(PROFILE, question.phase).options]
    return " ".join([*parts, f"--out {shlex.quote(out)}"])


def judging_command(
    question: Question, source: Path, options: Sequence[str], plan: str = "plan.json"
) -> str:
    """Return the command that predicts times of the plan of :func:`solve_command`.

    ``options`` are those of batches, hardware and the size of an expert.
    """
    parts = ["placer simulate", plan, shlex.quote(str(source))]
    parts += [Selection(PROFILE, question.phase).complement().options]
    if question.known_engine is not None:
        parts += [f"--engine {question.known_engine.name}"]
    return " ".join([*parts, shlex.join(options)])


def weighing_command(question: Question, source: Path, options: Sequence[str]) -> str:
    """Return the command that judges a question by predicted time.

    ``options`` are those of the batches and of the least gain.
    """
    parts = [*_begun("advise", question, source), f"--policy {question.policy}"]
    if question.known_engine is not None:
        parts += [f"--engine {question.known_engine.name}"]
    if question.phase is not None:
        parts += [f"--phase {question.phase}"]
    return " ".join([*parts, *options, "--hardware h100 --model MODEL"])


def _begun(command: str, question: Question, source: Path) -> Sequence[str]:
    """Return the first words of a command on a source for the topology."""
    topology = question.topology
    nodes = [f"--nodes {topology.num_nodes}"] if topology.num_nodes > 1 else []
    ranks = f"--gpus-per-node {topology.gpus_per_node}"
    return [f"placer {command}", shlex.quote(str(source)), ranks, *nodes]


def _goal_words(question: Question, goal: Goal) -> Sequence[str]:
    if goal.objective == "balance":
        return ["--objective balance"]
    parts = [f"--policy {goal.policy}"]
    if (exchange := _exchange(question)) is not None:
        parts += [f"--exchange {exchange}"]
    if goal.caps.words:
        # Not a cap that the user asks for: where it is out of reach, the best will do.
        parts += [*goal.caps.words, "--relax-cap"]
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Relief:
    """What further redundant experts do to the busiest rank.

    Attributes
    ----------
    question, options
        What is asked and solved for, with them.
    imbalance
        Busiest rank's load over the mean, with them.
    without
        The least without more of them.
    """

    question: Question
    options: SolveOptions
    imbalance: float
    without: float

    @property
    def is_enough(self) -> bool:
        """Whether they save what a change must save."""
        return self.imbalance <= (1 - self.question.least_gain) * self.without

    @property
    def sentence(self) -> str:
        """What they do, in words."""
        return (
            f"with {self.question.redundant_experts} redundant experts the busiest rank "
            f"has {self.imbalance:.3f} of the mean load, without them at least "
            f"{self.without:.3f}"
        )

    def command(self, source: Path) -> str:
        """Return the command that makes the plan."""
        return solve_command(self.question, self.options, source)
