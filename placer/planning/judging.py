"""Figures of a plan and of its baselines, on the tokens that judge them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from placer.model import ModelSpec
from placer.placement.placement import Placement
from placer.placement.reference import Load, contiguous
from placer.run.deadline import Deadline, OutOfTimeError
from placer.simulation.simulate import simulate
from placer.solver.balance.eplb import pack_loads
from placer.solver.balance.load_caps import balanced
from placer.solver.options import SolveOptions
from placer.solver.problem.layer_profile import layer_tokens
from placer.solver.problem.scenarios import load_scenarios
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.search.alternation import table_for, vocabulary_of
from placer.solver.search.evaluator import evaluate
from placer.table.table import Table
from placer.trace import Chunk

Figures = dict[str, Any]

# Figures of one placement, in whose time a search finds its homes by tables and prices it.
_RATING = 3.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judging:
    """Serves tokens from placements as a plan is solved for.

    Attributes
    ----------
    model
        The trace's model.
    options
        What is solved for.
    profile, heldout
        The tokens to solve on, and those of all other sequences; ``None``: there are none.
    """

    model: ModelSpec
    options: SolveOptions
    profile: Chunk
    heldout: Chunk | None

    @property
    def judged(self) -> Chunk:
        """The tokens that baselines are measured on."""
        return self.profile if self.heldout is None else self.heldout

    @property
    def chunks(self) -> list[Chunk]:
        """The tokens to solve on, and those of all other sequences where there are some."""
        return [self.profile] if self.heldout is None else [self.profile, self.heldout]

    def baselines(self, load: Load) -> dict[str, Placement]:
        """Return the placements that need only loads, L arrays ``[E]``.

        ``eplb`` has as many slots as the plan.
        """
        sizes, topology = self.model.num_experts, self.options.topology
        num_ranks, num_nodes = topology.num_ranks, topology.num_nodes
        more, n_group = self.options.goal.redundant_experts, self.model.n_group
        found = {
            "contiguous": contiguous(sizes, num_ranks, num_nodes, more),
            "eplb": pack_loads(load, topology, more, n_group),
        }
        if not any(size % num_ranks for size in sizes):
            found["balanced"] = balanced(load, num_ranks, num_nodes)
        return found

    def measure(
        self, placements: dict[str, Placement], deadline: Deadline
    ) -> dict[str, Figures]:
        """Return the figures of placements on the judged tokens.

        Takes from the ``deadline`` what those of a plan are going to take. Placements that
        leave no time for this are left out.
        """
        found: dict[str, Figures] = {}
        known: dict[str, Figures] = {}
        rating = 0.0 if self.options.goal.content_policy is None else _RATING
        tokens = self.profile.num_tokens + (self.heldout.num_tokens if self.heldout else 0)
        share = tokens / self.judged.num_tokens
        began, seconds = time.monotonic(), 0.0
        for name, placement in placements.items():
            key = str(placement.to_json())
            if key not in known:
                left = deadline.left()
                if left is not None and left < seconds * (1 + share + rating):
                    deadline.chosen_in_haste = True
                    continue
                # As much again for the plan, and for the search.
                part = deadline.part(1 / (2 + share))
                begun = time.monotonic()
                try:
                    known[key] = self.figures(placement, self.judged, deadline=part)[0]
                except OutOfTimeError as error:
                    deadline.chosen_in_haste = True
                    spent = time.monotonic() - begun
                    deadline.needs(rating * (spent + error.seconds))
                    break
                seconds = (time.monotonic() - began) / len(known)
            found[name] = known[key]
        # Pricing the plan takes up to three times as long as its figures, unless tables
        # priced it in the search.
        deadline.reserve((1 if rating else 4) * share * seconds)
        deadline.needs(rating * seconds)
        return found

    def figures(
        self, placement: Placement, *chunks: Chunk, deadline: Deadline
    ) -> list[Figures]:
        """Return metrics by home policy, for each chunk of tokens.

        Raises
        ------
        OutOfTimeError
            If there is no time for them.
        """
        table = self._table(placement, deadline)
        found = []
        for tokens in chunks:
            served = simulate(
                placement,
                tokens,
                table=table,
                replica_choice=self.options.goal.replica_choice,
                layer_ids=self.model.layer_ids,
                deadline=deadline,
            )
            found.append({policy: value.to_json() for policy, value in served.items()})
        return found

    def _table(self, placement: Placement, deadline: Deadline) -> Table | None:
        """Return the placement's table, where the policy takes its homes from one."""
        if self.options.goal.content_policy is None:
            return None
        return table_for(
            placement,
            self.profile,
            vocabulary_of(self.profile, self.options.goal.content_policy),
            self.options.goal.caps,
            replica_choice=self.options.goal.replica_choice,
            layer_ids=self.model.layer_ids,
            deadline=deadline,
        )

    def prices(
        self, placements: Mapping[str, Placement], deadline: Deadline
    ) -> dict[str, float]:
        """Return the price of each placement's copies, where links cost differently.

        Empty for a policy whose homes each placement's own table gives.

        Raises
        ------
        OutOfTimeError
            If there is no time for all of them.
        """
        goal, topology, tokens = self.options.goal, self.options.topology, self.judged
        policy = goal.policy
        if topology.cost is None and topology.num_nodes == 1:
            return {}
        if policy == "token" or policy == "request":  # mypy narrows no set
            return {}
        load = load_scenarios(tokens, self.model.num_experts, "none", seed=0)  # none drawn
        problem = TrafficProblem(
            experts=layer_tokens(tokens),
            topology=topology,
            policy=policy,
            exchange=goal.counted,
            load=load,
            max_load=tuple(one.sum(axis=1) for one in load),
            replica_choice=goal.replica_choice,
            layer_ids=self.model.layer_ids,
        )
        paced = deadline.paced(placements.items(), len(placements))
        return {name: round(evaluate(problem, one).copies, 5) for name, one in paced}
