"""The model: its MoE layers, its family, and the tensors of its checkpoint."""

from placer.model.architecture import Architecture, known_architectures
from placer.model.combination import Combination
from placer.model.config_file import read_config
from placer.model.spec import ModelSpec, common_model, expert_size, require_same_model
from placer.model.tokenizer import recorded_tokenizer, require_same_tokenizer, tokenizer_of

__all__ = [
    "Architecture",
    "Combination",
    "ModelSpec",
    "common_model",
    "expert_size",
    "known_architectures",
    "read_config",
    "recorded_tokenizer",
    "require_same_model",
    "require_same_tokenizer",
    "tokenizer_of",
]
