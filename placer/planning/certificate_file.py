"""The certificate of a plan: what proves its bound, as a file that others can check."""

import json
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from placer.errors import PlacerError
from placer.placement.plan import plan_sha256
from placer.planning.proving import ProvedPlan
from placer.run.documents import (
    SCHEMA_VERSION,
    Count,
    Document,
    ExpertId,
    NumRanks,
    Sha256,
    of_this_version,
    read_json,
    validated,
)
from placer.run.seals import require_seal, sealed
from placer.run.writing import atomic_file
from placer.solver.partition.columns import SCALE
from placer.trace import Selection, Trace

_Whole = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
_Triple = Annotated[list[ExpertId], msgspec.Meta(min_length=3, max_length=3)]


class LayerCertificate(Document, frozen=True, kw_only=True):
    """What proves the bound of one layer.

    Attributes
    ----------
    bound
        Tokens that use a rank, summed over ranks: no placement has fewer.
    proved_by
        ``prices``, or ``search``: every partition that prices leave was looked at too; or
        ``size``: every token needs as many ranks as its experts fill.
    most_load, most_cost
        Pairs that a rank may serve, and tokens that may use it.
    together
        Sets of experts of which a rank holds all or none.
    apart
        ``[E]`` labels: no rank holds two experts of different labels, those of -1 left
        out; empty where there are none.
    prices
        ``[E]``, in parts of ``scale`` of a copy; empty where ``size`` proves.
    cuts, cut_prices
        Three experts each, of which at most one chosen set has two; their prices, none
        above 0.
    """

    bound: Count
    proved_by: Literal["prices", "search", "size"]
    most_load: Count
    most_cost: Count
    together: list[list[ExpertId]]
    apart: list[Annotated[int, msgspec.Meta(ge=-1, lt=2**15)]]
    prices: list[_Whole]
    cuts: list[_Triple]
    cut_prices: list[Annotated[int, msgspec.Meta(ge=-(2**62), le=0)]]


class CertificateFile(Document, frozen=True, kw_only=True):
    """The JSON object of a certificate; see ``docs/formats.md``.

    Attributes
    ----------
    plan_sha256, trace_sha256
        The plan and the trace that it is of.
    fold, phase
        The tokens, as a plan records them.
    num_ranks, num_tokens
        Ranks, and tokens that judge the plan.
    max_imbalance
        The load cap; layers where the plan is above it have its load as their cap.
    scale
        Prices are whole numbers of this part of a copy.
    layers
        What proves the bound of each MoE layer.
    """

    schema_version: Literal[2]
    kind: Literal["certificate"]
    plan_sha256: Sha256
    trace_sha256: Sha256
    fold: str | None
    phase: Literal["prefill", "decode"] | None
    num_ranks: NumRanks
    num_tokens: Count
    max_imbalance: Annotated[float, msgspec.Meta(ge=1)]
    scale: Count
    layers: list[LayerCertificate]
    sha256: Sha256 | None


def write_certificate(
    proved: ProvedPlan, plan: Path, trace: Trace, selection: Selection, out: Path
) -> None:
    """Write what proves the bound of each layer; the same proof gives the same bytes."""
    chosen = selection.to_json()
    content = CertificateFile(
        schema_version=SCHEMA_VERSION,
        kind="certificate",
        plan_sha256=plan_sha256(plan),
        trace_sha256=trace.sha256,
        fold=chosen["fold"],
        phase=selection.phase,
        num_ranks=proved.plan.placement.num_ranks,
        num_tokens=proved.num_tokens,
        max_imbalance=proved.options.goal.caps.load_cap,
        scale=SCALE,
        layers=[_layer(proved, layer) for layer in range(len(proved.proofs))],
        sha256=None,
    ).to_json()
    del content["sha256"]
    with atomic_file(out) as temporary:
        temporary.write_text(json.dumps(sealed(content), indent=1) + "\n", encoding="utf-8")


def _layer(proved: ProvedPlan, layer: int) -> LayerCertificate:
    """Return what is stored of a layer."""
    proof, placed = proved.proofs[layer], proved.plan.placement
    if proof is None:
        slots = placed.num_experts[layer] // placed.num_ranks
        fewest = -(-proved.plan.model.top_k // slots)
        return LayerCertificate(
            bound=fewest * proved.num_tokens,
            proved_by="size",
            most_load=0,
            most_cost=proved.num_tokens,
            together=[],
            apart=[],
            prices=[],
            cuts=[],
            cut_prices=[],
        )
    limits, prices = proof.limits, proof.prices
    return LayerCertificate(
        bound=proof.bound,
        proved_by="search" if proof.searched else "prices",
        most_load=limits.most_load,
        most_cost=limits.most_cost,
        together=[list(one) for one in limits.together],
        apart=[] if limits.apart is None else limits.apart.tolist(),
        prices=prices.experts.tolist(),
        cuts=prices.cuts.tolist(),
        cut_prices=prices.cut_prices.tolist(),
    )


def read_certificate(path: Path) -> CertificateFile:
    """Read a certificate.

    Raises
    ------
    PlacerError
        If it is none, or was changed after it was written.
    """
    where = f"certificate {path}"
    again = "write it again: placer prove PLAN TRACE --certificate FILE"
    value = read_json(path, "certificate")
    if not isinstance(value, dict) or value.get("kind") != "certificate":
        raise PlacerError(f"{path} is not a certificate", again)
    value = of_this_version(value, where, again)
    read = validated(value, CertificateFile, where, again)
    require_seal(value, where, again)
    return read
