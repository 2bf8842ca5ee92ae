"""Using a token-shuffle table in a runtime: one file to take along.

It needs NumPy and safetensors only, and imports nothing of placer: copy it next to a router
or a model runner. :class:`ShuffleTable` reads the file that ``placer tables`` writes;
:class:`RequestRouter` sends requests to data-parallel ranks, in front of engines that take
the rank as a header (SGLang and vLLM, ``X-Data-Parallel-Rank``).

Legend of the shapes: L MoE layers, V token ids, R ranks, T tokens.
"""

import json
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

Array = npt.NDArray[Any]

#: Header that names the data-parallel rank of a request.
RANK_HEADER = "X-Data-Parallel-Rank"
_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShuffleTable:
    """The rows that say where tokens and requests should go.

    Attributes
    ----------
    num_ranks
        R.
    lookback
        Past layers whose majority ranks index ``history_rank``.
    token_rank, token_confidence
        ``[L, V]``: home of a token id, and how surely.
    history_rank, history_confidence
        ``[L, R^lookback]``: home after the majority ranks of past layers, and how surely.
    request_score
        ``[V, R]``: what a token of a prompt says for each rank.
    """

    num_ranks: int
    lookback: int
    token_rank: Array
    token_confidence: Array
    history_rank: Array
    history_confidence: Array
    request_score: Array

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read a table file.

        Raises
        ------
        ValueError
            If it is no table, or of another schema version.
        """
        with safe_open(path, "np") as opened:
            header = json.loads((opened.metadata() or {}).get("placer", "{}"))
            kind, version = header.get("kind"), header.get("schema_version")
            if (kind, version) != ("table", _SCHEMA_VERSION):
                raise ValueError(
                    f"{path} is {kind} of schema_version {version}, expected table of "
                    f"{_SCHEMA_VERSION}: placer tables PLAN TRACE --out {path}"
                )
            names = (
                "token_rank",
                "token_confidence",
                "history_rank",
                "history_confidence",
                "request_score",
            )
            return cls(
                num_ranks=header["num_ranks"],
                lookback=header["lookback"],
                **{name: opened.get_tensor(name) for name in names},
            )

    def homes(
        self, layer: int, token_ids: Array, history: Sequence[Array], fallback: Array
    ) -> tuple[Array, Array]:
        """Choose the home of every token in a layer: the surer of token and history.

        Parameters
        ----------
        layer
            MoE layer, from 0.
        token_ids
            ``[T]`` whole numbers; those outside 0..V-1 are unknown.
        history
            Majority ranks ``[T]`` of the past layers, the oldest first.
        fallback
            ``[T]``: home of an unknown token without history.

        Returns
        -------
        home, confidence
            ``[T]`` int64 and float32; the confidence of the fallback is -1.
        """
        known = (token_ids >= 0) & (token_ids < self.token_rank.shape[1])
        ids = np.where(known, token_ids, 0)
        home = np.where(known, self.token_rank[layer][ids], fallback).astype(np.int64)
        sure = self.token_confidence[layer][ids].astype(np.float32)
        sure = np.where(known, sure, np.float32(-1))
        if not 0 < self.lookback <= len(history):
            return home, sure
        index = np.zeros(len(home), dtype=np.int64)
        for ranks in history[-self.lookback :]:
            index = index * self.num_ranks + ranks
        by_history = self.history_confidence[layer][index].astype(np.float32)
        surer = by_history > sure
        return (
            np.where(surer, self.history_rank[layer][index], home),
            np.where(surer, by_history, sure),
        )


class RequestRouter:
    """Sends requests to the data-parallel rank that holds most of what they will need.

    A request goes to the rank with the best score over the first tokens of its prompt,
    among those that it would not load beyond the cap (of equally good ones to the least
    loaded), and stays there until it is finished.
    Safe to use from several threads.

    Parameters
    ----------
    request_score
        ``[V, R]``, of a :class:`ShuffleTable`.
    max_imbalance
        Cap on a rank's open prompt tokens over the mean, the new request included. The
        least loaded rank always may take one.
    prefix
        Tokens of the prompt that are looked at.

    Raises
    ------
    ValueError
        If ``max_imbalance`` is below 1 or ``prefix`` not positive.
    """

    def __init__(
        self, request_score: Array, *, max_imbalance: float = 1.1, prefix: int = 64
    ) -> None:
        if max_imbalance < 1 or prefix < 1:
            raise ValueError(
                "max_imbalance must be at least 1 and prefix positive, got "
                f"{max_imbalance} and {prefix}"
            )
        self._score = request_score
        self._max_imbalance = max_imbalance
        self._prefix = prefix
        self._load = np.zeros(request_score.shape[1], dtype=np.int64)
        self._open: dict[Hashable, tuple[int, int]] = {}
        self._lock = threading.Lock()

    @property
    def load(self) -> list[int]:
        """``[R]``: prompt tokens of the open requests of every rank."""
        with self._lock:
            loads: list[int] = self._load.tolist()
        return loads

    def route(self, request: Hashable, token_ids: Sequence[int]) -> int:
        """Return the rank of a request; of an open one, the rank that it has.

        Parameters
        ----------
        request
            What names the request, or the conversation that should stay together.
        token_ids
            Its prompt; ids that the table does not know count for nothing.
        """
        ids = np.asarray(token_ids, dtype=np.int64)[: self._prefix]
        ids = ids[(ids >= 0) & (ids < len(self._score))]
        score = self._score[ids].astype(np.float32).sum(axis=0)
        tokens = max(len(token_ids), 1)
        with self._lock:
            if request in self._open:
                return self._open[request][0]
            after = self._load + tokens
            cap = self._max_imbalance * (self._load.sum() + tokens) / len(after)
            allowed = (after <= cap) | (self._load == self._load.min())
            best = allowed & (score == score[allowed].max())
            rank = int(np.where(best, self._load, self._load.max() + 1).argmin())
            self._load[rank] += tokens
            self._open[request] = (rank, tokens)
        return rank

    def headers(self, request: Hashable, token_ids: Sequence[int]) -> dict[str, str]:
        """Return the header that sends a request to its rank."""
        return {RANK_HEADER: str(self.route(request, token_ids))}

    def finish(self, request: Hashable) -> None:
        """Forget a request that is done; one that is not open is no error."""
        with self._lock:
            rank, tokens = self._open.pop(request, (0, 0))
            self._load[rank] -= tokens
