"""The table that compares a plan with its baselines."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from placer.intervals import FEWEST_SEQUENCES
from placer.placement import Plan
from placer.placement.solver_report import Certificate, InnerCap, SolverReport
from placer.planning.engine_options import loads_map
from placer.serving.replica_choice import unknown_dense_layers
from placer.simulation.sent import NODE_COPIES, RANK_COPIES, Wire
from placer.solver.balance.load_balance import OBJECTIVE_OF_REPLICAS
from placer.solver.balance.replicas import redundant_experts_that_fit

PolicyFigures = Mapping[str, Mapping[str, Any]]

_RATIO = "of contiguous"
_IMBALANCE = "load_imbalance_mean"
_PER_BATCH = ("straggler_mean", "bottleneck_rank_copies_per_token")
# Below that, more copies are noise.
_CLEARLY_MORE = 1.001
# A plan that sends this much of contiguous's saves next to nothing.
_LITTLE_SAVED = 0.98
# Two placements that are as even on the profile differ by about so much on other sequences.
# An interval over sequences would need the load of each; `placer simulate` can be asked.
_CLEARLY_BUSIER = 1.02


def comparison_table(
    placements: Mapping[str, PolicyFigures],
    policies: Sequence[str],
    wire: Wire,
    *,
    per_batch: bool = True,
) -> tuple[tuple[str, ...], list[list[object]]]:
    """Return columns and rows, policy by policy.

    What the engine sends, and its ratio to ``contiguous``, are shown where placement can
    change it; copies between ranks are also shown with those between nodes.

    Parameters
    ----------
    placements
        Metrics per placement name and policy, as ``placer simulate --json`` prints them.
    policies
        Which home policies to show; a placement without one is left out there.
    wire
        What crosses the wire.
    per_batch
        Whether to show figures of batches of 4,096 tokens; not beside a table of batches of
        other sizes.
    """
    compared = {one: wire.compared(one) is not None for one in policies}
    columns = _columns(wire, policies, compared=any(compared.values()))
    if not per_batch:
        columns = [one for one in columns if one[1] not in _PER_BATCH]
    rows: list[list[object]] = []
    for policy in policies:
        base = placements.get("contiguous", {}).get(policy, {}) if compared[policy] else {}
        for name, figures in placements.items():
            if policy not in figures:
                continue
            of = figures[policy]
            row: list[object] = [policy, name]
            for heading, metric in columns:
                whole = base.get(metric)
                ratio = of[metric] / whole if whole else None
                row.append(ratio if heading == _RATIO else of[metric])
            rows.append(row)
    return ("policy", "placement", *(heading for heading, _ in columns)), rows


def _columns(
    wire: Wire, policies: Sequence[str], *, compared: bool
) -> list[tuple[str, str]]:
    """Return heading and metric of each column; ratios only where placements differ."""
    # Homes of fixed are even, and hold 1/R of the pairs in every placement.
    homes_count = list(policies) != ["fixed"]
    columns = [("local rate", "local_activation_rate")] if homes_count else []
    sent = wire.sent
    if sent is not None:
        columns.append((sent.heading, sent.metric))
        columns += [(_RATIO, sent.metric)] if compared else []
    if sent == NODE_COPIES:
        columns.append((RANK_COPIES.heading, RANK_COPIES.metric))
    columns += [
        ("imbalance", "load_imbalance_mean"),
        ("imbalance max", "load_imbalance_max"),
        ("straggler", "straggler_mean"),
    ]
    if sent == RANK_COPIES:
        columns.append(("bottleneck", "bottleneck_rank_copies_per_token"))
    return [*columns, *([("home imbalance", "home_imbalance_max")] if homes_count else [])]


def plan_table(
    plan: Plan, *, per_batch: bool = True
) -> tuple[tuple[str, ...], list[list[object]]]:
    """Return columns and rows of a plan's own policy: its baselines, then the plan.

    Only baselines where the time limit left no time to measure the plan, and no rows for a
    plan that was solved from counts only.
    """
    own = plan.metrics["heldout"] or plan.metrics["profile"]
    figures = plan.metrics["baselines"] | ({} if own is None else {"placer": own})
    wire = Wire.of(plan, plan.engine)
    return comparison_table(figures, [plan.policy], wire, per_batch=per_batch)


def plan_table_title(plan: Plan) -> str:
    """Return which tokens the table of a plan is about."""
    if plan.metrics["profile"] is None:
        is_heldout = plan.provenance.get("fold") is not None
    else:
        is_heldout = plan.metrics["heldout"] is not None
    return "on held-out sequences:" if is_heldout else "on the profile:"


def certificate_lines(plan: Plan) -> list[str]:
    """Return one line for each objective: what the profile has, and what is proved."""
    report, profile = plan.solver, plan.metrics["profile"]
    judged_elsewhere = plan.metrics["heldout"] is not None
    lines = ["on the profile, " * judged_elsewhere + _line(report.status, report)]
    if profile is not None and report.objective_name == OBJECTIVE_OF_REPLICAS:
        reached = profile["fixed"]["load_imbalance_mean"]
        lines.append(f"imbalance with the homes of the profile's tokens: {reached:.4f}")
    if report.predicted_imbalance is not None:
        lines.append(
            "imbalance to expect when serving, where homes of tokens are random: "
            f"{report.predicted_imbalance:.4f}"
        )
    if report.pairs is not None:
        lines.append(_line("pair objective", report.pairs))
    return lines


def price_line(plan: Plan) -> str | None:
    """Return the price of a plan's copies and of its baselines', if links differ."""
    prices = plan.metrics.get("prices")
    if prices is None:
        return None
    others = [
        f"{prices['placer'] / price:.3f} of {name}'s {price:.4g}"
        for name, price in prices.items()
        if name != "placer" and price
    ]
    return (
        f"price of the copies, per token and layer: {prices['placer']:.4g}, "
        + ", ".join(others)
    )


def plan_warnings(plan: Plan) -> Iterator[str]:
    """Yield a sentence on each thing that limits what a plan's figures say.

    Nothing of an engine's map, which holds no figures.
    """
    if plan.solver.status == "imported":
        return
    if not plan.provenance.get("max_imbalance_given", True):
        yield from _relaxed_line(plan)
    if plan.metrics["profile"] is None and "trace_sha256" in plan.provenance:
        yield (
            "the time limit left no time to measure the plan: it may send as much as the "
            "contiguous placement, or more. To compare: placer simulate PLAN TRACE"
        )
    elif plan.metrics["profile"] is None:
        yield "solved from counts, which hold no tokens: no held-out figures are shown"
    elif plan.metrics["heldout"] is None:
        yield "no sequences were held out: the figures are of the profile"
    choice, layer_ids = plan.recorded_choice, plan.model.layer_ids
    if warning := unknown_dense_layers(plan.placement, choice, layer_ids):
        yield warning
    if not plan.solver.reproducible:
        yield (
            "stopped before choices, search and proof were finished: more time may find a "
            "better plan, and this one cannot be reproduced"
        )
        measured = plan.metrics["profile"] is not None
        if measured and "eplb" not in plan.metrics["baselines"]:
            yield (
                "the time limit left no time to measure all baselines; to compare with "
                "them: placer simulate PLAN TRACE"
            )
    yield from _little_saved_line(plan)
    yield from _homes_line(plan)
    yield from _overload_line(plan)
    cap, profile = plan.provenance["max_home_imbalance"], plan.metrics["profile"]
    if cap is not None and profile is not None:
        reached = profile[plan.policy]["home_imbalance_max"]
        if reached > cap:
            yield (
                f"--max-home-imbalance {cap:g} was not reached in every layer of the "
                f"profile: {reached:.3f}"
            )


def plan_notes(plan: Plan, *, details: bool = True) -> Iterator[str]:
    """Yield a sentence on caps that are not as requested, and on copies received.

    With ``details`` also on caps that placer chose.
    """
    if plan.provenance.get("max_imbalance_given", True):
        yield from _relaxed_line(plan)
    if details:
        yield from _guard_line(plan)
    yield from _cost_line(plan)
    cap, busy = (
        plan.provenance.get("max_received_copies"),
        plan.solver.relaxed_receive_layers,
    )
    if busy:
        worst = max(busy, key=lambda n: busy[n])
        yield (
            f"--max-received-copies {cap:g} was relaxed in {len(busy)} MoE layers, at most "
            f"to {busy[worst]:.4f} (layer {worst})"
        )
    elif cap is not None:
        yield (
            "copies that the busiest rank receives, per token of the profile, times "
            f"ranks: {plan.solver.most_received_copies:.4f} in the worst layer, cap "
            f"{cap:g}"
        )
    if plan.solver.inner_cap is not None and (details or not plan.solver.inner_cap.holds):
        yield _inner_cap_line(plan, plan.solver.inner_cap)


def _relaxed_line(plan: Plan) -> Iterator[str]:
    relaxed, cap = plan.solver.relaxed_layers, plan.max_imbalance
    if not relaxed:
        return
    worst = max(relaxed, key=lambda n: relaxed[n])
    given = plan.provenance.get("max_imbalance_given", True)
    name = f"{'--max-imbalance' if given else 'the default load cap'} {cap:g}"
    where = f"in {len(relaxed)} of {plan.placement.num_layers} MoE layers"
    most = f"to at most {_above(relaxed[worst], cap)} (layer {worst})"
    ended = _ended_above_cap(plan)
    if ended is None:
        yield f"{name} is out of reach {where} and was relaxed there, {most}"
        return
    yield (
        f"{ended} before {name} was met {where}: it was relaxed there, {most}. More time "
        "may meet it: give a higher --time-limit, or none"
    )


def _ended_above_cap(plan: Plan) -> str | None:
    """Say what ended the search while layers were above the load cap, if anything did.

    A search brings layers under it where experts have replicas, or the start is not free.
    Elsewhere what is out of reach is known before.
    """
    asked = plan.provenance
    searched = plan.placement.has_replicas or asked.get("preserve_groups")
    if not plan.solver.relaxed_layers or not (searched or "start_map_sha256" in asked):
        return None
    return _ended_early(plan)


def _ended_early(plan: Plan) -> str | None:
    """Say what ended the search before it was done, if anything did."""
    ended = plan.solver.termination
    if ended == "time_limit":
        return "the time limit ended the search"
    return "Ctrl-C ended the search" if ended == "interrupted" else None


def _above(value: float, cap: float) -> str:
    """Return a value with as many digits as show that it is above the cap."""
    digits = next((n for n in range(4, 9) if round(value, n) > cap), 9)
    return f"{value:.{digits}f}"


def _guard_line(plan: Plan) -> Iterator[str]:
    """Say which caps kept the plan no busier than EPLB, and how to choose others."""
    caps = plan.solver.eplb_caps
    if caps is None:
        return
    relaxed = plan.solver.relaxed_layers.items()
    above = {*plan.solver.above_eplb_layers, *(n for n, v in relaxed if v > caps[int(n)])}
    values = sorted({f"{min(caps):.2f}", f"{max(caps):.2f}"})
    kept = f" ({len(above)} of {len(caps)} MoE layers are above it)" if above else ""
    # Time is predicted for tokens, and without a table.
    is_open = plan.metrics["profile"] is not None and "cap_by_time" not in plan.provenance
    timed = is_open and plan.policy == plan.policy_without_table
    yield (
        "the load cap of each layer is the load of EPLB's busiest rank on the profile, "
        f"with as many slots: {' to '.join(values)} times the mean load{kept}. "
        "To set the cap yourself: --max-imbalance"
        f"{'; to choose by predicted time: --hardware' * timed}"
    )


def _cost_line(plan: Plan) -> Iterator[str]:
    """Say how much more the plan sends than a baseline, and why."""
    own = plan.metrics["heldout"] or plan.metrics["profile"]
    sent = Wire.of(plan, plan.engine).compared(plan.policy)
    if own is None or sent is None:
        return
    mine = own[plan.policy][sent.metric]
    more = []
    for name in ("contiguous", "eplb"):
        figures = plan.metrics["baselines"].get(name, {}).get(plan.policy)
        theirs = mine if figures is None else figures[sent.metric]
        if mine > theirs * _CLEARLY_MORE:
            more.append(f"{mine / theirs - 1:.1%} more than {name} ({theirs:.3f})")
    if more:
        reason = f"the load cap is {plan.max_imbalance:g}"
        if plan.solver.eplb_caps is not None:
            reason = "the busiest rank is kept at or below EPLB's load"
        if plan.provenance["objective"] == "balance":
            reason = "the solver only balanced the load"
        elif _ended_early(plan) is not None:
            reason += ", and solving was stopped early"
        yield (
            f"{sent.words} per token and layer: {mine:.3f}. This is {' and '.join(more)}, "
            f"because {reason}"
        )


def _little_saved_line(plan: Plan) -> Iterator[str]:
    """Say where a plan for traffic was stopped before it saved any."""
    own = plan.metrics["heldout"] or plan.metrics["profile"]
    sent = Wire.of(plan, plan.engine).compared(plan.policy)
    base = plan.metrics["baselines"].get("contiguous", {}).get(plan.policy)
    if own is None or sent is None or base is None or not base[sent.metric]:
        return
    ratio = own[plan.policy][sent.metric] / base[sent.metric]
    is_balanced = plan.provenance["objective"] == "balance"
    if ratio > _LITTLE_SAVED and not is_balanced and _ended_early(plan) is not None:
        yield (
            "stopped early, and the plan does little more than balance the load: "
            f"{sent.words} {ratio:.3f} of contiguous's. More time may save more: give a "
            "higher --time-limit, or none"
        )


def _overload_line(plan: Plan) -> Iterator[str]:
    """Say where sequences not seen load a rank more than they should, and what helps.

    That is above a cap that was given, or clearly above what EPLB has on them.
    """
    if plan.metrics["heldout"] is None:
        return
    reached = plan.metrics["heldout"][plan.policy][_IMBALANCE]
    kept = plan.metrics["profile"][plan.policy][_IMBALANCE]
    eplb = _eplb_imbalance(plan)
    if plan.provenance.get("max_imbalance_given", True):
        cap = plan.max_imbalance
        relaxed, num_layers = plan.solver.relaxed_layers, plan.placement.num_layers
        mean = sum(relaxed.get(str(n), cap) for n in range(num_layers)) / num_layers
        if reached <= mean:
            return
        beside = f"--max-imbalance is {cap:g}" + (
            f", relaxed to {mean:.3f} on average" if relaxed else ""
        )
        beside += "" if eplb is None else f", EPLB's busiest rank has {eplb:.3f}"
    elif plan.provenance["objective"] == "balance":
        return  # closing_lines
    elif eplb is None or reached <= eplb * _CLEARLY_BUSIER:
        return
    else:
        beside = f"EPLB's busiest rank has {eplb:.3f}"
    yield (
        f"on held-out sequences the busiest rank has {reached:.3f} times the mean load, "
        f"{beside}. On the profile it has {kept:.3f}{_overload_remedy(plan, reached)}"
    )


def _eplb_imbalance(plan: Plan) -> float | None:
    """Return the imbalance of EPLB's placement where the plan is judged, if it is known."""
    figures = plan.metrics["baselines"].get("eplb", {}).get(plan.policy, {})
    found: float | None = figures.get(_IMBALANCE)
    return found


