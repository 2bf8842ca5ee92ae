"""A plan, on all MoE layers of the model that it is used with."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from placer.model import ModelSpec, require_same_model
from placer.placement.plan import Plan


def plan_of(
    plan: Plan, plan_path: Path, model: ModelSpec, directory: Path
) -> tuple[Plan, str | None]:
    """Return a plan with a row for every MoE layer of its model.

    Engines do not record all layers, so a trace may have only some, and a plan too. The
    experts of the others stay in order, over and over where there are replicas.

    Parameters
    ----------
    plan, plan_path
        The plan.
    model, directory
        The model, and where its config is.

    Returns
    -------
    Plan, str or None
        The plan, and a warning where layers are not placed or the match rests on shapes.

    Raises
    ------
    UsageError
        If they are of different models.
    """
    own = plan.model.layer_ids or ()
    missing = [layer for layer in model.layer_ids or () if layer not in own]
    if 0 < len(missing) < model.num_layers and (
        model.without_layers(missing).fingerprint == plan.model.fingerprint
    ):
        return _on_all_layers(plan, model), (
            f"{plan_path} places no expert of layers {', '.join(map(str, missing))}, which "
            "were not recorded: their experts stay in order"
        )
    return plan, require_same_model(plan.model, str(plan_path), model, str(directory))


def _on_all_layers(plan: Plan, model: ModelSpec) -> Plan:
    placed = plan.placement.physical_to_logical_map
    own = dict(zip(plan.model.layer_ids or (), placed, strict=True))
    redundant = plan.placement.redundant_experts
    rows = tuple(
        own[layer] if layer in own else np.arange(size + redundant) % size
        for layer, size in zip(model.layer_ids or (), model.num_experts, strict=True)
    )
    placement = replace(
        plan.placement, physical_to_logical_map=rows, num_experts=model.num_experts
    )
    return replace(plan, model=model, placement=placement)
