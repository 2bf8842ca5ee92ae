"""The learning curve: how many profiled tokens a plan needs until it stops changing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from placer.affinity import count_affinity
from placer.arrays import IntArray
from placer.errors import UsageError
from placer.placement.placement import Placement
from placer.placement.reference import contiguous
from placer.run.session import Session
from placer.simulation.simulate import simulate
from placer.solver.options import SolveOptions
from placer.solver.search.pair_search import transport
from placer.solver.solve import solve_to_choose
from placer.trace import Chunk, Selection, Trace

DEFAULT_TOKENS = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningPoint:
    """A plan solved from a part of the profile, judged on the held-out sequences.

    Attributes
    ----------
    num_tokens, num_sequences
        The part of the profile.
    remote_rank_copies_per_token
        Held out, under the policy that was solved for.
    ratio
        The same over that of the contiguous placement.
    load_imbalance_mean
        Held out.
    moved
        Share of the experts that are on another rank than in the plan from the whole
        profile, after the best renaming of each layer's ranks.
    """

    num_tokens: int
    num_sequences: int
    remote_rank_copies_per_token: float
    ratio: float
    load_imbalance_mean: float
    moved: float


def learning_curve(
    trace: Trace,
    options: SolveOptions,
    selection: Selection,
    *,
    tokens: tuple[int, ...] = DEFAULT_TOKENS,
    session: Session | None = None,
) -> list[LearningPoint]:
    """Solve from growing parts of the sequences selected; judge on all others.

    Sequences are drawn in an order that the session's seed decides, each part holds the
    part before, and load caps that a small part puts out of reach are relaxed.

    Raises
    ------
    UsageError
        If the fold holds fewer tokens than the smallest part, or the policy takes its homes
        from a table.
    PlacerError
        If the trace is damaged or a fold empty.
    """
    policy = options.goal.policy
    if options.goal.content_policy is not None:
        raise UsageError(
            f"this curve solves plans from pairs, which cannot serve --policy {policy}",
            "choose fixed or follow",
        )
    session = session or Session()
    profile, heldout = trace.read(selection), trace.read(selection.complement())
    parts = list(_parts(profile, tokens, session.seed))
    if len(parts) < 2:
        raise UsageError(
            f"the fold holds {profile.num_tokens} tokens, fewer than the smallest part, "
            f"{min(tokens)}",
            f"give --tokens {max(profile.num_tokens // 2, 1)}, or record more text",
        )
    options = replace(options, goal=options.goal.relaxed)
    topology = options.topology
    base = contiguous(trace.model.num_experts, topology.num_ranks, topology.num_nodes)
    plans = []
    for number, part in enumerate(parts, 1):
        session.tell(f"{number} of {len(parts)}: {part.num_tokens:,} tokens")
        counts = count_affinity([part], trace.model, {})
        plans.append(solve_to_choose(counts, options, None, session.quiet)[0])
    reference = simulate(base, heldout)[policy].remote_rank_copies_per_token
    points = []
    for part, placement in zip(parts, plans, strict=True):
        figures = simulate(placement, heldout)[policy]
        copies = figures.remote_rank_copies_per_token
        points.append(
            LearningPoint(
                num_tokens=part.num_tokens,
                num_sequences=len(np.unique(part.sequence_ids)),
                remote_rank_copies_per_token=copies,
                ratio=copies / reference if reference else 1.0,
                load_imbalance_mean=figures.load_imbalance_mean,
                moved=moved_share(placement, plans[-1]),
            )
        )
    return points


def moved_share(one: Placement, other: Placement) -> float:
    """Return the share of experts on another rank, ranks renamed layer by layer."""
    stays, total = 0.0, 0
    for layer, size in enumerate(one.num_experts):
        overlap = one.holds(layer).T.astype(np.int64) @ other.holds(layer)
        partner = transport(-overlap.astype(np.float64), 1)
        stays += float(overlap[np.arange(len(partner)), partner].sum())
        total += size
    return 1 - stays / total


def _parts(profile: Chunk, sizes: tuple[int, ...], seed: int) -> Iterator[Chunk]:
    """Yield whole sequences of about each number of tokens, then all of them."""
    ids, lengths = np.unique(profile.sequence_ids, return_counts=True)
    order: IntArray = np.random.default_rng(seed).permutation(len(ids))
    reached = np.cumsum(lengths[order])
    for size in sorted(set(sizes)):
        if size < reached[-1]:
            number = int(np.searchsorted(reached, size)) + 1
            if number < len(ids):
                yield profile.select(np.isin(profile.sequence_ids, ids[order[:number]]))
    yield profile
