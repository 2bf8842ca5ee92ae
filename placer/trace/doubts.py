"""Warnings about a trace whose figures may be wrong: at import, in advice and in plans."""

import shlex
from collections.abc import Iterator

import numpy as np

from placer.trace.reader import Trace
from placer.trace.selection import EVERYTHING, Selection
from placer.trace.warm_up import warm_up_mask

UNORDERED = (
    "the trace lists the experts of a token by id, not by router weight, so the top-1 "
    "expert is unknown"
)


def doubts(trace: Trace, selection: Selection = EVERYTHING) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong with the tokens selected."""
    found = warm_up_mask(trace, selection)
    if found.any():
        share = found.mean()
        yield (
            f"{int(found.sum()):,} of {len(found):,} tokens ({share:.1%}) repeat the "
            "experts of another token in all layers, like dummy tokens of an engine's "
            "warm-up and padding. Dummy tokens are not real traffic and distort every "
            f"figure. Remove them: placer trace dedup {shlex.quote(str(trace.directory))} "
            "--no-prefixes --no-rows --out CLEANED"
        )
    if trace.model.top_k == 1:
        yield from _unused_routers(trace, selection)


def _unused_routers(trace: Trace, selection: Selection) -> Iterator[str]:
    """Name layers of a top-1 model that send every token to one expert."""
    seen: list[set[int]] = [set() for _ in trace.model.num_experts]
    for chunk in trace.chunks(selection):
        for layer, ids in enumerate(chunk.experts):
            seen[layer].update(np.unique(ids).tolist())
    layers: dict[int, list[str]] = {}
    for layer, (size, used) in enumerate(zip(trace.model.num_experts, seen, strict=True)):
        if size > 1 and len(used) == 1:
            layers.setdefault(used.pop(), []).append(str(layer))
    for expert, alike in sorted(layers.items()):
        why = "the router is stuck, or the layers were not captured"
        if expert == 0:
            why = (
                "as in dense layers and layers that were not captured. If they are "
                "dense, import the file again with --model DIR (a folder with its "
                "config.json is enough)"
            )
        yield f"every token goes to expert {expert} in MoE layers {', '.join(alike)}: {why}"


def doubtful_follow(trace: Trace, policy: str) -> Iterator[str]:
    """Return a warning on homes of ``follow`` if the router's order is unknown."""
    if policy == "follow" and not trace.header.experts_by_weight:
        yield f"{UNORDERED}: under follow, ties between ranks go to the smallest id"
