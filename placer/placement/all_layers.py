"""A plan of some MoE layers, on all of its model's."""

from dataclasses import replace

import numpy as np

from placer.model import ModelSpec
from placer.placement.plan import Plan


def on_all_layers(plan: Plan, model: ModelSpec) -> Plan:
    """Return a plan with a row for every MoE layer of its model.

    Engines do not record all layers, so a trace may have only some, and a plan too. The
    experts of the others stay in order, over and over where there are copies.

    Parameters
    ----------
    plan
        The plan; returned as it is if it has all layers, or is of another model.
    model
        All MoE layers.
    """
    own = dict(zip(plan.model.layer_ids or (), plan.placement.to_json(), strict=False))
    missing = set(model.layer_ids or ()) - set(own)
    if not own or not missing or missing == set(model.layer_ids or ()):
        return plan
    if model.without_layers(missing).fingerprint != plan.model.fingerprint:
        return plan
    copies = plan.placement.redundant_experts
    sizes = zip(model.layer_ids or (), model.num_experts, strict=True)
    rows = tuple(
        np.asarray(own[layer]) if layer in own else np.arange(size + copies) % size
        for layer, size in sizes
    )
    placement = replace(
        plan.placement, physical_to_logical_map=rows, num_experts=model.num_experts
    )
    return replace(plan, model=model, placement=placement)
