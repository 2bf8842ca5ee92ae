"""The dummy tokens of an engine's warm-up, which a trace may hold among real ones.

Before they serve, engines run batches of made-up tokens, to size memory and to capture
graphs, and a logger of routing logs them too: thousands of tokens with the same experts in
all layers.
"""

import numpy as np
import numpy.typing as npt

from placer.arrays import BoolArray, HashArray
from placer.trace.hashing import expert_set_hash
from placer.trace.reader import Trace
from placer.trace.selection import EVERYTHING, Selection

# Real tokens next to each other hardly ever have the same experts in all layers: no two do
# in traces of gpt-oss-20b and DeepSeek-V2-Lite. Where a row holds few choices, some do.
_FEWEST_CHOICES = 16
_LONG_RUN, _LONG_RUN_OF_FEW_CHOICES = 16, 64
# Padding is between real tokens, one at a time. The most common real row is that of the
# first token of every sequence. Where a row holds few choices, common tokens share one.
_COMMON_SHARE = 0.05


def warm_up_tokens(
    rows: HashArray, sequence_ids: npt.NDArray[np.int32], num_choices: int
) -> BoolArray:
    """Return ``[T]``: whether a token repeats another as dummy tokens do.

    Parameters
    ----------
    rows
        ``[T]``: equal where tokens use the same experts in all layers.
    sequence_ids
        ``[T]``, non-decreasing.
    num_choices
        Experts that a token uses, over all layers.

    Returns
    -------
    numpy.ndarray
        The tokens of runs of 16 or more equal rows (64 of fewer than 16 choices), and all
        tokens of a row that more than 5 % of the tokens have (first tokens of sequences not
        counted; only of 16 choices or more). The first token of each row is none of them.
    """
    starts = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))
    lengths = np.diff(starts, append=len(rows))
    many = num_choices >= _FEWEST_CHOICES
    long = _LONG_RUN if many else _LONG_RUN_OF_FEW_CHOICES
    found: BoolArray = np.repeat(lengths >= long, lengths)
    if many:
        inside = rows[1:][sequence_ids[1:] == sequence_ids[:-1]]
        every, number = np.unique(inside, return_counts=True)
        common = number > max(_LONG_RUN, _COMMON_SHARE * len(rows))
        found |= np.isin(rows, every[common])
    repeated = np.flatnonzero(found)
    found[repeated[np.unique(rows[repeated], return_index=True)[1]]] = False
    return found


def warm_up_mask(trace: Trace, selection: Selection = EVERYTHING) -> BoolArray:
    """Return ``[T]`` for the tokens selected: whether each is :func:`warm_up_tokens`'s."""
    rows, sequence_ids = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
    for chunk in trace.chunks(selection):
        rows.append(expert_set_hash(chunk))
        sequence_ids.append(chunk.sequence_ids)
    num_choices = trace.model.num_layers * trace.model.top_k
    return warm_up_tokens(np.concatenate(rows), np.concatenate(sequence_ids), num_choices)
