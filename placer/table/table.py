"""The table file: one safetensors file that needs only NumPy to read."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from placer.arrays import AnyArray
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.run.documents import (
    SCHEMA_VERSION,
    Document,
    NumRanks,
    Sha256,
    file_header,
    of_this_version,
    validated,
)
from placer.run.files import require_file
from placer.run.kinds import is_damaged, require_kind
from placer.run.seals import require_seal_with, sealed_with, unsealed
from placer.run.writing import write_tensors
from placer.serving.layer_serving import rank_dtype
from placer.shuffle import CombinedRule
from placer.trace.selection import ProfileFacts

KIND = "table"
ID_SPACE = "logical"
_RANKS = ("U8", "U16")
_DTYPES = {
    "token_rank": _RANKS,
    "token_confidence": ("F16",),
    "history_rank": _RANKS,
    "history_confidence": ("F16",),
    "lookback": ("I32",),
    "request_score": ("F16",),
    "expert_rank": _RANKS,
    "token_score": ("F16",),
    "token_weight": ("F32",),
    "unknown_score": ("F16",),
    "combined_bias": ("F32",),
    "expert_score": ("F16",),
    "home_price": ("F32",),
}
_COMBINED = {one.name for one in fields(CombinedRule)}
_OPTIONAL = {"token_score"} | _COMBINED
_WRITE = "write one: placer tables PLAN TRACE --out TABLE"
_REMEDY = "write it again: placer tables PLAN TRACE --out {path} --force"


class TableFile(Document, frozen=True, kw_only=True):
    """The header of a table file; see ``docs/formats.md``."""

    kind: Literal["table"]
    schema_version: Literal[2]
    model: ModelSpec
    tokenizer_sha256: Sha256 | None
    num_ranks: NumRanks
    num_nodes: NumRanks
    # More digits than any table has room for.
    lookback: Annotated[int, msgspec.Meta(ge=0, le=64)]
    plan_sha256: Sha256 | None
    trace_sha256: Sha256 | None
    id_space: Literal["logical"]
    provenance: ProfileFacts
    sha256: Sha256 | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Homes of tokens, for one placement.

    A runtime takes ``token_rank`` (T) or ``history_rank`` (A): the more
    confident; a tie goes to T. An unknown token takes A where there is history, else the
    home of its sequence (token shuffling of Speculative MoE, arXiv 2503.04398).

    Attributes
    ----------
    model
        Shape of the routing.
    num_ranks, num_nodes
        Topology of the placement, R ranks.
    lookback
        Number of past layers that index ``history_rank``; the first ``lookback`` layers
        use only T.
    token_rank
        ``[L, V]`` uint8, or uint16 above 256 ranks: T, the home that a token id prefers.
    token_confidence
        ``[L, V]`` float16 in 0..1: expected local activation rate of that home.
    history_rank
        ``[L, R^lookback]``: A, the home after the majority ranks of the last ``lookback``
        layers; their index is written in base R, the oldest first.
    history_confidence
        ``[L, R^lookback]`` float16 in 0..1: expected local activation rate of that home.
    request_score
        ``[V, R]`` float16: how well each rank serves requests that hold the id, above or
        below the average; summed over a prompt it says where the whole request is served
        best.
    expert_rank
        ``[L, E]``: the rank of each expert's first replica. E is that of the largest layer;
        places past the experts of a smaller layer hold ``num_ranks``, which is no rank.
    token_score
        ``[L, V, R]`` float16 in 0..1: expected local activation rate of every home, the
        second choices of equal slices, or ``None``.
    combined
        What turns ``token_score`` and the experts of past layers into one rate per home
        (see :mod:`placer.table.combined`), or ``None``.
    plan_sha256, trace_sha256, tokenizer_sha256
        Hashes of the files that the table depends on, ``None`` where not known.
    provenance
        Tool version, fold and options that shaped the table.
    """

    model: ModelSpec
    num_ranks: int
    num_nodes: int
    lookback: int
    token_rank: AnyArray
    token_confidence: AnyArray
    history_rank: AnyArray
    history_confidence: AnyArray
    request_score: AnyArray
    expert_rank: AnyArray
    token_score: AnyArray | None = None
    combined: CombinedRule | None = None
    plan_sha256: str | None = None
    trace_sha256: str | None = None
    tokenizer_sha256: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.lookback < 0:
            raise PlacerError(f"lookback must not be negative, got {self.lookback}")
        vocabulary = self.token_rank.shape[-1:]
        if vocabulary == (0,):
            raise PlacerError("token_rank has no token id")
        tokens = (self.model.num_layers, *vocabulary)
        histories = (self.model.num_layers, self.num_ranks**self.lookback)
        experts = (self.model.num_layers, max(self.model.num_experts))
        for name, shape in {
            "token_rank": tokens,
            "token_confidence": tokens,
            "history_rank": histories,
            "history_confidence": histories,
            "request_score": (*vocabulary, self.num_ranks),
            "expert_rank": experts,
            "token_score": (*tokens, self.num_ranks),
        }.items():
            values = getattr(self, name)
            if values is not None and values.shape != shape:
                raise PlacerError(
                    f"{name} has shape {list(values.shape)}, expected {list(shape)}"
                )
        self._require_ranks()
        self._require_rates()
        if self.combined is not None:
            self._require_combined(self.combined)

    def _require_ranks(self) -> None:
        sizes = np.asarray(self.model.num_experts)[:, None]
        exists = np.arange(self.expert_rank.shape[1]) < sizes
        for name, values in (
            ("token_rank", self.token_rank),
            ("history_rank", self.history_rank),
            ("expert_rank", self.expert_rank[exists]),
        ):
            if values.size and not 0 <= values.min() <= values.max() < self.num_ranks:
                raise PlacerError(
                    f"{name} holds rank {values.max()}, outside 0..{self.num_ranks - 1}"
                )
        if (self.expert_rank[~exists] != self.num_ranks).any():
            raise PlacerError(
                "expert_rank has a rank for an expert that does not exist: entries after "
                f"num_experts must be {self.num_ranks}"
            )

    def _require_rates(self) -> None:
        num_layers = self.model.num_layers
        for name, lowest, highest in (
            ("token_confidence", 0, 1),
            ("history_confidence", 0, 1),
            ("token_score", 0, 1),
            ("request_score", -num_layers, num_layers),
        ):
            values = getattr(self, name)
            if values is None or not values.size:
                continue
            # A value that is not a number fails both comparisons.
            if not (values.min() >= lowest and values.max() <= highest):
                raise PlacerError(
                    f"{name} holds a value outside {lowest}..{highest} or that is not a "
                    "number"
                )

    def _require_combined(self, rule: CombinedRule) -> None:
        if self.token_score is None:
            raise PlacerError("the combined rule needs token_score, which is missing")
        ranks = (self.model.num_layers, self.num_ranks)
        depth = rule.expert_score.shape[1:2]
        if depth == (0,):
            raise PlacerError("expert_score is empty: it has 0 past layers")
        experts = (*depth, max(self.model.num_experts))
        for name, shape in {
            "token_weight": ranks[:1],
            "unknown_score": ranks,
            "combined_bias": ranks,
            "expert_score": (ranks[0], *experts, ranks[1]),
            "home_price": ranks,
        }.items():
            values = getattr(rule, name)
            if values.shape != shape:
                raise PlacerError(
                    f"{name} has shape {list(values.shape)}, expected {list(shape)}"
                )
            if not np.isfinite(values).all():
                raise PlacerError(f"{name} holds a value that is not a number")

    @property
    def vocab_size(self) -> int:
        """Number of token ids that have a row, V."""
        return int(self.token_rank.shape[-1])

    def tensors(self) -> dict[str, AnyArray]:
        """Return the tensors under the names of the file format."""
        named = {
            name: np.ascontiguousarray(values)
            for name in _DTYPES
            if name != "lookback"
            and (
                values := getattr(self.combined if name in _COMBINED else self, name, None)
            )
            is not None
        }
        return named | {"lookback": np.array(self.lookback, dtype=np.int32)}

    def write(self, path: Path) -> None:
        """Write one safetensors file: the same table gives the same bytes."""
        header = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "model": self.model.to_json(),
            "tokenizer_sha256": self.tokenizer_sha256,
            "num_ranks": self.num_ranks,
            "num_nodes": self.num_nodes,
            "lookback": self.lookback,
            "plan_sha256": self.plan_sha256,
            "trace_sha256": self.trace_sha256,
            "id_space": ID_SPACE,
            "provenance": dict(self.provenance),
        }
        tensors = self.tensors()
        write_tensors(path, tensors, sealed_with(header, tensors))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a table file.

        Raises
        ------
        PlacerError
            If it is not a table, truncated, of another schema version, or holds a tensor
            that is unknown, missing, or of another dtype or shape than the format's, a
            rank that does not exist, or a confidence outside 0..1.
        """
        require_file(path, "table")
        require_kind(path, [KIND], _WRITE)
        again = _REMEDY.format(path=path)
        try:
            header, value, tensors = _load(path)
        except (SafetensorError, OSError) as error:
            # What is no table may be precious: nothing is to replace it.
            raise PlacerError(
                f"table {path} cannot be read: {error}",
                again if is_damaged(path, KIND) else _WRITE,
            ) from error
        written = dict(tensors)
        lookback = tensors.pop("lookback")
        try:
            if lookback.shape != () or int(lookback) != header.lookback:
                raise PlacerError(
                    f"lookback is {lookback.tolist()}, the header says {header.lookback}"
                )
            combined = {name: tensors.pop(name) for name in _COMBINED & set(tensors)}
            read = cls(
                model=header.model,
                num_ranks=header.num_ranks,
                num_nodes=header.num_nodes,
                lookback=header.lookback,
                plan_sha256=header.plan_sha256,
                trace_sha256=header.trace_sha256,
                tokenizer_sha256=header.tokenizer_sha256,
                provenance=value["provenance"],
                **tensors,
                combined=CombinedRule(**combined) if combined else None,
            )
        except (KeyError, TypeError, AttributeError, PlacerError) as error:
            raise PlacerError(f"table {path} is damaged: {error}", again) from error
        require_seal_with(value, written, f"table {path}", again)
        return read


def _load(path: Path) -> tuple[TableFile, dict[str, Any], dict[str, Any]]:
    """Read header, its JSON and tensors, once names and dtypes are checked."""
    where, again = f"table {path}", _REMEDY.format(path=path)
    with safe_open(path, "np") as opened:
        value = file_header(opened.metadata(), where)
        if value.get("kind") != KIND:
            raise PlacerError(
                f"{where}: this is not a token-shuffle table",
                _WRITE,
            )
        value = of_this_version(value, where, again, unsealed)
        header = validated(value, TableFile, where, again)
        names = set(opened.keys())
        optional = _OPTIONAL - _COMBINED if names & _COMBINED else _OPTIONAL
        for what, odd in (
            ("unknown tensors", names - set(_DTYPES)),
            ("missing tensors", set(_DTYPES) - optional - names),
        ):
            if odd:
                raise PlacerError(f"{where}: {what}: {', '.join(sorted(odd))}", again)
        for name in sorted(names):
            dtype = opened.get_slice(name).get_dtype()
            if dtype not in _DTYPES[name]:
                raise PlacerError(
                    f"{where}: {name} is {dtype}, expected {' or '.join(_DTYPES[name])}",
                    again,
                )
        tensors = {name: opened.get_tensor(name) for name in sorted(names)}
        return header, value, tensors


def expert_rank_rows(rows: list[AnyArray], num_ranks: int) -> AnyArray:
    """Stack the expert ranks of layers ([E_l] each), filled up with ``num_ranks``."""
    width = max(len(row) for row in rows)
    padded = any(len(row) < width for row in rows)
    stacked = np.full(
        (len(rows), width), num_ranks, dtype=rank_dtype(num_ranks - (not padded))
    )
    for layer, row in enumerate(rows):
        stacked[layer, : len(row)] = row
    return stacked
