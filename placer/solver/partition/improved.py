"""The set partition of a whole solve: a better placement, and the proof of it."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from placer.run.session import Session
from placer.solver.options import SolveOptions
from placer.solver.partition.layer import LayerProof
from placer.solver.partition.layers import (
    FULL_COLUMNS,
    QUICK_COLUMNS,
    PinsAndGroups,
    prove_layers,
    with_best_sets,
)
from placer.solver.problem.traffic import copy_prices
from placer.solver.proof.copies import TokenSets, token_sets
from placer.solver.search.evaluator import evaluate
from placer.solver.search.minimise import Found
from placer.trace import Chunk


def improved(
    found: Found,
    judged: Chunk,
    kept: PinsAndGroups,
    options: SolveOptions,
    session: Session,
) -> tuple[Found, list[LayerProof | None]]:
    """Return what was found with the best layers of the set partition, and its proofs.

    Only layers that cost less with all that is priced are taken. The proofs are of the
    ranks that serve each token, which ``follow`` and ``per-node`` pay for too; their
    placement stays, as theirs is not a sum over ranks alone.

    Parameters
    ----------
    found
        Where the search ended.
    judged
        The tokens that judge it.
    kept
        Pins and router groups (:func:`pins_and_groups_of`).
    options, session
        What is solved for, and when to stop.
    """
    if not _is_partition(found, options):
        return found, [None] * found.problem.num_layers
    tokens = token_sets([judged])
    full = options.proof == "full"
    proofs: list[LayerProof | None] = []
    before = found.evaluate()
    deadline = session.deadline
    with deadline.interruptible():
        for one in prove_layers(
            tokens,
            found.placement,
            found.problem,
            found.traffic,
            kept,
            FULL_COLUMNS if full else QUICK_COLUMNS,
            lambda: not deadline.passed(),
        ):
            proofs.append(one)
            if one is not None:
                _tell(found, proofs, tokens, before.copies, options)
    proofs += [None] * (len(tokens) - len(proofs))
    if not options.pays_for_ranks:
        return found, proofs
    best = with_best_sets(found.placement, proofs, kept)
    takes = evaluate(found.traffic, best).better_layers(before)
    rows = zip(
        takes,
        best.physical_to_logical_map,
        found.placement.physical_to_logical_map,
        strict=True,
    )
    chosen = tuple(new if is_taken else old for is_taken, new, old in rows)
    placement = replace(found.placement, physical_to_logical_map=chosen)
    return replace(found, placement=placement), proofs


def _is_partition(found: Found, options: SolveOptions) -> bool:
    """Return whether layers are set partitions, and anything is left to prove."""
    goal = options.goal
    bare = goal.redundant_experts == 0 and goal.content_policy is None
    counts = bare and (goal.counted == "per-rank" or goal.policy == "fixed")
    return counts and options.proof != "none" and not found.optimal


def pins_and_groups_of(found: Found, n_group: int, options: SolveOptions) -> PinsAndGroups:
    """Return the pins and router groups that a solve keeps, of a model's ``n_group``."""
    kind = found.traffic.kind
    pinned = kind if options.start.pins and kind is not None else None
    return PinsAndGroups(
        n_group=n_group if options.start.preserve_groups else 1,
        pinned=None if pinned is None else tuple(one < 0 for one in pinned),
    )


def _tell(
    found: Found,
    proofs: Sequence[LayerProof | None],
    tokens: Sequence[TokenSets],
    objective: float,
    options: SolveOptions,
) -> None:
    """Tell the bound so far, where the ranks of a token are all that it pays for."""
    if options.pays_for_ranks:
        bounds = [_least(found, layer, own) for layer, own in enumerate(tokens)]
        for layer, proof in enumerate(proofs):
            if proof is not None:
                bounds[layer] = float(proof.bound)
        topology = options.topology
        price = float(copy_prices(topology, "per-rank")[0][-1].min())
        scale = topology.num_ranks * found.traffic.num_tokens * len(tokens)
        found.line.raise_bound(price * math.fsum(bounds) / scale)
    found.line(f"integer program, layer {len(proofs)} of {len(tokens)}", objective)


def _least(found: Found, layer: int, tokens: TokenSets) -> float:
    """Return the ranks that tokens use if each has its experts on as few as can be."""
    slots = found.problem.slots_per_rank(layer)
    fewest = -(-tokens.experts.shape[1] // slots)
    return float(fewest * np.sum(tokens.num_tokens))
