"""Tokens that something else recorded, on their way to a trace.

Every reader of a foreign format ends in :class:`ImportedTokens`; what is wrong with such
records is caught here, once.
"""

import lzma
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from placer import __version__
from placer.errors import PlacerError
from placer.model import (
    Architecture,
    ModelSpec,
    read_config,
)
from placer.run.files import (
    require_file,
    sha256_file,
)
from placer.trace.chunk import (
    Chunk,
    expert_dtype,
    require_ranges,
)
from placer.trace.expert_order import (
    listed_by_id,
    ordered_by_weight,
)
from placer.trace.header import (
    MAX_DOMAINS,
    TraceHeader,
)
from placer.trace.writer import TraceWriter

Array = npt.NDArray[Any]
_CHUNK_TOKENS = 65_536
# What the provenance calls rows that were listed in another order than by weight.
REORDERED = "reordered_rows"
# This many rows alike are no chance.
_TELLING_TOKENS = 64
_INTEGERS = (
    "experts",
    "sequence_ids",
    "token_ids",
    "positions",
    "phase",
    "domain_of_sequence",
)
# What NumPy, pandas and Python's archives raise at bytes that are damaged, or whose header
# promises more than is there.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImportedTokens:
    """Routing as a foreign file has it.

    Attributes
    ----------
    experts
        ``[T, L, k]`` integers: expert ids by descending router weight. L counts MoE
        layers, or all hidden layers of a model that is bound.
    sequence_ids
        ``[T]`` integers, not negative, in any order.
    token_ids, positions, phase
        ``[T]`` integers or ``None``; positions are counted per sequence by default.
    weights
        ``[T, L, k]`` floats or ``None``.
    domain_of_sequence, domain_names
        ``[S]`` integers and names, or ``None`` and none.
    """

    experts: Array
    sequence_ids: Array
    token_ids: Array | None = None
    positions: Array | None = None
    phase: Array | None = None
    weights: Array | None = None
    domain_of_sequence: Array | None = None
    domain_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.experts.ndim != 3 or 0 in self.experts.shape:
            raise PlacerError(
                f"experts has shape {list(self.experts.shape)}, "
                "expected [T, L, k], not empty"
            )
        num_tokens = len(self.experts)
        shapes = {
            "sequence_ids": (num_tokens,),
            "token_ids": (num_tokens,),
            "positions": (num_tokens,),
            "phase": (num_tokens,),
            "weights": self.experts.shape,
        }
        for name, shape in shapes.items():
            values = getattr(self, name)
            if values is not None and values.shape != shape:
                raise PlacerError(
                    f"{name} has shape {list(values.shape)}, expected {list(shape)}"
                )
        for name in _INTEGERS:
            values = getattr(self, name)
            if values is not None and not np.issubdtype(values.dtype, np.integer):
                raise PlacerError(f"{name} is {values.dtype}, expected integers")
        if self.weights is not None and not np.issubdtype(self.weights.dtype, np.floating):
            raise PlacerError(f"weights is {self.weights.dtype}, expected floats")
        if self.experts.min() < 0:
            raise PlacerError(
                f"experts must not be negative, but holds {self.experts.min()}"
            )
        # Before they are narrowed to the dtypes of a trace, which would wrap around.
        require_ranges(self)
        if self.domain_of_sequence is not None:
            self._require_domains(self.domain_of_sequence)

    def _require_domains(self, domain_of: Array) -> None:
        last = int(self.sequence_ids.max())
        if domain_of.ndim != 1 or len(domain_of) <= last:
            raise PlacerError(
                f"domain_of_sequence has shape {list(domain_of.shape)}, "
                f"but sequence ids go up to {last}"
            )
        names = len(self.domain_names)
        if domain_of.min() < 0 or domain_of.max() >= names or names > MAX_DOMAINS:
            raise PlacerError(
                f"domain_of_sequence goes up to {domain_of.max()}, "
                f"domain_names has {names} names (at most {MAX_DOMAINS})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundModel:
    """The model that a file is of: its routing, and how many hidden layers it has."""

    spec: ModelSpec
    num_hidden_layers: int

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Read both from the config of a checkpoint directory."""
        config = read_config(directory)
        architecture = Architecture.of(config, directory)
        return cls(
            spec=ModelSpec.from_checkpoint(directory),
            num_hidden_layers=architecture.num_hidden_layers(config),
        )


Reader = Callable[[Path, BoundModel | None], ImportedTokens]


def import_file(
    read: Reader, source: str, file: Path, out: Path, model_directory: Path | None = None
) -> TraceHeader:
    """Turn a foreign file into a trace.

    Parameters
    ----------
    read
        Reader of the format, given the file and the model if it is known.
    source
        Name of the format, for the provenance.
    file
        The file to read.
    out
        The trace directory to write.
    model_directory
        The checkpoint that the routing is of. Without it the trace is bound to none, and
        every layer is taken to have as many experts as the largest id of any layer.

    Raises
    ------
    PlacerError
        If the file cannot be read, or holds what the model cannot have emitted.
    """
    require_file(file, "file")
    model = None if model_directory is None else BoundModel.of(model_directory)
    try:
        tokens = read(file, model)
        if model is None:
            num_layers, top_k = tokens.experts.shape[1:]
            highest = int(tokens.experts.max())
            spec = ModelSpec(num_experts=(highest + 1,) * num_layers, top_k=top_k)
        else:
            spec = model.spec
            tokens = _without_dense_layers(tokens, model)
        _require_captured(tokens, bound=model is not None)
        tokens, num_reordered = ordered_by_weight(tokens)
        provenance: dict[str, Any] = {
            "placer": __version__,
            "source": source,
            "file": file.name,
            "sha256": sha256_file(file),
        }
        if num_reordered:
            provenance[REORDERED] = num_reordered
        with TraceWriter(
            directory=out,
            model=spec,
            domains=tokens.domain_names,
            provenance=provenance,
            experts_by_weight=tokens.weights is not None
            or not listed_by_id(tokens.experts),
        ) as writer:
            for chunk in _chunks(tokens, spec):
                writer.append(chunk)
            writer.finish()
    except PlacerError as error:
        hint = error.hint or f"check how it was recorded, and what {source} files hold"
        raise PlacerError(f"{file}: {error}", hint) from error
    return TraceHeader.read(out)


def _without_dense_layers(tokens: ImportedTokens, model: BoundModel) -> ImportedTokens:
    """Leave out the dense layers of a record of all hidden layers, which hold nothing."""
    num_layers, expected = tokens.experts.shape[1], model.spec.num_layers
    if num_layers not in (expected, model.num_hidden_layers):
        raise PlacerError(
            f"experts has {num_layers} layers, the model {expected} MoE layers of "
            f"{model.num_hidden_layers} hidden layers",
            "check --model",
        )
    if num_layers != model.num_hidden_layers:
        return tokens
    kept = list(model.spec.layer_ids or ())
    weights = None if tokens.weights is None else tokens.weights[:, kept]
    return replace(tokens, experts=tokens.experts[:, kept], weights=weights)


def _require_captured(tokens: ImportedTokens, *, bound: bool) -> None:
    """Refuse layers of zeros; those of a bound top-1 model may be a collapsed router's."""
    num_tokens, num_layers, top_k = tokens.experts.shape
    if top_k == 1 and (bound or num_tokens < _TELLING_TOKENS):
        return
    for layer in range(num_layers):
        if not tokens.experts[:, layer].any():
            raise PlacerError(
                f"layer {layer} is all zeros, as dense layers and those that were not "
                "captured are",
                "record it again: the model has experts there"
                if bound
                else "name the model, whose dense layers are then left out: --model DIR "
                "(a folder with its config.json is enough)",
            )


def _chunks(tokens: ImportedTokens, spec: ModelSpec) -> Iterator[Chunk]:
    """Yield whole sequences by ascending id, about ``_CHUNK_TOKENS`` tokens at a time."""
    sequence_ids = tokens.sequence_ids.astype(np.int64)
    order = np.argsort(sequence_ids, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(sequence_ids[order])) + 1]
    ends = np.r_[starts[1:], len(order)]
    begin = 0
    for end in ends:
        if end - begin >= _CHUNK_TOKENS or end == len(order):
            yield _chunk(tokens, spec, order[begin:end])
            begin = int(end)


