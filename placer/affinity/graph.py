"""Affinity as a graph of networkx: experts that tokens use one after another, or together.

Graphs are for looking, exporting and finding communities; the solver does not use them.
"""

from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from placer.affinity.affinity import Affinity
from placer.affinity.information import conditional_probability
from placer.arrays import FloatArray, IntArray
from placer.errors import PlacerError, UsageError
from placer.run.writing import atomic_file


def affinity_graph(affinity: Affinity, layer: int | None = None, least: int = 1) -> Any:
    """Return the links between neighbouring layers, or those inside one layer.

    Parameters
    ----------
    affinity
        The counts.
    layer
        An MoE layer, from 0: then the graph is of its co-activation. ``None``: the links
        between all neighbouring layers.
    least
        Edges of fewer pairs are left out.

    Returns
    -------
    networkx.DiGraph or networkx.Graph
        Nodes ``(layer, expert)``, both from 0, with ``layer``, ``expert`` and ``load``.
        Edges have ``weight`` and ``lift``. Between layers, ``weight`` is pairs of an expert
        and one of the next layer, and ``probability`` is P(next | expert). Inside a layer,
        ``weight`` is tokens that use both. ``lift`` is ``weight`` over what independent
        choices with the same totals have.

    Raises
    ------
    PlacerError
        If only loads were counted.
    UsageError
        If there is no such layer, or ``least`` is not positive.
    """
    num_layers = affinity.model.num_layers
    if not affinity.has_links:
        raise PlacerError(
            "the affinity holds only loads, no pairs of experts",
            "count a trace: placer affinity TRACE --out AFFINITY",
        )
    if least < 1:
        raise UsageError(f"an edge needs at least 1 pair, got {least}")
    if layer is None:
        graph = nx.DiGraph()
        for n in range(num_layers):
            _add_experts(graph, affinity, n)
        for n, pairs in enumerate(affinity.transition):
            probability = conditional_probability(pairs)
            lift = _lift(pairs)
            for i, j in zip(*np.nonzero(pairs >= least), strict=True):
                graph.add_edge(
                    (n, int(i)),
                    (n + 1, int(j)),
                    weight=int(pairs[i, j]),
                    probability=float(probability[i, j]),
                    lift=float(lift[i, j]),
                )
        return graph
    if not 0 <= layer < num_layers:
        raise UsageError(
            f"there is no MoE layer {layer}", f"choose one of 0 to {num_layers - 1}"
        )
    graph = nx.Graph()
    _add_experts(graph, affinity, layer)
    pairs = affinity.coactivation[layer]
    lift = _lift(pairs)
    for i, j in zip(*np.nonzero(np.triu(pairs) >= least), strict=True):
        graph.add_edge(
            (layer, int(i)),
            (layer, int(j)),
            weight=int(pairs[i, j]),
            lift=float(lift[i, j]),
        )
    return graph


def write_graphml(graph: Any, path: Path) -> None:
    """Write a graph as GraphML, the same graph as the same bytes.

    A node is named ``layer.expert``.
    """
    named = nx.relabel_nodes(graph, lambda node: f"{node[0]}.{node[1]}")
    with atomic_file(path) as temporary:
        nx.write_graphml_xml(named, temporary)


def _add_experts(graph: Any, affinity: Affinity, layer: int) -> None:
    for expert, load in enumerate(affinity.load[layer]):
        graph.add_node((layer, expert), layer=layer, expert=expert, load=int(load))


def _lift(pairs: IntArray) -> FloatArray:
    """Return pairs over what their row and column would have by chance; 0 where unused."""
    chance = np.outer(pairs.sum(axis=1), pairs.sum(axis=0)) / max(int(pairs.sum()), 1)
    lift = np.zeros(pairs.shape)
    np.divide(pairs, chance, out=lift, where=chance > 0)
    return lift
