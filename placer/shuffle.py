"""Using a token-shuffle table in a runtime: this file needs only NumPy.

It needs NumPy and safetensors only, and imports nothing of placer: copy it next to a router
or a model runner. :class:`ShuffleTable` reads the file that ``placer tables`` writes;
:class:`RequestRouter` sends requests to data-parallel ranks, in front of engines that take
the rank as a header (SGLang and vLLM, ``X-Data-Parallel-Rank``).

Legend of the shapes: L MoE layers, V token ids, R ranks, T tokens, k experts per token, E
experts.
"""

import hashlib
import json
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

Array = npt.NDArray[Any]

#: Header that names the data-parallel rank of a request.
RANK_HEADER = "X-Data-Parallel-Rank"
# Both hold the same tensors.
_SCHEMA_VERSIONS = (1, 2)
# Rank and confidence in one number, so that a row is one access to memory.
_RANK_WIDTH = 16
_RANK_BITS = (1 << _RANK_WIDTH) - 1
_CONFIDENCE_SHIFT = _RANK_WIDTH + 1
_BITS_OF_ONE = 0x3C00  # of 1.0 in float16
_BITS_BUT_SIGN = 0x7FFF
_BYTE = 256  # numbers in a byte


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CombinedRule:
    """The combined rule: what a token and its past experts add to a home's expected rate.

    Attributes
    ----------
    token_weight
        ``[L]`` float32: by it a row of ``token_score`` is multiplied.
    unknown_score
        ``[L, R]`` float16: stands in for that row where a token has none.
    combined_bias
        ``[L, R]`` float32: added for every token.
    expert_score
        ``[L, G, E, R]`` float16: added for every expert that the router chose 1, 2, ...
        G layers before. Where there is no such layer, or expert, zeros.
    home_price
        ``[L, R]`` float32: subtracted where a home is chosen, so that homes are even.
    """

    token_weight: Array
    unknown_score: Array
    combined_bias: Array
    expert_score: Array
    home_price: Array

    def scores(
        self, layer: int, token_score: Array, token_ids: Array, past: Sequence[Array]
    ) -> Array:
        """Return ``[T, R]`` float32: the expected local activation rate of every home.

        Parameters
        ----------
        layer
            MoE layer, from 0.
        token_score
            ``[V, R]``: the table's rates of every home in this layer.
        token_ids
            ``[T]`` whole numbers; those outside 0..V-1 are unknown.
        past
            ``[k, T]`` logical experts of each past layer, the oldest first.
        """
        rows = _widened(token_score.take(token_ids, axis=0, mode="clip"))
        unknown = (token_ids < 0) | (token_ids >= len(token_score))
        if unknown.any():
            rows[unknown] = self.unknown_score[layer]
        return combined_scores(
            rows,
            self.token_weight[layer],
            self.combined_bias[layer],
            self.expert_score[layer],
            past,
        )

    def homes(self, layer: int, scores: Array) -> tuple[Array, Array]:
        """Return ``[T]`` homes, int64, of the best score at the prices, and their scores.

        ``scores`` is ``[T, R]``; of equal homes the lowest is taken.
        """
        # A rank of all tokens after the other: each step runs along memory.
        worth = np.ascontiguousarray(scores.T)
        worth = worth - self.home_price[layer][:, None]
        num_ranks, num_tokens = worth.shape
        # Of the best ranks the lowest has the greatest mark.
        marks = np.arange(num_ranks, 0, -1, dtype=np.min_scalar_type(num_ranks))
        best = (worth == worth.max(axis=0)) * marks[:, None]
        home = num_ranks - best.max(axis=0).astype(np.int64)
        return home, scores.ravel().take(home + np.arange(num_tokens) * num_ranks)


def combined_scores(
    token_rows: Array,
    token_weight: np.float32,
    bias: Array,
    expert_score: Array,
    past: Sequence[Array],
) -> Array:
    """Return ``[T, R]`` float32: the sum of :class:`CombinedRule` in one layer.

    Parameters
    ----------
    token_rows
        ``[T, R]``.
    token_weight, bias, expert_score
        A number, ``[R]`` and ``[G, E, R]``.
    past
        ``[k, T]`` logical experts of each past layer, the oldest first.
    """
    # Rows of the bias, since to add a short row to each of many is slow.
    total: Array = np.repeat(bias[None], len(token_rows), axis=0)
    total += token_rows.astype(np.float32, copy=False) * token_weight
    for added, experts in zip(expert_score, reversed(past), strict=False):
        _add_experts(total, added.astype(np.float32), experts)
    return total


