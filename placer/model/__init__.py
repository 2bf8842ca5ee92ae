"""The model: its MoE layers, its family, and the tensors of its checkpoint."""

from placer.model.architecture import Architecture, known_architectures
from placer.model.config_file import read_config
from placer.model.spec import ModelSpec, expert_size, require_same_model

__all__ = [
    "Architecture",
    "ModelSpec",
    "expert_size",
    "known_architectures",
    "read_config",
    "require_same_model",
]
