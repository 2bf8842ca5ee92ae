"""Importing router traces from NumPy archives.

An archive holds ``experts`` [T, L, k] and ``sequence_ids`` [T], and may hold ``token_ids``
[T], ``weights`` [T, L, k], ``domain_of_sequence`` [S] and ``domain_names`` [D].
"""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer import __version__
from placer.errors import PlacerError
from placer.files import require_absent, require_file, sha256_file
from placer.model import ModelSpec
from placer.trace.chunk import Chunk, expert_dtype
from placer.trace.header import TraceHeader
from placer.trace.writer import TraceWriter

Array = npt.NDArray[Any]
_CHUNK_TOKENS = 65_536
_OPTIONAL = ("token_ids", "weights", "domain_of_sequence", "domain_names")


def import_npz(file: Path, out: Path, model_directory: Path | None = None) -> TraceHeader:
    """Turn an archive into a trace.

    Parameters
    ----------
    file
        The ``.npz`` archive; objects inside it are refused, never unpickled.
    out
        The trace directory to write.
    model_directory
        The checkpoint that the trace is of. Without it the trace is bound to none, and
        every layer is taken to have as many experts as the largest id of any layer.

    Raises
    ------
    PlacerError
        If an array is missing, of the wrong kind or shape, or holds ids that the model
        cannot have emitted.
    """
    require_absent(out)
    arrays = _read_archive(file)
    _require_shapes(file, arrays)
    spec = _model_of(arrays["experts"], model_directory)
    domains = tuple(str(name) for name in arrays.get("domain_names", ()))
    provenance = {
        "placer": __version__,
        "source": "npz",
        "file": file.name,
        "sha256": sha256_file(file),
    }
    with TraceWriter(
        directory=out, model=spec, domains=domains, provenance=provenance
    ) as writer:
        try:
            for chunk in _chunks(arrays, spec):
                writer.append(chunk)
        except PlacerError as error:
            raise PlacerError(f"{file}: {error}", error.hint) from error
        writer.finish()
    return TraceHeader.read(out)


def _read_archive(file: Path) -> dict[str, Array]:
    require_file(file, "archive")
    try:
        with np.load(file, allow_pickle=False) as archive:
            known = ("experts", "sequence_ids", *_OPTIONAL)
            arrays = {name: archive[name] for name in known if name in archive.files}
            found = list(archive.files)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise PlacerError(
            f"{file} is no readable .npz archive of plain arrays: {error}",
            "save it with numpy.savez(FILE, experts=..., sequence_ids=...)",
        ) from error
    for name in ("experts", "sequence_ids"):
        if name not in arrays:
            raise PlacerError(
                f"{file} lacks the array {name}; it holds {', '.join(found) or 'nothing'}",
                "save it with numpy.savez(FILE, experts=..., sequence_ids=...)",
            )
    return arrays


def _require_shapes(file: Path, arrays: Mapping[str, Array]) -> None:
    experts, sequence_ids = arrays["experts"], arrays["sequence_ids"]
    if experts.ndim != 3 or 0 in experts.shape:
        raise PlacerError(
            f"{file}: experts has shape {list(experts.shape)}, "
            "expected [T, L, k], not empty"
        )
    num_tokens = len(experts)
    for name, values, shape in (
        ("sequence_ids", sequence_ids, (num_tokens,)),
        ("token_ids", arrays.get("token_ids"), (num_tokens,)),
        ("weights", arrays.get("weights"), experts.shape),
    ):
        if values is not None and values.shape != shape:
            raise PlacerError(
                f"{file}: {name} has shape {list(values.shape)}, expected {list(shape)}"
            )
    for name in ("experts", "sequence_ids", "token_ids", "domain_of_sequence"):
        if name in arrays and not np.issubdtype(arrays[name].dtype, np.integer):
            raise PlacerError(f"{file}: {name} is {arrays[name].dtype}, expected integers")
    if sequence_ids.min() < 0 or experts.min() < 0:
        raise PlacerError(f"{file}: experts and sequence_ids must not be negative")
    if "domain_of_sequence" in arrays:
        _require_domains(file, arrays)
    for layer in range(experts.shape[1]):
        if experts.shape[2] > 1 and not experts[:, layer].any():
            raise PlacerError(
                f"{file}: layer {layer} is all zeros, as layers that were not captured are",
                "leave dense and uncaptured layers out of experts",
            )


def _require_domains(file: Path, arrays: Mapping[str, Array]) -> None:
    domain_of = arrays["domain_of_sequence"]
    names = arrays.get("domain_names", np.asarray([]))
    last = int(arrays["sequence_ids"].max())
    if domain_of.ndim != 1 or len(domain_of) <= last:
        raise PlacerError(
            f"{file}: domain_of_sequence has shape {list(domain_of.shape)}, "
            f"but sequence ids go up to {last}"
        )
    if domain_of.min() < 0 or domain_of.max() >= len(names) or len(names) > 256:
        raise PlacerError(
            f"{file}: domain_of_sequence goes up to {domain_of.max()}, "
            f"domain_names has {len(names)} names (at most 256)"
        )


def _model_of(experts: Array, model_directory: Path | None) -> ModelSpec:
    if model_directory is not None:
        return ModelSpec.from_checkpoint(model_directory)
    num_layers, top_k = experts.shape[1:]
    return ModelSpec(num_experts=(int(experts.max()) + 1,) * num_layers, top_k=top_k)


def _chunks(arrays: Mapping[str, Array], spec: ModelSpec) -> Iterator[Chunk]:
    """Yield whole sequences by ascending id, about ``_CHUNK_TOKENS`` tokens at a time."""
    sequence_ids = arrays["sequence_ids"].astype(np.int64)
    order = np.argsort(sequence_ids, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(sequence_ids[order])) + 1]
    ends = np.r_[starts[1:], len(order)]
    begin = 0
    for end in ends:
        if end - begin >= _CHUNK_TOKENS or end == len(order):
            yield _chunk(arrays, spec, order[begin:end])
            begin = int(end)


def _chunk(arrays: Mapping[str, Array], spec: ModelSpec, rows: Array) -> Chunk:
    experts = arrays["experts"][rows]
    if experts.max() >= max(spec.num_experts) or experts.shape[1] != spec.num_layers:
        # Checked before ids are narrowed to their dtype, which would wrap around.
        raise PlacerError(
            f"experts has {experts.shape[1]} layers with ids up to {experts.max()}, "
            f"the model {spec.num_layers} MoE layers of {max(spec.num_experts)} experts",
            "check --model, or leave dense layers out of experts",
        )
    sequence_ids = arrays["sequence_ids"][rows].astype(np.int32)
    first = np.searchsorted(sequence_ids, sequence_ids)
    weights, domain_of = arrays.get("weights"), arrays.get("domain_of_sequence")
    token_ids = arrays.get("token_ids")
    return Chunk(
        experts=tuple(
            experts[:, layer].astype(expert_dtype(size))
            for layer, size in enumerate(spec.num_experts)
        ),
        weights=None
        if weights is None
        else tuple(
            weights[rows, layer].astype(np.float16) for layer in range(spec.num_layers)
        ),
        token_ids=None if token_ids is None else token_ids[rows].astype(np.int32),
        sequence_ids=sequence_ids,
        positions=(np.arange(len(rows)) - first).astype(np.int32),
        domain_ids=None if domain_of is None else domain_of[sequence_ids].astype(np.uint8),
    )
