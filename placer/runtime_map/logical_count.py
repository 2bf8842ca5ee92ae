"""Counts of experts as SGLang's recorder dumps them: what KTransformers places by.

KTransformers' SGLang (``--kt-expert-placement-strategy frequency --init-expert-location
FILE.pt``) keeps the most used experts on the GPU, by ``logical_count`` ``[passes, hidden
layers, E]`` of a recorder's dump (kvcache-ai/ktransformers, doc/en/kt-kernel/
experts-sched-Tutorial.md). SGLang itself runs EPLB on such a file at start.
"""

import io
from pathlib import Path

import numpy as np

from placer.affinity import Affinity
from placer.errors import PlacerError, UsageError
from placer.model import Architecture, ModelSpec, read_config, require_same_model
from placer.run.writing import atomic_file


def export_logical_count(counts: Path, directory: Path, out: Path) -> tuple[int, ...]:
    """Write ``logical_count`` ``[1, hidden layers, E]`` int32, zeros for dense layers.

    Parameters
    ----------
    counts
        An affinity file.
    directory
        The model: its config says which layers are MoE layers.
    out
        The ``.pt`` file to write.

    Returns
    -------
    tuple of int
        The shape written.

    Raises
    ------
    PlacerError
        If counts and model differ, or layers differ in experts.
    """
    import torch

    if out.suffix != ".pt":
        raise UsageError(f"{out} does not end in .pt", f"--out {out.with_suffix('.pt')}")
    affinity = Affinity.read(counts)
    model = ModelSpec.from_checkpoint(directory)
    require_same_model(affinity.model, str(counts), model, str(directory))
    config = read_config(directory)
    num_layers = Architecture.of(config, directory).num_hidden_layers(config)
    if len(set(model.num_experts)) > 1:
        raise PlacerError(
            f"layers have {sorted(set(model.num_experts))} experts, not all one"
        )
    value = np.zeros((1, num_layers, model.num_experts[0]), dtype=np.int64)
    value[0, list(model.layer_ids or ())] = np.stack(affinity.load)
    # The recorder's own dtype: of larger counts the proportions are kept.
    value >>= max(int(value.max()).bit_length() - 31, 0)
    buffer = io.BytesIO()
    torch.save({"logical_count": torch.from_numpy(value.astype(np.int32))}, buffer)
    with atomic_file(out) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return value.shape
