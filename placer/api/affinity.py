"""Counts of a trace, as the API shows them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from placer.affinity import Affinity as Counts
from placer.affinity.from_traces import merged_affinity
from placer.api.files import (
    AnyPath,
    UsedFile,
    require_unchanged,
    temporary_file,
    warn,
    writing,
)
from placer.api.shown import Shape, Shown, layers_of, model_name, model_words
from placer.arrays import IntArray
from placer.model import ModelSpec
from placer.run.files import sha256_file
from placer.run.verdict import Verdict

if TYPE_CHECKING:
    from pandas import DataFrame

    from placer.api.exporting import Exported


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Affinity(Shown):
    """Exact counts: loads of experts, and which experts are used together.

    :meth:`placer.Trace.affinity` counts them; :func:`placer.open` reads a file.

    Attributes
    ----------
    contents
        What the rest of placer works with; not part of the stable API.
    path
        The file that it was read from, or ``None``.
    sha256
        SHA-256 of that file, or ``None``.
    """

    contents: Counts
    path: Path | None = None
    sha256: str | None = None

    @classmethod
    def read(cls, path: AnyPath) -> Self:
        """Read an affinity file.

        Raises
        ------
        PlacerError
            If it is none, or is damaged.
        """
        file = Path(path)
        return cls(Counts.read(file), file, sha256_file(file))

    @property
    def model(self) -> ModelSpec:
        """The model whose router was recorded."""
        return self.contents.model

    @property
    def num_tokens(self) -> int | None:
        """Tokens that were counted; ``None`` of loads alone without a known top-k."""
        return self.contents.known_tokens

    @property
    def layers(self) -> tuple[int, ...]:
        """``[L]``: the model's own number of each MoE layer; 0 to L-1 where unknown."""
        return layers_of(self.model)

    @property
    def load(self) -> tuple[IntArray, ...]:
        """L arrays ``[E]`` int64: (token, expert) pairs of each expert."""
        return self.contents.load

    @property
    def transition(self) -> tuple[IntArray, ...]:
        """L-1 arrays ``[E, E]`` int64: pairs of experts in neighbouring layers.

        Empty where only loads are known.
        """
        return self.contents.transition

    @property
    def coactivation(self) -> tuple[IntArray, ...]:
        """L arrays ``[E, E]`` int64, symmetric: tokens that use both experts.

        Empty where only loads are known.
        """
        return self.contents.coactivation

    @property
    def verdict(self) -> Verdict:
        """What was counted, and the question that it can answer."""
        from placer.report.verdicts import verdict_of_affinity

        return verdict_of_affinity(self.contents, self.path or Path("AFFINITY"))

    @property
    def facts(self) -> dict[str, Any]:
        """The JSON object of ``placer affinity --json``, without its verdict."""
        counts = self.contents
        return {
            "out": None if self.path is None else str(self.path),
            "num_tokens": counts.num_tokens,
            "num_layers": counts.model.num_layers,
            "num_experts": list(counts.model.num_experts),
            "top_k": counts.model.top_k,
            "transition_pairs": int(sum(pairs.sum() for pairs in counts.transition)),
            "coactivated_pairs": int(sum(pairs.sum() for pairs in counts.coactivation))
            // 2,
            "token_rows": counts.token_expert is not None,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that ``placer affinity --json`` prints."""
        return {"verdict": self.verdict.to_json()} | self.facts

    def to_frame(self) -> "DataFrame":
        """Return one row for each MoE layer and expert.

        Columns: ``layer`` (from 0), ``model_layer`` (the model's own number), ``expert``,
        ``load`` (pairs), ``share`` of the layer's load, ``over_mean`` (load over the mean).
        """
        from pandas import DataFrame

        sizes = self.model.num_experts
        load = np.concatenate(self.load)
        layer = np.repeat(np.arange(len(sizes)), sizes)
        share = load / np.maximum([one.sum() for one in self.load], 1)[layer]
        return DataFrame(
            {
                "layer": layer,
                "model_layer": np.repeat(self.layers, sizes),
                "expert": np.concatenate([np.arange(size) for size in sizes]),
                "load": load,
                "share": share,
                "over_mean": share * np.asarray(sizes)[layer],
            }
        )

    def graph(self, layer: int | None = None, *, least: int = 1) -> Any:
        """Return a graph of networkx: links between layers, or inside one layer.

        Nodes are ``(layer, expert)``, both from 0, with their ``load``.

        Parameters
        ----------
        layer
            ``None``: a ``DiGraph`` from each expert to those of the next layer; edges have
            ``weight`` (pairs), ``probability`` (of the next expert) and ``lift`` (over
            chance). A layer, from 0: a ``Graph`` of its co-activation; edges have
            ``weight`` (tokens that use both experts) and ``lift``.
        least
            Edges of fewer pairs are left out. A model of 256 experts has 65,536 edges
            between two layers.

        Raises
        ------
        PlacerError
            If only loads are known.
        UsageError
            If there is no such layer, or ``least`` is not positive.

        Examples
        --------
        >>> import placer
        >>> counts = placer.open("traces/gpt-oss-20b").affinity()
        >>> counts.graph()
        <networkx.classes.digraph.DiGraph object at 0x...>
        >>> counts.graph(3).number_of_nodes()
        32
        """
        from placer.affinity.graph import affinity_graph

        return affinity_graph(self.contents, layer, least)

    def write_graphml(
        self,
        path: AnyPath,
        layer: int | None = None,
        *,
        least: int = 1,
        force: bool = False,
    ) -> None:
        """Write :meth:`graph` as GraphML, for Gephi and the like; nodes: ``layer.expert``.

        Raises
        ------
        PlacerError
            As :meth:`graph`, or if the file exists and ``force`` is false.
        """
        from placer.affinity.graph import write_graphml

        with writing(Path(path), [self.path], force=force, kinds=()):
            write_graphml(self.graph(layer, least=least), Path(path))

    def export(self, model: AnyPath, out: AnyPath, *, force: bool = False) -> "Exported":
        """Write the counts for KTransformers, as ``placer export ktransformers`` does.

        Parameters
        ----------
        model
            The model: a Hugging Face directory.
        out
            The ``.pt`` file to write.
        force
            Whether an earlier file is replaced.

        Raises
        ------
        PlacerError
            If counts and model differ, or ``out`` exists and ``force`` is false.
        """
        from placer.api.exporting import export_file
        from placer.target.map_formats import COUNTS

        with self.as_file() as file:
            return export_file(COUNTS, file, model, out, force=force)

    def write(self, path: AnyPath, *, force: bool = False) -> Self:
        """Write an affinity file: the same counts give the same bytes.

        Returns
        -------
        Affinity
            The same counts, which have a path now.

        Raises
        ------
        PlacerError
            If the file exists and ``force`` is false.
        """
        file = Path(path)
        with writing(file, force=force, kinds=["affinity"]):
            self.contents.write(file)
        return replace(self, path=file, sha256=sha256_file(file))

    @contextmanager
    def as_file(self) -> Iterator[UsedFile]:
        """Yield its file, or a temporary one.

        Raises
        ------
        PlacerError
            If the file changed after it was opened.
        """
        if self.path is not None and self.sha256 is not None:
            require_unchanged(self.path, self.sha256)
            yield UsedFile(self.path)
            return
        with temporary_file("a.safetensors", self.contents.write, "AFFINITY") as file:
            yield file

    def _shape(self) -> Shape:
        tokens = self.num_tokens
        return Shape(
            title=f"Affinity of {model_name(self.model)}",
            facts={
                "path": self.path,
                "routing": model_words(self.model),
                "tokens": None if tokens is None else f"{tokens:,}",
                "fold": self.contents.provenance.get("fold"),
                "phase": self.contents.provenance.get("phase"),
                "holds": "loads, co-activation, transitions"
                if self.contents.has_links
                else "only loads",
            },
        )


def merge_affinities(paths: Sequence[AnyPath]) -> Affinity:
    """Add up affinity files, such as those of several machines.

    Raises
    ------
    PlacerError
        If one is damaged, or they are of different models.
    UsageError
        If two are the same file.
    """
    return Affinity(merged_affinity([Path(path) for path in paths], warn))
