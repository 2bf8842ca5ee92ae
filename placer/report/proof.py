"""What ``placer prove`` answers."""

from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from placer.planning.certificate_check import CheckedCertificate
from placer.planning.proving import ProvedPlan
from placer.run.verdict import Verdict
from placer.trace import Selection

# Less than this share is shown with another digit.
_SMALL = 0.01


def verdict_of_proof(
    found: ProvedPlan, plan: Path, trace: Path, selection: Selection, out: Path | None
) -> Verdict:
    """Return how far a plan is from the best placement, and what to run next."""
    limits = f"load cap {found.options.goal.caps.load_cap:g}"
    if found.is_optimal:
        answer = f"{plan} is proved optimal: no placement under the same limits sends less."
    elif found.gain:
        answer = (
            f"A better placement was found: it sends {share(found.gain)} less than {plan}. "
            f"No placement sends more than {share(found.gap)} less."
        )
    else:
        answer = (
            f"No better placement was found than {plan}. None sends more than "
            f"{share(found.gap)} less."
        )
    sure = (
        f"Proved for {found.num_tokens:,} tokens, policy fixed, exchange per-rank, "
        f"{limits}: {found.num_optimal} of {len(found.proofs)} layers are solved to the "
        "optimum. Other tokens may differ."
    )
    return Verdict(
        answer=(answer,),
        sure=sure,
        next=_next(found, plan, trace, selection, out),
        is_better=found.is_optimal or None,
    )


def _next(
    found: ProvedPlan, plan: Path, trace: Path, selection: Selection, out: Path | None
) -> str | None:
    if not found.gain:
        return None
    chosen = f" {selection.options}" if selection.options else ""
    if out is None:
        return (
            f"placer prove {quote(str(plan))} {quote(str(trace))}{chosen} --out better.json"
        )
    others = ""
    if selection.fold is not None:
        others = f" {selection.complement().options}"
    return f"placer simulate {quote(str(out))} {quote(str(trace))}{others}"


def share(value: float) -> str:
    """Return a share in percent, rounded up in the last digit so that it stays a bound."""
    digits = 1 if value >= _SMALL else 3
    scale = 10 ** (2 + digits)
    return f"{-(-value * scale // 1) / 10**digits:.{digits}f} %"


def layer_rows(found: ProvedPlan) -> Iterator[tuple[object, ...]]:
    """Yield the figures of each layer: copies per token, bound, gap, and the proof."""
    num_ranks = found.plan.placement.num_ranks
    each = (num_ranks - 1) / (num_ranks * found.num_tokens)
    for layer, one in enumerate(found.proofs):
        if one is None:
            yield layer, None, None, None, "relaxation"
            continue
        left = (one.cost - one.bound) / one.cost if one.cost else 0.0
        how = "optimal" if one.is_optimal else "bound"
        yield layer, one.cost * each, one.bound * each, left, how


def verdict_of_check(found: CheckedCertificate, plan: Path, certificate: Path) -> Verdict:
    """Return what a certificate proves."""
    left = max(0.0, 1 - found.bound / found.reached) if found.reached else 0.0
    counts = {
        "by prices": found.num_by_prices,
        "by prices and a search": found.num_by_search,
        "only by the size of tokens": found.num_by_size,
    }
    layers = ", ".join(f"{number} {how}" for how, number in counts.items() if number)
    return Verdict(
        answer=(
            f"{certificate} holds: no placement sends more than {share(left)} less than "
            f"{plan}.",
        ),
        sure=f"Checked without the solver: layers {layers}.",
        is_better=True,
    )