def _homes_line(plan: Plan) -> Iterator[str]:
    """Say where a cap holds for even homes, and not for those of the profile's tokens."""
    profile, cap = plan.metrics["profile"], plan.max_imbalance
    even = {"fixed": "even homes", "follow": "even homes in the first layer"}
    if profile is None or not plan.placement.has_replicas or plan.policy not in even:
        return
    figures = profile[plan.policy]
    allowed = max([cap, *plan.solver.relaxed_layers.values()])
    if figures[_IMBALANCE] <= allowed:
        return
    is_given = plan.provenance.get("max_imbalance_given", True)
    counted = even[plan.policy]
    if plan.solver.objective_name == OBJECTIVE_OF_REPLICAS:
        counted += f" ({plan.solver.objective:.3f} on average)"
    yield (
        f"{'--max-imbalance' if is_given else 'the default load cap'} {cap:g} holds with "
        f"{counted}. With the homes of the profile's tokens the busiest rank has "
        f"{figures[_IMBALANCE]:.3f} times the mean load"
    )


def closing_lines(plan: Plan) -> Iterator[str]:
    """Say where EPLB balances unseen sequences better than a plan that only balances."""
    heldout, eplb = plan.metrics["heldout"], _eplb_imbalance(plan)
    if heldout is None or eplb is None or plan.provenance["objective"] != "balance":
        return
    reached = heldout[plan.policy][_IMBALANCE]
    if reached <= eplb * _CLEARLY_BUSIER:
        return
    number = plan.provenance["profile_sequences"]
    few = number < FEWEST_SEQUENCES
    yield (
        f"on held-out sequences EPLB's placement is more even than this plan: {eplb:.3f} "
        f"against {reached:.3f}. The plan fits the loads of {number} profile sequences"
        + (", too few to show which is better" if few else "")
        + ". Record more, or let the engine run EPLB if it can: that needs no plan"
    )


