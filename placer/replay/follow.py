"""ExFlow's context-coherent expert parallelism, on the layers of a transformers model.

A token stays where its experts are. In every layer its hidden state goes from its home to
the ranks that serve it; the one of them that serves most is its next home, where the others
send their sums: with one expert per token nothing returns, so that a layer has a single
exchange (ExFlow, arXiv 2401.08383). So that attention can be computed anywhere, every
layer's new keys and values go to all ranks.

It is no ``EPImplementation``: those give a token back to the rank that brought it. Here the
layers' own modules are called on the tokens that are at home, and only the way between them
is replaced. What is sent is the hidden state before the MoE block's norm, which each rank
applies locally.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from placer.errors import PlacerError
from placer.replay.exchanges import (
    added_up,
    exchange_sizes,
    packed,
    run_experts,
    send_rows,
    unpacked,
    visits,
)
from placer.replay.kinds import FOLLOW
from placer.replay.sharding import ExpertsModule
from placer.replay.traffic import Part, TrafficCounter
from placer.serving.layer_serving import majority_rank
from placer.trace.capture import by_descending_weight

Tensor = torch.Tensor

_CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm")
#: Called for each MoE layer with its number, places [n] of tokens, logical ids and
#: weights [n, k].
Watch = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(slots=True, kw_only=True, eq=False)
class _Tokens:
    """The tokens at home on this rank.

    Attributes
    ----------
    place
        ``[n]`` int64, ascending: token ``b * S + s`` of the batch ``[B, S]``.
    hidden
        ``[n, H]``.
    """

    place: Tensor
    hidden: Tensor


class FollowRun:
    """Runs the decoder layers of a model with tokens that move to their experts.

    Every rank calls the model with the whole batch; in its output only the tokens whose
    last home is this rank are right: those of :attr:`place`.

    Parameters
    ----------
    model
        A transformers model; its experts modules hold this rank's slots.
    experts
        The experts of every MoE layer.
    slot_rank
        For each MoE layer ``[E]``: the rank of a logical expert.
    local_slot
        For each MoE layer ``[E]``: an expert's place among those of its rank.
    group
        The ranks.
    counter
        Called with which part of which layer is sent, or ``None``.
    watch
        Called with what the routers chose.

    Raises
    ------
    PlacerError
        If :func:`why_not_follow` says so.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: Sequence[ExpertsModule],
        *,
        slot_rank: Sequence[Tensor],
        local_slot: Sequence[Tensor],
        group: dist.ProcessGroup,
        counter: TrafficCounter | None,
        watch: Watch,
    ) -> None:
        self.model: Any = model
        self.group = group
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.counter, self.watch = counter, watch
        self.slot_rank, self.local_slot = slot_rank, local_slot
        reason = why_not_follow(model, experts)
        if reason is not None:
            raise PlacerError(
                f"tokens of {type(model).__name__} cannot move to their experts: {reason}",
                "replay the other exchanges: --exchange placer-dedup",
            )
        self.layers, self.block = _layers(model, experts)
        self.experts = {
            int(one.path.split(".layers.")[1].split(".")[0]): one for one in experts
        }
        self.tokens: _Tokens | None = None
        self.attention_layer = 0

    @property
    def place(self) -> Tensor:
        """Return ``[n]`` int64: the tokens whose last home is this rank, by place."""
        return (
            torch.empty(0, dtype=torch.long) if self.tokens is None else self.tokens.place
        )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the forward of every decoder layer for the block."""
        before = self.model.config._attn_implementation
        with ExitStack() as stack:
            for interface, function in (
                (AttentionInterface, self._attention),
                (AttentionMaskInterface, eager_mask),
            ):
                interface.register(FOLLOW, function)
                # There is no public way to take it back, and it would keep the model.
                stack.callback(interface._global_mapping.pop, FOLLOW)
            stack.callback(self.model.set_attn_implementation, before)
            self.model.set_attn_implementation(FOLLOW)
            for number, layer in enumerate(self.layers):
                stack.callback(setattr, layer, "forward", layer.forward)
                layer.forward = self._layer_forward(number)
            yield

    def _layer_forward(self, number: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *_: Any, **named: Any) -> Tensor:
            rows = hidden_states.reshape(-1, hidden_states.shape[-1])
            if number == 0:
                self.tokens = self._begin(hidden_states, rows)
            tokens = self.tokens
            if tokens is None:
                raise PlacerError("the layers of the model were not called in order")
            self._attend(number, tokens, hidden_states.shape, named)
            if number in self.experts:
                self.tokens = tokens = self._serve(number, tokens)
            elif len(tokens.place):
                layer = self.layers[number]
                normed = layer.post_attention_layernorm(tokens.hidden)[None]
                tokens.hidden = (
                    tokens.hidden + _first(getattr(layer, self.block)(normed))[0]
                )
            if number + 1 < len(self.layers):
                return hidden_states
            result = torch.zeros_like(rows)
            result[tokens.place] = tokens.hidden
            return result.reshape(hidden_states.shape)

        return forward

    def _begin(self, hidden: Tensor, rows: Tensor) -> _Tokens:
        """Take the sequences of this rank: every R-th of the batch."""
        sequence = torch.arange(len(rows), device=rows.device) // hidden.shape[1]
        place = torch.nonzero(sequence % self.num_ranks == self.rank).flatten()
        return _Tokens(place=place, hidden=rows[place])

    def _attend(
        self, number: int, tokens: _Tokens, shape: torch.Size, named: dict[str, Any]
    ) -> None:
        """Compute attention for the tokens at home, over the keys of all."""
        layer = self.layers[number]
        place = _at_least_one(tokens.place)
        given = dict(named)
        given["position_embeddings"] = _taken(
            named.get("position_embeddings"), place, shape
        )
        given["past_key_values"] = None
        self.attention_layer, self.shape = number, shape
        normed = layer.input_layernorm(_at_least_one(tokens.hidden))[None]
        attended = _first(layer.self_attn(hidden_states=normed, **given))[0]
        tokens.hidden = tokens.hidden + attended[: len(tokens.place)]

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        **named: Any,
    ) -> tuple[Tensor, None]:
        """Attend from the tokens at home, ``[1, heads, n, d]``, to those of all ranks."""
        tokens, (batch, length) = self.tokens, self.shape[:2]
        if tokens is None:
            raise PlacerError("attention was called outside the layers of the model")
        number = len(tokens.place)
        keys, values = self._all_keys(
            tokens.place, key[:, :, :number], value[:, :, :number]
        )
        if not number:
            return query.new_zeros(1, 1, query.shape[1], value.shape[-1]), None
        sequence, position = tokens.place // length, tokens.place % length
        counts = torch.bincount(sequence, minlength=batch)
        first = torch.cumsum(counts, 0) - counts
        turn = torch.arange(len(sequence), device=sequence.device) - first[sequence]
        width = int(counts.max())
        queries = query.new_zeros(batch, width, *query.shape[1::2])
        queries[sequence, turn] = query[0].transpose(0, 1)
        mask = attention_mask.new_zeros(batch, 1, width, attention_mask.shape[-1])
        whole = attention_mask.expand(batch, -1, -1, -1)
        mask[sequence, 0, turn] = whole[sequence, 0, position]
        eager = sys.modules[type(module).__module__].eager_attention_forward
        found = eager(module, queries.transpose(1, 2), keys, values, mask, **named)[0]
        return found[sequence, turn][None], None

    def _all_keys(self, place: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Send this rank's keys and values to all; return ``[B, heads, S, d]`` of all."""
        heads, key_size = key.shape[1], key.shape[-1]
        rows = torch.cat([key[0], value[0]], dim=-1).transpose(0, 1)
        sizes = torch.full((self.num_ranks,), len(place), device=place.device)
        everywhere = [len(place)] * self.num_ranks
        repeated = rows.flatten(1).repeat(self.num_ranks, 1)
        moe_layer = self._moe_layer_from(self.attention_layer)
        with self._counted(moe_layer, "dispatch"):
            received = exchange_sizes(sizes, self.group)
            told = place.repeat(self.num_ranks)
            places = send_rows(told, everywhere, received, self.group)
        with self._counted(moe_layer, "keys_and_values"):
            came = send_rows(repeated, everywhere, received, self.group)
        batch, length = self.shape[:2]
        every = came.new_empty(batch * length, heads, rows.shape[-1])
        every[places] = came.view(len(came), heads, rows.shape[-1])
        shaped = every.reshape(batch, length, heads, -1).transpose(1, 2)
        return shaped[..., :key_size], shaped[..., key_size:]

    def _serve(self, number: int, tokens: _Tokens) -> _Tokens:
        """Take the tokens to their experts, and home where most of those are."""
        layer, experts = self.layers[number], self.experts[number]
        ids, weights = self._route(number, tokens)
        self.watch(experts.layer, tokens.place, ids, weights)
        ranks = self.slot_rank[experts.layer][ids]
        next_home = torch.from_numpy(majority_rank(ranks.T.cpu().numpy())).to(ranks)
        rank, row = visits(ranks, self.num_ranks)
        numbers = torch.cat([tokens.place[:, None], next_home[:, None], ids], dim=1)
        told = packed(numbers[row], weights[row])
        sizes = torch.bincount(rank, minlength=self.num_ranks)
        hidden, told = self._send(
            experts.layer, "dispatch", tokens.hidden[row], told, sizes
        )
        numbers, shares = unpacked(told, weights)
        place, home = numbers[:, 0], numbers[:, 1]
        sums = self._sums(number, hidden, numbers[:, 2:], shares)
        here = torch.nonzero(home == self.rank).flatten()
        here = here[place[here].argsort()]
        total = sums[here]
        if ids.shape[1] > 1:
            total += self._sums_elsewhere(experts.layer, place[here], sums, place, home)
        arrived = _Tokens(place=place[here], hidden=hidden[here])
        if len(here):
            normed = layer.post_attention_layernorm(arrived.hidden)[None]
            with experts.computing(lambda *_: total):
                mixed = _first(getattr(layer, self.block)(normed))
            arrived.hidden = arrived.hidden + mixed[0]
        return arrived

    def _route(self, number: int, tokens: _Tokens) -> tuple[Tensor, Tensor]:
        """Return ids and weights ``[n, k]``, the heaviest first, without their experts."""
        layer, experts = self.layers[number], self.experts[number]
        chosen: list[tuple[Tensor, Tensor]] = []

        def keep(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            chosen.append(by_descending_weight(ids, weights))
            return torch.zeros_like(hidden)

        with experts.computing(keep):
            normed = layer.post_attention_layernorm(_at_least_one(tokens.hidden))
            getattr(layer, self.block)(normed[None])
        ids, weights = chosen[0]
        return ids[: len(tokens.place)], weights[: len(tokens.place)]

    def _sums(self, number: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return ``[n, H]``: weighted sums over this rank's experts."""
        experts = self.experts[number]
        held = experts.module.num_experts
        mine = self.slot_rank[experts.layer][ids] == self.rank
        local = torch.where(mine, self.local_slot[experts.layer][ids], held)
        if not len(hidden):
            return torch.zeros_like(hidden)
        normed = self.layers[number].post_attention_layernorm(hidden)
        forward = experts.module.forward
        return run_experts(forward, normed, local, weights.to(hidden.dtype), held)

    def _sums_elsewhere(
        self, layer: int, here: Tensor, sums: Tensor, place: Tensor, home: Tensor
    ) -> Tensor:
        """Send sums to the tokens' next homes; add up those that come for ``here``."""
        away = torch.nonzero(home != self.rank).flatten()
        away = away[home[away].argsort(stable=True)]
        sizes = torch.bincount(home[away], minlength=self.num_ranks)
        came, places = self._send(layer, "combine", sums[away], place[away, None], sizes)
        at = torch.searchsorted(here, places[:, 0].long())
        return added_up(came, at, len(here)).to(sums.dtype)

    def _send(
        self, layer: int, part: Part, hidden: Tensor, told: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Send rows and facts about them, sorted by rank; return what arrives."""
        splits = sizes.tolist()
        with self._counted(layer, part):
            received = exchange_sizes(sizes, self.group)
            rows = send_rows(hidden, splits, received, self.group)
            return rows, send_rows(told, splits, received, self.group)

    def _counted(self, layer: int, part: Part) -> AbstractContextManager[None]:
        return nullcontext() if self.counter is None else self.counter.within(layer, part)

    def _moe_layer_from(self, number: int) -> int:
        """Return the first MoE layer at or after a decoder layer, else the last."""
        following = [one.layer for at, one in self.experts.items() if at >= number]
        return min(following, default=len(self.experts) - 1)


def why_not_follow(model: nn.Module, experts: Sequence[ExpertsModule]) -> str | None:
    """Return why tokens cannot move between the parts of a model's layers, if so.

    They can where a layer adds attention and then a block to the hidden state, each after
    one norm, and nothing else: no other norms or branches, no scaled residuals (granite,
    minimax), and no attention that itself looks at other tokens (an indexer).
    """
    if ".layers." not in experts[0].path:
        return f"{experts[0].path} is not in a list of layers"
    layers, block = _layers(model, experts)
    expected = {*_CHILDREN, block}
    for number, layer in enumerate(layers):
        parts = dict(layer.named_children())
        for name in sorted(expected ^ set(parts)):
            return f"layer {number} has {'no ' if name in expected else ''}{name}"
        for name, value in vars(layer).items():
            if isinstance(value, float) and value not in (0.0, 1.0):
                return f"layer {number} has a {name} of {value:g}"
        for name, part in parts["self_attn"].named_children():
            if list(part.children()):
                return f"the attention of layer {number} has {name}, with its own parts"
    return None


def _layers(model: nn.Module, experts: Sequence[ExpertsModule]) -> tuple[Any, str]:
    """Return the decoder layers, and what their MoE or dense block is called."""
    prefix, _, rest = experts[0].path.partition(".layers.")
    return model.get_submodule(f"{prefix}.layers"), rest.split(".")[1]


def _first(output: Any) -> Tensor:
    """Return the hidden states that a module returns, as the only or the first value."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _at_least_one(rows: Tensor) -> Tensor:
    """Return the rows, or one of zeros: modules cannot shape an empty tensor.

    A rank without tokens takes part too, since the others wait for it.
    """
    return rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])


def _taken(embeddings: Any, place: Tensor, shape: torch.Size) -> Any:
    """Return the rotary embeddings of some tokens, from those ``[B or 1, S, d]`` of all.

    There may be several in a tuple, or none.
    """
    if embeddings is None:
        return None
    if isinstance(embeddings, tuple):
        return tuple(_taken(one, place, shape) for one in embeddings)
    row = place // shape[1] if len(embeddings) > 1 else torch.zeros_like(place)
    return embeddings[row, place % shape[1]][None]
