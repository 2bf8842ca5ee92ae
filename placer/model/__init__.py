"""The model: its MoE layers, its family, and the tensors of its checkpoint."""

from placer.model.spec import (
    Architecture,
    ModelSpec,
    expert_size,
    known_architectures,
    require_same_model,
)

__all__ = [
    "Architecture",
    "ModelSpec",
    "expert_size",
    "known_architectures",
    "require_same_model",
]
