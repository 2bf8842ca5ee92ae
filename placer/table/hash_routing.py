"""Hash-routed layers, whose experts depend only on the token id: no profile is needed.

The first layers of DeepSeek-V4 look the experts of a token up in a table of the checkpoint
(``tid2eid``, "hash routing": Roller et al. 2021, arXiv 2106.04426). What a home serves of
such a token is known exactly.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from placer.arrays import AnyArray
from placer.errors import PlacerError
from placer.model import Architecture, ModelSpec, read_config
from placer.model.tensor_layout import TensorKind
from placer.run.files import require_file
from placer.table.checkpoint_tensors import tensor_files
from placer.trace import Chunk

#: Per hash-routed MoE layer (from 0): ``[V, k]``, the experts of every token id.
TokenExperts = Mapping[int, AnyArray]


def read_token_experts(directory: Path, model: ModelSpec) -> TokenExperts:
    """Read the experts of every token id from a checkpoint, for its hash-routed layers.

    Parameters
    ----------
    directory
        A Hugging Face checkpoint.
    model
        Its specification.

    Returns
    -------
    dict
        By MoE layer, ``[V, k]`` integers; empty where no layer is hash-routed.

    Raises
    ------
    PlacerError
        If the file of a table is missing or damaged, or the table does not name ``top_k``
        experts of its layer for every id.
    """
    from safetensors import SafetensorError, safe_open

    architecture = Architecture.of(read_config(directory), directory)
    if architecture.layout is None or model.layer_ids is None:
        return {}
    found: dict[int, AnyArray] = {}
    for name, path in tensor_files(directory).items():
        place = architecture.layout.classify(name)
        if place is None or place.kind is not TensorKind.TABLE:
            continue
        if place.layer not in model.layer_ids:
            continue
        require_file(path, "shard")
        try:
            with safe_open(path, "np") as opened:
                table: AnyArray = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise PlacerError(f"{path} cannot be read: {error}") from error
        layer = model.layer_ids.index(place.layer)
        _require_experts(table, name, model, layer)
        found[layer] = table
    return found


def require_same_routing(token_experts: TokenExperts, tokens: Chunk) -> None:
    """Refuse a profile whose routing differs from the checkpoint's tables.

    Raises
    ------
    PlacerError
        With a token id that was routed differently.
    """
    if tokens.token_ids is None:
        return
    for layer, table in token_experts.items():
        known = (tokens.token_ids >= 0) & (tokens.token_ids < len(table))
        ids = tokens.token_ids[known]
        recorded = np.sort(tokens.experts[layer][known], axis=1)
        stored = np.sort(table, axis=1)[ids]
        odd = np.flatnonzero((recorded != stored).any(axis=1))
        if len(odd):
            first = odd[0]
            raise PlacerError(
                f"MoE layer {layer} is hash-routed, but the trace has experts "
                f"{recorded[first].tolist()} for token id {ids[first]} where the "
                f"checkpoint has {stored[first].tolist()}",
                "give the checkpoint that the trace was recorded from: --embeddings MODEL",
            )


def _require_experts(table: AnyArray, name: str, model: ModelSpec, layer: int) -> None:
    vocab_size = len(table) if model.vocab_size is None else model.vocab_size
    expected = (vocab_size, model.top_k)
    if table.shape != expected or table.dtype.kind not in "iu":
        raise PlacerError(
            f"{name} is {table.dtype} of shape {list(table.shape)}, expected integers "
            f"of shape {list(expected)}"
        )
    size = model.num_experts[layer]
    if not 0 <= table.min() <= table.max() < size:
        raise PlacerError(f"{name} names experts outside 0..{size - 1}")