def _add_experts(total: Array, added: Array, experts: Array) -> None:
    """Add to ``[T, R]`` the rows ``[E, R]`` of experts ``[k, T]``, two experts at a time.

    No matrix product: a sum must not depend on the token's batch. Where the tokens are
    many, the sums of all pairs are made first, and each token looks up half as many rows;
    the numbers are the same.
    """
    num_experts, num_ranks = added.shape
    if experts.size and not 0 <= experts.min() <= experts.max() < num_experts:
        raise IndexError(f"an expert id is outside 0..{num_experts - 1}")
    row = np.empty_like(total)

    def take(rows: Array, index: Array) -> Array:
        # The ids are in range; to have them checked again would take a copy.
        return rows.take(index, axis=0, out=row, mode="wrap")

    even = len(experts) // 2 * 2
    if num_experts <= _BYTE and even * len(total) >= 2 * num_experts**2:
        pairs = np.empty((num_experts, _BYTE * num_ranks), dtype=np.float32)
        firsts = np.repeat(added, num_experts, axis=0).reshape(num_experts, -1)
        np.add(firsts, added.ravel(), out=pairs[:, : added.size])
        # Two ids of one byte each, read as one number, are the index of their pair.
        both = experts[:even].T.astype(np.uint8, order="C", copy=False).view(np.uint16)
        for pair in both.T.astype(np.intp, order="C"):
            total += take(pairs.reshape(-1, num_ranks), pair)
    else:
        for first, second in zip(experts[:even:2], experts[1:even:2], strict=True):
            total += take(added, first) + added.take(second, axis=0)
    for chosen in experts[even:]:
        total += take(added, chosen)


