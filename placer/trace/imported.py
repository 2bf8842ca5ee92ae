"""Importing tokens that another program recorded.

Every reader of a foreign format ends in :class:`ImportedTokens`; what is wrong with such
records is caught here, once.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from placer.errors import PlacerError, UsageError
from placer.model import Architecture, ModelSpec, read_config, tokenizer_of
from placer.run.files import require_file, sha256_file, utf8_name
from placer.trace.chunk import Chunk, expert_dtype, require_ranges
from placer.trace.expert_order import listed_by_id, ordered_by_weight
from placer.trace.header import MAX_DOMAINS, TraceHeader
from placer.trace.writer import TraceWriter
from placer.version import __version__

Array = npt.NDArray[Any]
_CHUNK_TOKENS = 65_536
# What the provenance calls rows that were listed in another order than by weight.
REORDERED = "reordered_rows"
# In place of an expert where there is none.
_NO_EXPERT = -1
# This many equal rows are no chance.
_TELLING_TOKENS = 64
_INTEGERS = (
    "experts",
    "sequence_ids",
    "token_ids",
    "positions",
    "phase",
    "domain_of_sequence",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImportedTokens:
    """Routing as read from a foreign file.

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
    remarks
        What the file does not say, or what was left out: sentences for the user.
    """

    experts: Array
    sequence_ids: Array
    token_ids: Array | None = None
    positions: Array | None = None
    phase: Array | None = None
    weights: Array | None = None
    domain_of_sequence: Array | None = None
    domain_names: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

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
        if self.experts.min() < _NO_EXPERT:
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
    """The model that a file is of.

    Attributes
    ----------
    spec
        Its routing.
    num_hidden_layers
        Hidden layers, dense ones included.
    hash_layers
        The model's own numbers of MoE layers without a router, which engines do not
        record.
    """

    spec: ModelSpec
    num_hidden_layers: int
    hash_layers: tuple[int, ...] = ()

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Read both from the config of a checkpoint directory."""
        config = read_config(directory)
        architecture = Architecture.of(config, directory)
        return cls(
            spec=ModelSpec.from_checkpoint(directory),
            num_hidden_layers=architecture.num_hidden_layers(config),
            hash_layers=architecture.hash_layers(config),
        )

    def without(self, layers: Collection[int]) -> Self:
        """Return the model without some MoE layers, by their own numbers."""
        return replace(
            self,
            spec=self.spec.without_layers(layers),
            hash_layers=tuple(n for n in self.hash_layers if n not in layers),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """The user's options for a file.

    Attributes
    ----------
    model_directory
        The checkpoint that the routing is of. Without it nothing is bound to it, and
        every layer is taken to have as many experts as the largest id of any layer.
    num_experts
        Experts of every layer, where no checkpoint says.
    skip_layers
        MoE layers that were not recorded, by the model's own numbers.
    warn
        Takes each sentence that the user should read.
    """

    model_directory: Path | None = None
    num_experts: int | None = None
    skip_layers: tuple[int, ...] = ()
    warn: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        if self.model_directory is None and self.skip_layers:
            raise UsageError(
                "--skip-layers needs a model, but --model is missing",
                "give --model DIR (a folder with its config.json is enough)",
            )
        if self.model_directory is not None and self.num_experts is not None:
            raise UsageError(
                f"--num-experts {self.num_experts} and --model {self.model_directory} "
                "both give the number of experts",
                "drop --num-experts",
            )

    def bound_model(self) -> BoundModel | None:
        """Return the model, less the layers to skip.

        Raises
        ------
        PlacerError
            If its config cannot be read, or it has no such MoE layer.
        """
        if self.model_directory is None:
            return None
        return BoundModel.of(self.model_directory).without(self.skip_layers)

    def columns(self, model: BoundModel, recorded: int) -> tuple[int, ...] | None:
        """Return the model's own numbers of the layers that a record has.

        Parameters
        ----------
        model
            The model, less the layers to skip.
        recorded
            How many layers the record has: all hidden layers, all MoE layers, those that
            are not skipped, or those with a router. ``None`` for another number.
        """
        ids = model.spec.layer_ids or ()
        routed = tuple(n for n in ids if n not in model.hash_layers)
        every = tuple(sorted({*ids, *self.skip_layers}))
        hidden = tuple(range(model.num_hidden_layers))
        return {len(one): one for one in (routed, ids, every, hidden)}.get(recorded)


#: Nothing is known but the file.
BY_ITSELF = ImportOptions()

Reader = Callable[[Path, BoundModel | None], ImportedTokens]


def import_file(
    read: Reader,
    source: str,
    file: Path,
    out: Path,
    options: ImportOptions = BY_ITSELF,
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
    options
        What the user says of the file.

    Raises
    ------
    PlacerError
        If the file cannot be read, or holds what the model cannot have emitted.
    """
    require_file(file, "file")
    model = options.bound_model()
    try:
        tokens = _without_padding(read(file, model))
        if model is None:
            spec = _unbound(tokens, options.num_experts)
        else:
            tokens, model = _of_moe_layers(tokens, model, options)
            spec = model.spec
        for remark in tokens.remarks:
            options.warn(remark)
        _require_captured(tokens, spec)
        tokens, num_reordered = ordered_by_weight(tokens)
        provenance: dict[str, Any] = {
            "placer": __version__,
            "source": source,
            "file": utf8_name(file.name),
            "sha256": sha256_file(file),
        }
        if options.model_directory is not None and tokens.token_ids is not None:
            provenance["tokenizer_sha256"] = tokenizer_of(options.model_directory)
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


def _without_padding(tokens: ImportedTokens) -> ImportedTokens:
    """Leave out tokens without any expert; layers without any stay as they are.

    Engines write -1 for tokens that fill up a batch, and loggers for dense layers.
    """
    lacks = tokens.experts == _NO_EXPERT
    if not lacks.any():
        return tokens
    real = ~lacks.all(axis=(1, 2))
    if not real.any():
        raise PlacerError("all expert ids are -1", "record tokens that were routed")
    experts = tokens.experts[real]
    lacks = experts == _NO_EXPERT
    if (partly := (lacks & ~lacks.all(axis=(0, 2), keepdims=True)).any(axis=(1, 2))).any():
        raise PlacerError(
            f"{int(partly.sum()):,} of {len(experts):,} tokens have -1 instead of some "
            "experts",
            "a trace holds the same number of experts for every token and layer: leave "
            "these tokens out, or record again without what dropped their experts",
        )
    parts: dict[str, Any] = {
        name: None if (values := getattr(tokens, name)) is None else values[real]
        for name in ("sequence_ids", "token_ids", "positions", "phase", "weights")
    }
    remarks = tokens.remarks
    if padding := len(real) - int(real.sum()):
        remarks += (
            f"{padding:,} of {len(real):,} tokens have -1 instead of all experts, like "
            "those that fill up a batch. They are left out",
        )
    return replace(tokens, experts=experts, remarks=remarks, **parts)


def _unbound(tokens: ImportedTokens, num_experts: int | None) -> ModelSpec:
    num_layers, top_k = tokens.experts.shape[1:]
    size = int(tokens.experts.max()) + 1 if num_experts is None else num_experts
    return ModelSpec(num_experts=(size,) * num_layers, top_k=top_k)


def _of_moe_layers(
    tokens: ImportedTokens, model: BoundModel, options: ImportOptions
) -> tuple[ImportedTokens, BoundModel]:
    """Keep the layers that have a router and were recorded.

    Records of all hidden layers hold nothing for dense layers; hash layers are left out
    where they hold zeros, or are not in the record.
    """
    recorded = tokens.experts.shape[1]
    columns = options.columns(model, recorded)
    if columns is None:
        raise PlacerError(
            f"experts has {recorded} layers, the model {model.spec.num_layers} MoE layers "
            f"of {model.num_hidden_layers} hidden layers",
            "check --model; if layers were not recorded, name them: --skip-layers LIST",
        )
    empty = [
        layer
        for layer in model.hash_layers
        if layer not in columns or tokens.experts[:, columns.index(layer)].max() <= 0
    ]
    if empty:
        options.warn(hash_layers_warning(empty))
        model = model.without(empty)
    known = {*(model.spec.layer_ids or ()), *empty, *options.skip_layers}
    for column, layer in enumerate(columns):
        if layer not in known and tokens.experts[:, column].max() > 0:
            raise PlacerError(
                f"layer {layer} holds expert ids, but the model has no experts there",
                "check --model",
            )
    kept = [columns.index(layer) for layer in model.spec.layer_ids or ()]
    if kept == [*range(recorded)]:
        return tokens, model
    weights = None if tokens.weights is None else tokens.weights[:, kept]
    return replace(tokens, experts=tokens.experts[:, kept], weights=weights), model


def axes_doubt(read: str) -> str:
    """Return the warning that axes may be meant the other way round than they were read."""
    return (
        f"it is read as {read}, but nothing in it says which is which. If it is the other "
        "way round, the result is wrong: --model DIR (a folder with its config.json is "
        "enough) checks it"
    )


def hash_layers_warning(layers: Sequence[int]) -> str:
    """Return the note that layers without a router are left out."""
    return (
        f"layers {', '.join(map(str, layers))} choose experts by a hash of the token, "
        "which engines do not record. They are left out, and exports keep their experts "
        "in order"
    )


def _require_captured(tokens: ImportedTokens, spec: ModelSpec) -> None:
    """Refuse layers of -1 or of zeros.

    In a bound top-1 model, a collapsed router may cause zeros.
    """
    num_tokens, num_layers, top_k = tokens.experts.shape
    may_be_zeros = top_k == 1 and (spec.bound or num_tokens < _TELLING_TOKENS)
    ids = spec.layer_ids or range(num_layers)
    for column, layer in enumerate(ids):
        largest = int(tokens.experts[:, column].max())
        if largest < 0 or (largest == 0 and not may_be_zeros):
            raise PlacerError(
                f"layer {layer} is all {'zeros' if largest == 0 else largest}, like dense "
                "layers and layers that were not captured",
                "the model has experts there: record it again, or leave it out: "
                f"--skip-layers {layer}"
                if spec.bound
                else "name the model, so that its dense layers can be left out: --model "
                "DIR (a folder with its config.json is enough)",
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
    # Before ids are narrowed to the dtype of their layer, which would wrap around.
    for layer, size in enumerate(spec.num_experts):
        if (largest := int(experts[:, layer].max())) >= size:
            raise PlacerError(
                f"layer {layer} holds ids up to {largest}, the model has {size} experts",
                "check --model or --num-experts; ids above the number of experts may be "
                "physical ids of an engine with redundant experts",
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
