"""How good a placement is, as a plan file records it."""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from placer.run.deadline import Termination
from placer.run.documents import Count, Document, LayerKey

Status = Literal["optimal", "feasible", "infeasible", "imported"]
_Positive = Annotated[float, msgspec.Meta(ge=0)]
_ByLayer = Mapping[LayerKey, _Positive]


class Certificate(Document, frozen=True, kw_only=True):
    """A proved bound of one objective, and the value that the placement reaches.

    Attributes
    ----------
    objective_name
        What ``objective`` counts.
    objective
        The value reached, to be minimised.
    bound
        No placement under the caps has less that keeps the plan's pins and router groups.
    gap
        ``(objective - bound) / objective``.
    bound_method
        How the bound was proved.
    """

    objective_name: str
    objective: float
    bound: float
    gap: float
    bound_method: str


class CapTrial(Document, frozen=True, kw_only=True):
    """The result of a load cap: the mean of quick plans of each half of the profile.

    Attributes
    ----------
    max_imbalance
        The cap.
    overflow_price
        Price, in copies, of a pair above it in other loads.
    objective
        The solver's objective on the half solved on.
    profile_imbalance, heldout_imbalance
        Max/mean rank load, mean over the layers, on that half and on the other.
    predicted_imbalance
        The same on other sequences, of a plan that is solved on the whole profile.
    """

    max_imbalance: float
    overflow_price: float
    objective: float
    profile_imbalance: float
    heldout_imbalance: float
    predicted_imbalance: float


class InnerCap(Document, frozen=True, kw_only=True):
    """The load cap that a robust plan was solved under, and why.

    Attributes
    ----------
    max_imbalance
        The cap on the profile; the plan's own ``max_imbalance`` is the requested one.
    overflow_price
        Price, in copies, of a pair above it in other loads.
    predicted_imbalance
        What other sequences should see of it.
    holds
        Whether that is no more than requested.
    trials
        The caps, and prices under the tightest, that it was chosen from.
    """

    max_imbalance: float
    overflow_price: float
    predicted_imbalance: float
    holds: bool
    trials: tuple[CapTrial, ...]


class SolverReport(Document, frozen=True, kw_only=True):
    """How good a placement is, and what proves it.

    Attributes
    ----------
    status
        ``optimal`` (the bound is reached), ``feasible``, ``infeasible``, or ``imported``
        where an engine's map was read.
    termination
        What ended the search: the proof, its limit of steps, the clock or Ctrl-C; ``None``
        of an imported map.
    objective_name
        What ``objective`` counts.
    objective
        The value reached, to be minimised.
    bound
        A proved lower bound of the objective, or ``None``.
    gap
        ``(objective - bound) / objective``, or ``None``.
    bound_method
        How the bound was proved, or the reason why there is none.
    seconds
        Wall-clock seconds; not written to the plan file, whose bytes depend on the
        input and the seed only.
    seed
        Seed of the search.
    reproducible
        Whether the same input and seed give the same plan.
    relaxed_layers
        MoE layers above the load cap, with the value reached. The cap is out of reach
        there, or the clock or Ctrl-C ended the search before it was met.
    relaxed_receive_layers
        The same of the cap on received copies.
    eplb_caps
        ``[L]``: caps on max/mean rank load, where they are those of EPLB with as many slots
        on the profile, or the load cap where that is lower; else ``None``.
    above_eplb_layers
        MoE layers that were not brought under such a cap, with the value reached.
    most_received_copies
        R x the copies that the busiest rank receives per token of the profile (or of its
        sample, ``SolverParams.num_tokens``), in the worst layer, homes of ``fixed`` being
        even; ``None`` where copies are not what was minimised.
    layer_gaps
        ``[L]``: of the ranks that serve a layer's tokens, the share above the fewest that
        is proved; only where homes are ``fixed`` and one copy is sent to each rank.
    pairs
        Certificate of the pair objective, which stands in for traffic; ``None`` where it
        is the objective itself, or replicas void it.
    inner_cap
        With ``--robust`` the load cap that was chosen to solve under, which the bound is
        of; else ``None``.
    predicted_imbalance
        The imbalance to expect of the profile where replicas serve tokens whose homes are
        drawn, mean over MoE layers; only where balance is the objective and only loads are
        known.
    imbalance_without_groups
        What the objective would be if router groups were split, where balancing keeps them
        whole; else ``None``.
    """

    status: Status
    termination: Termination | None
    objective_name: str
    objective: float
    bound: float | None
    gap: float | None
    bound_method: str
    seconds: _Positive | None
    seed: Count
    reproducible: bool = True
    relaxed_layers: _ByLayer = msgspec.field(default_factory=dict)
    relaxed_receive_layers: _ByLayer = msgspec.field(default_factory=dict)
    eplb_caps: tuple[_Positive, ...] | None = None
    above_eplb_layers: _ByLayer = msgspec.field(default_factory=dict)
    most_received_copies: _Positive | None = None
    layer_gaps: tuple[float, ...] | msgspec.UnsetType = msgspec.UNSET
    pairs: Certificate | None = None
    inner_cap: InnerCap | None = None
    predicted_imbalance: float | None = None
    imbalance_without_groups: float | None = None