def _overload_remedy(plan: Plan, reached: float) -> str:
    helps = [] if _ended_above_cap(plan) is None else ["a higher --time-limit, or none"]
    solved_for = (plan.provenance["objective"], plan.provenance["robust"])
    # It keeps other sequences to the cap of the options, not to EPLB's load.
    if solved_for == ("traffic", "none") and reached > plan.max_imbalance:
        helps.append("--robust bootstrap")
    num_ranks, placed = plan.placement.num_ranks, plan.placement
    more = placed.redundant_experts + num_ranks
    blocks = placed.num_nodes if plan.model.n_group > 1 else 1
    fitting = redundant_experts_that_fit(plan.model.num_experts, num_ranks, blocks)
    served = plan.engine is None or loads_map(plan.engine, plan.model)
    if served and more in islice(fitting, more // num_ranks + 1):
        helps.append(f"--redundant-experts {more}")
    return f". May help: {', or '.join(helps)}" if helps else ""


def _inner_cap_line(plan: Plan, inner_cap: InnerCap) -> str:
    """Return the sentence on the cap that a robust plan was solved under."""
    line = (
        f"solved under a load cap of {inner_cap.max_imbalance:g}, at a price of "
        f"{inner_cap.overflow_price:g} copies for each pair above it (both chosen on "
        f"halves of the profile). Predicted imbalance {inner_cap.predicted_imbalance:.4f}"
    )
    if inner_cap.holds:
        return line
    is_given = plan.provenance.get("max_imbalance_given", True)
    cap = f"--max-imbalance {plan.max_imbalance:g}"
    if not is_given:
        cap = f"the default load cap {plan.max_imbalance:g}"
    return f"{line}, above {cap}: no choice that was tried is predicted to reach it"


def _line(status: str, found: SolverReport | Certificate) -> str:
    reached = f"{status}: {found.objective_name} = {found.objective:g}"
    if found.bound is None or found.gap is None:
        return f"{reached}, bound {found.bound_method}"
    return f"{reached}, bound {found.bound:g}, gap {found.gap:.1%} ({found.bound_method})"