def _chunk(tokens: ImportedTokens, spec: ModelSpec, rows: Array) -> Chunk:
    experts = tokens.experts[rows]
    if experts.max() >= max(spec.num_experts):
        # Checked before ids are narrowed to their dtype, which would wrap around.
        raise PlacerError(
            f"experts holds ids up to {experts.max()}, "
            f"the model has {max(spec.num_experts)} experts in a layer",
            "check --model; ids beyond its experts may be physical ids of an engine that "
            "ran with redundant experts",
        )
    sequence_ids = tokens.sequence_ids[rows].astype(np.int32)
    first = np.searchsorted(sequence_ids, sequence_ids)
    counted = np.arange(len(rows)) - first
    domain_of = tokens.domain_of_sequence

    def optional(values: Array | None, dtype: type[np.generic]) -> Array | None:
        # A weight too large for float16 is refused when it is written.
        with np.errstate(over="ignore"):
            return None if values is None else values[rows].astype(dtype)

    weights = optional(tokens.weights, np.float16)
    positions = optional(tokens.positions, np.int32)
    return Chunk(
        experts=tuple(
            experts[:, layer].astype(expert_dtype(size))
            for layer, size in enumerate(spec.num_experts)
        ),
        weights=None
        if weights is None
        else tuple(weights[:, layer] for layer in range(spec.num_layers)),
        token_ids=optional(tokens.token_ids, np.int32),
        sequence_ids=sequence_ids,
        positions=counted.astype(np.int32) if positions is None else positions,
        phase=optional(tokens.phase, np.uint8),
        domain_ids=None if domain_of is None else domain_of[sequence_ids].astype(np.uint8),
    )
