"""The affinity file: exact int64 counts that add up over traces."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from placer.affinity.invariants import require_consistent_pairs
from placer.affinity.sparse import SparseCounts
from placer.arrays import IntArray
from placer.errors import PlacerError
from placer.model import Combination, ModelSpec, recorded_tokenizer
from placer.run.documents import (
    SCHEMA_VERSION,
    Count,
    Document,
    Sha256,
    file_header,
    of_this_version,
    validated,
)
from placer.run.files import require_file
from placer.run.kinds import is_damaged, require_kind
from placer.run.seals import require_seal_with, sealed_with, unsealed
from placer.run.writing import write_tensors
from placer.trace.selection import ProfileFacts

KIND = "affinity"
_SPARSE = ("token_expert", "sequence_expert")


class AffinityFile(Document, frozen=True, kw_only=True):
    """The header of an affinity file; see ``docs/formats.md``."""

    kind: Literal["affinity"]
    schema_version: Literal[2]
    model: ModelSpec
    num_tokens: Count
    provenance: ProfileFacts
    sha256: Sha256 | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Affinity:
    """Counts of a trace.

    Attributes
    ----------
    model
        Shape of the routing.
    num_tokens
        Tokens counted.
    load
        L arrays ``[E]``: (token, expert) pairs of each expert.
    transition
        L-1 arrays ``[E_l, E_{l+1}]``: pairs (i of the token's experts in layer l, j of
        those in layer l+1); ExFlow (arXiv 2401.08383), section III, for any top-k.
        Empty where only loads are known.
    coactivation
        L arrays ``[E, E]``, symmetric with zero diagonal: tokens that use both experts.
        Empty where only loads are known.
    token_expert
        L sparse ``[V, E]``: pairs per token id, or ``None`` where ids were not recorded.
    sequence_expert
        L sparse ``[S, E]``: pairs per sequence id, or ``None``.
    provenance
        Hashes of the traces, fold, tool version.
    """

    model: ModelSpec
    num_tokens: int
    load: tuple[IntArray, ...]
    transition: tuple[IntArray, ...] = ()
    coactivation: tuple[IntArray, ...] = ()
    token_expert: tuple[SparseCounts, ...] | None = None
    sequence_expert: tuple[SparseCounts, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = self.model.num_experts
        expected = {
            "load": [(size,) for size in sizes],
            "coactivation": [(size, size) for size in sizes],
            "transition": list(itertools.pairwise(sizes)),
        }
        if not (self.transition or self.coactivation):
            expected = {"load": expected["load"]}
        for name, shapes in expected.items():
            counts = getattr(self, name)
            found = [one.shape for one in counts]
            if found != shapes:
                raise PlacerError(f"{name} has shapes {found}, expected {shapes}")
            if any(one.dtype != np.int64 or (one < 0).any() for one in counts):
                raise PlacerError(f"{name} must hold int64 counts, none negative")

    @property
    def has_links(self) -> bool:
        """Whether pairs of experts were counted, not only loads."""
        return bool(self.coactivation)

    def add(self, other: "Affinity") -> "Affinity":
        """Return the sum of two counts of one model; optional rows must be in both.

        Raises
        ------
        UsageError
            If the counts are of different models or tokenizers.
        PlacerError
            If only one of them has links.
        """
        both = Combination()
        for name, one in (("the first affinity", self), ("the second", other)):
            both.add(name, one.model, recorded_tokenizer(one.provenance))
        if self.has_links != other.has_links:
            raise PlacerError(
                "one affinity counts pairs of experts, the other only loads",
                "merge files of one kind",
            )

        def rows(name: str) -> tuple[SparseCounts, ...] | None:
            one, two = getattr(self, name), getattr(other, name)
            if one is None or two is None:
                return None
            return tuple(a.add(b) for a, b in zip(one, two, strict=True))

        def counts(name: str) -> tuple[IntArray, ...]:
            pairs = zip(getattr(self, name), getattr(other, name), strict=True)
            return tuple(a + b for a, b in pairs)

        return Affinity(
            model=both.model,
            num_tokens=self.num_tokens + other.num_tokens,
            load=counts("load"),
            transition=counts("transition"),
            coactivation=counts("coactivation"),
            token_expert=rows("token_expert"),
            sequence_expert=rows("sequence_expert"),
            provenance={
                **self.provenance,
                "tokenizer_sha256": both.tokenizer_sha256,
            },
        )

    def without_sequences(self) -> "Affinity":
        """Return the same counts without the rows per sequence."""
        return replace(self, sequence_expert=None)

    def tensors(self) -> dict[str, IntArray]:
        """Return the counts under the tensor names of the file format."""
        named: dict[str, IntArray] = {}
        for name in ("load", "transition", "coactivation"):
            for layer, counts in enumerate(getattr(self, name)):
                named[f"{name}.{layer}"] = np.ascontiguousarray(counts, dtype=np.int64)
        for name in _SPARSE:
            for layer, sparse in enumerate(getattr(self, name) or ()):
                named[f"{name}.{layer}.indptr"] = sparse.indptr
                named[f"{name}.{layer}.indices"] = sparse.indices
                named[f"{name}.{layer}.counts"] = sparse.counts
        return named

    def write(self, path: Path) -> None:
        """Write one safetensors file: the same counts give the same bytes."""
        header = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "model": self.model.to_json(),
            "num_tokens": self.num_tokens,
            "provenance": dict(self.provenance),
        }
        tensors = self.tensors()
        write_tensors(path, tensors, sealed_with(header, tensors))

    @property
    def known_tokens(self) -> int | None:
        """Tokens that were counted; ``None`` of loads alone without a known top-k."""
        return self.num_tokens if self.has_links or self.model.top_k else None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an affinity file.

        Raises
        ------
        PlacerError
            If it is not an affinity file, truncated, of another schema version, or holds
            counts that contradict each other or are not those that were written.
        """
        require_file(path, "affinity file")
        write = "write one: placer affinity TRACE --out AFFINITY"
        require_kind(path, ["affinity"], write)
        again = f"count again: placer affinity TRACE --out {path} --force"
        try:
            with safe_open(path, "np") as opened:
                header = file_header(opened.metadata(), f"affinity file {path}")
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            # A dtype that NumPy does not have, such as bfloat16, is a TypeError.
            # What is no affinity file may be precious: nothing is to replace it.
            raise PlacerError(
                f"affinity file {path} cannot be read: {error}",
                again if is_damaged(path, KIND) else write,
            ) from error
        if header.get("kind") != KIND:
            raise PlacerError(f"{path} is not an affinity file", write)
        where = f"affinity file {path}"
        header = of_this_version(header, where, again, unsealed)
        stated = validated(header, AffinityFile, where, again)
        try:
            read = cls._from_tensors(stated, header["provenance"], tensors)
            if read.has_links and read.model.top_k:
                require_consistent_pairs(
                    read.model.top_k,
                    read.num_tokens,
                    read.load,
                    read.transition,
                    read.coactivation,
                )
        except (KeyError, TypeError, ValueError, AttributeError, PlacerError) as error:
            raise PlacerError(f"{where} is damaged: {error}", again) from error
        odd = sorted(set(tensors) ^ set(read.tensors()))
        if odd:
            raise PlacerError(
                f"{where} has missing or unknown tensors: {', '.join(odd)}", again
            )
        require_seal_with(header, tensors, where, again)
        return read

    @classmethod
    def _from_tensors(
        cls,
        stated: AffinityFile,
        provenance: Mapping[str, Any],
        tensors: Mapping[str, IntArray],
    ) -> Self:
        model = stated.model
        loads_alone = not any(name.startswith("coactivation.") for name in tensors)

        def layers(name: str, number: int) -> tuple[IntArray, ...]:
            if loads_alone and name != "load":
                return ()
            return tuple(tensors[f"{name}.{n}"] for n in range(number))

        return cls(
            model=model,
            num_tokens=stated.num_tokens,
            load=layers("load", model.num_layers),
            transition=layers("transition", model.num_layers - 1),
            coactivation=layers("coactivation", model.num_layers),
            token_expert=_read_rows("token_expert", tensors, model),
            sequence_expert=_read_rows("sequence_expert", tensors, model),
            provenance=provenance,
        )


def _read_rows(
    name: str, tensors: Mapping[str, IntArray], model: ModelSpec
) -> tuple[SparseCounts, ...] | None:
    if f"{name}.0.indptr" not in tensors:
        return None
    return tuple(
        SparseCounts(
            indptr=tensors[f"{name}.{n}.indptr"],
            indices=tensors[f"{name}.{n}.indices"],
            counts=tensors[f"{name}.{n}.counts"],
            num_columns=size,
        ).require_canonical()
        for n, size in enumerate(model.num_experts)
    )