def _widened(rates: Array) -> Array:
    """Return float16 from 0 to 1 as float32, in a fraction of the time of ``astype``.

    The bits move to where float32 has them; its exponent counts from -127, that of float16
    from -15.
    """
    bits = (rates.view(np.uint16) & _BITS_BUT_SIGN).astype(np.uint32)
    bits <<= 13
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    return wide


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShuffleTable:
    """The rows that give homes to tokens and requests.

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
    expert_rank
        ``[L, E]``: rank of each expert's first replica.
    token_score
        ``[L, V, R]``: rate of every home, read only for the combined rule.
    combined
        The combined rule, or ``None`` where the file has none.
    """

    num_ranks: int
    lookback: int
    token_rank: Array
    token_confidence: Array
    history_rank: Array
    history_confidence: Array
    request_score: Array
    expert_rank: Array
    token_score: Array | None = None
    combined: CombinedRule | None = None
    _token: Array = field(init=False, repr=False)
    _history: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # A tie goes to the token: its rows have a bit more.
        for name, source, bit in (("_token", "token", 1), ("_history", "history", 0)):
            rank, sure = (getattr(self, f"{source}_{of}") for of in ("rank", "confidence"))
            object.__setattr__(self, name, _packed(rank, sure, bit))
        if self.token_score is not None:
            _rate_bits(self.token_score)

    @classmethod
    def read(cls, path: Path | str, tokenizer: Path | str | None = None) -> Self:
        """Read a table file; ``tokenizer`` is the ``tokenizer.json`` that will be served.

        Raises
        ------
        ValueError
            If it is not a table, of another schema version or tokenizer, or damaged.
        """
        try:
            return cls._read(path, tokenizer)
        except (
            SafetensorError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ValueError(
                f"{path} is not a table ({error}): placer tables PLAN TRACE --out TABLE"
            ) from error

    @classmethod
    def _read(cls, path: Path | str, tokenizer: Path | str | None) -> Self:
        if not Path(path).is_file():
            raise ValueError(f"{path} is not a file")
        with safe_open(path, "np") as opened:
            header = json.loads((opened.metadata() or {}).get("placer", "{}"))
            kind, version = header.get("kind"), header.get("schema_version")
            if kind != "table" or version not in _SCHEMA_VERSIONS:
                raise ValueError(
                    f"{path} is {kind} of schema_version {version}, expected table of "
                    f"1 or 2: placer tables PLAN TRACE --out TABLE"
                )
            if tokenizer is not None and (stated := header["tokenizer_sha256"]) is not None:
                found = hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
                if stated != found:
                    raise ValueError(f"{path} is of tokenizer {stated}, not {found}")
            names: tuple[str, ...] = (
                "token_rank",
                "token_confidence",
                "history_rank",
                "history_confidence",
                "request_score",
                "expert_rank",
            )
            rule = None
            if "expert_score" in set(opened.keys()):
                names += ("token_score",)
                rule = CombinedRule(
                    **{
                        one.name: opened.get_tensor(one.name)
                        for one in fields(CombinedRule)
                    }
                )
            return cls(
                num_ranks=header["num_ranks"],
                lookback=header["lookback"],
                combined=rule,
                **{name: opened.get_tensor(name) for name in names},
            )

    def homes(
        self, layer: int, token_ids: Array, history: Sequence[Array], fallback: Array
    ) -> tuple[Array, Array]:
        """Choose each token's home in a layer: by token or history, the more certain one.

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
        token = self._token[layer]
        if token_ids.min(initial=0) < 0 or token_ids.max(initial=0) >= len(token):
            known = (token_ids >= 0) & (token_ids < len(token))
            best = np.where(known, token.take(np.where(known, token_ids, 0)), -1)
        else:
            best = token.take(token_ids)
        if 0 < self.lookback <= len(history):
            index = history[-self.lookback].astype(np.intp)
            for ranks in history[len(history) - self.lookback + 1 :]:
                index *= self.num_ranks
                index += ranks
            best = np.maximum(best, self._history[layer].take(index))
        home = (best & _RANK_BITS).astype(np.int64)
        sure = (best >> _CONFIDENCE_SHIFT).astype(np.int16).view(np.float16)
        sure = sure.astype(np.float32)
        if best.min(initial=0) < 0:
            home = np.where(best < 0, fallback, home)
            sure = np.where(best < 0, np.float32(-1), sure)
        return home, sure

    def combined_homes(
        self,
        layer: int,
        token_ids: Array,
        past_experts: Sequence[Array],
        fallback: Array,
    ) -> tuple[Array, Array]:
        """Choose the home of every token in a layer by the combined rule.

        The first layer has no past: there it is :meth:`homes`.

        Parameters
        ----------
        layer
            MoE layer, from 0.
        token_ids
            ``[T]`` whole numbers; those outside 0..V-1 are unknown.
        past_experts
            ``[T, k]`` logical experts of the past layers, the oldest first; those of the
            last G layers count.
        fallback
            ``[T]``: home of an unknown token in the first layer.

        Returns
        -------
        home, confidence
            ``[T]`` int64 and float32; the confidence of the fallback is -1.

        Raises
        ------
        ValueError
            If the file has no combined rule.
        """
        if self.combined is None or self.token_score is None:
            raise ValueError(
                "the table has no combined rule: placer tables PLAN TRACE --combined "
                "--out TABLE"
            )
        if layer == 0:
            return self.homes(layer, token_ids, [], fallback)
        past = [one.T for one in past_experts]
        scores = self.combined.scores(layer, self.token_score[layer], token_ids, past)
        return self.combined.homes(layer, scores)

    def majority_ranks(self, layer: int, experts: Array) -> Array:
        """Return the ranks that serve most of the tokens' experts: the next history.

        Parameters
        ----------
        layer
            MoE layer, from 0.
        experts
            ``[T, k]``: the router's choice, by descending weight. Of several copies of an
            expert the first one counts.

        Returns
        -------
        ndarray
            ``[T]``; of ranks that serve equally many, the one that the router lists first.
        """
        # One choice of all tokens after the other: each step runs along memory.
        ranks: Array = self.expert_rank[layer][np.ascontiguousarray(experts.T)]
        best: Array = ranks[0]
        most = (ranks == best).sum(axis=0, dtype=np.uint8)
        for rank in ranks[1:]:
            times = (ranks == rank).sum(axis=0, dtype=np.uint8)
            best = np.where(times > most, rank, best)
            most = np.maximum(times, most)
        return best


def _packed(rank: Array, confidence: Array, bit: int) -> Array:
    """Return int32 of which the greater is the surer: confidence, bit, rank.

    The bits of float16 from 0 to 1, read as a whole number, are in the same order.

    Raises
    ------
    ValueError
        If a confidence is none of those.
    """
    bits = _rate_bits(confidence).astype(np.int32)
    return bits << _CONFIDENCE_SHIFT | bit << _RANK_WIDTH | rank


def _rate_bits(rates: Array) -> Array:
    """Return the bits of float16 as int16; refuse values outside 0..1."""
    bits: Array = np.ascontiguousarray(rates).view(np.int16)
    if bits.min(initial=0) < 0 or bits.max(initial=0) > _BITS_OF_ONE:
        raise ValueError("the table holds a rate outside 0..1: write it again")
    return bits


class RequestRouter:
    """Sends requests to the data-parallel rank with most of the experts that they will use.

    Only ranks that the request would not load beyond the cap are possible. Of these, the
    request goes to the rank with the best score over the first tokens of its prompt (of
    equally good ones, to the least loaded), and stays there. Safe with several threads.

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
        """Forget a request that is done; one that is not open is not an error."""
        with self._lock:
            rank, tokens = self._open.pop(request, (0, 0))
            self._load[rank] -= tokens
