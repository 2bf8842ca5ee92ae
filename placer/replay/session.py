"""One worker of a replay: a model whose experts are spread over the ranks."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.expert_parallel import AllToAllEP, EPImplementation

from placer.arrays import IntArray
from placer.model import Architecture, ModelSpec
from placer.placement.placement import Placement
from placer.replay.exchanges import (
    DedupExchange,
    PaddedExchange,
    PerNodeExchange,
    ShuffleExchange,
)
from placer.replay.follow import FollowRun, why_not_follow
from placer.replay.kinds import (
    DEDUP,
    ENGINE,
    EXCHANGE_KINDS,
    FOLLOW,
    PADDED,
    PER_NODE,
    ExchangeKind,
)
from placer.replay.sharding import ExpertsForward, ExpertsModule, experts_modules
from placer.replay.token_shuffle import TokenShuffle
from placer.replay.traffic import Collective, Traffic, TrafficCounter
from placer.serving.layer_serving import LayerServing
from placer.table.table import Table
from placer.trace.capture import RouterCapture, by_descending_weight

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WorkerRun:
    """The counts of one worker for one placement under one exchange.

    Attributes
    ----------
    traffic
        What it sent.
    collectives
        The same, one after another.
    places
        L arrays ``[n]`` int64: the tokens whose routers ran here.
    experts
        L arrays ``[n, k]`` int64: their logical experts, the heaviest first.
    error
        Root mean square of the difference between hidden states after the last norm and
        those of the model run on one rank, over that of the latter; of the worst batch.
    num_compared
        Tokens whose hidden states were compared.
    seconds
        Of a forward pass, in each repetition.
    """

    traffic: Traffic
    collectives: tuple[Collective, ...]
    places: list[IntArray]
    experts: list[IntArray]
    error: float
    num_compared: int
    seconds: list[float]


class ReplaySession:
    """A loaded model, and the batches that are replayed on it.

    Parameters
    ----------
    model
        A transformers model, loaded whole on every worker.
    architecture, spec
        Its family and shape.
    batches
        ``[passes, B, S]`` token ids; B divides by the ranks. Sequence b belongs to rank
        ``b mod R`` where ranks have different batches.
    repeats
        How often the passes are timed.
    """

    def __init__(
        self,
        model: Any,
        architecture: Architecture,
        spec: ModelSpec,
        batches: npt.NDArray[np.integer],
        repeats: int,
    ) -> None:
        self.loaded: Any = model
        self.model: Any = model.base_model
        self.architecture, self.spec, self.repeats = architecture, spec, repeats
        self.experts = experts_modules(model, architecture, spec)
        self.batches = torch.from_numpy(batches.astype(np.int64)).to(model.device)
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh(
            model.device.type, (self.num_ranks, 1), mesh_dim_names=("ep", "tp")
        )
        self.everyone, self.alone = mesh["ep"], mesh["tp"]
        self.group = self.everyone.get_group()
        self.expected, self.routing = self._alone(model)

    def _alone(self, model: Any) -> tuple[list[Tensor], list[IntArray]]:
        """Run the model on one rank: hidden states, and L arrays ``[T, k]`` of experts."""
        hidden, routed = [], []
        with RouterCapture(model, self.architecture, self.spec) as capture:
            for batch in self.batches:
                with torch.inference_mode():
                    output = self.model(input_ids=batch, use_cache=False)
                hidden.append(output.last_hidden_state.flatten(0, 1).cpu())
                routed.append([layer.ids.cpu().numpy() for layer in capture.take()])
        return hidden, [np.concatenate(layer) for layer in zip(*routed, strict=True)]

    def why_not(self, name: str) -> str | None:
        """Return why the model cannot be run under an exchange, if so."""
        return why_not_follow(self.loaded, self.experts) if name == FOLLOW else None

    def run(self, placement: Placement, name: str, table: Table | None) -> WorkerRun:
        """Replay all batches: once to count and compare, then to measure time.

        Parameters
        ----------
        placement
            Experts in slots of the ranks.
        name
            One of :data:`~placer.replay.kinds.EXCHANGE_KINDS`.
        table
            The placement's table, for the exchange that shuffles tokens.
        """
        kind = EXCHANGE_KINDS[name]
        counter = TrafficCounter(
            num_layers=self.spec.num_layers,
            num_ranks=self.num_ranks,
            hidden_size=self.spec.hidden_size or 0,
        )
        seen = _Seen(self.spec.num_layers, self.spec.top_k)
        with (
            self._installed(placement, name, table, counter, seen) as held,
            counter,
            torch.no_grad(),
        ):
            compared = [
                self._compare(number, held, seen) for number in range(len(self.batches))
            ]
        with self._installed(placement, name, table, None, None):
            seconds = [self._time(kind) for _ in range(self.repeats)]
        return WorkerRun(
            traffic=counter.traffic(),
            collectives=counter.collectives(),
            places=[np.concatenate(layer) for layer in seen.places],
            experts=[np.concatenate(layer) for layer in seen.experts],
            # Unlike max(), this keeps NaN.
            error=float(np.max([error for error, _ in compared])),
            num_compared=sum(number for _, number in compared),
            seconds=seconds,
        )

    def _given(self, batch: Tensor, kind: ExchangeKind) -> Tensor:
        return batch if kind.shares_batch else batch[self.rank :: self.num_ranks]

    def _own_places(self) -> IntArray:
        """Return ``[n]``: the places in a batch of the tokens of this rank's sequences."""
        size, length = self.batches.shape[1:]
        sequence = np.arange(self.rank, size, self.num_ranks)
        return (sequence[:, None] * length + np.arange(length)).ravel()

    def _compare(self, number: int, held: "_Held", seen: "_Seen") -> tuple[float, int]:
        """Run one batch; return its error, and of how many tokens."""
        batch, expected = self.batches[number], self.expected[number]
        seen.first = number * batch.numel()
        held.first = seen.first
        output = self.model(input_ids=self._given(batch, held.kind), use_cache=False)
        found = output.last_hidden_state.flatten(0, 1).cpu()
        if held.follow is not None:
            place = held.follow.place.cpu()
            found, expected = found[place], expected[place]
        elif not held.kind.shares_batch:
            expected = expected[torch.from_numpy(self._own_places())]
        if not len(found):
            return 0.0, 0
        difference = (found.double() - expected.double()).square().mean()
        error = float((difference / expected.double().square().mean()).sqrt())
        return error, len(found)

    def _time(self, kind: ExchangeKind) -> float:
        """Return seconds of a forward pass of all ranks."""
        dist.barrier()
        begin = time.perf_counter()
        with torch.no_grad():
            for batch in self.batches:
                self.model(input_ids=self._given(batch, kind), use_cache=False)
        dist.barrier()
        return (time.perf_counter() - begin) / len(self.batches)

    @contextmanager
    def _installed(
        self,
        placement: Placement,
        name: str,
        table: Table | None,
        counter: TrafficCounter | None,
        seen: "_Seen | None",
    ) -> Iterator["_Held"]:
        """Let every rank hold its slots, and the exchange bring them their tokens."""
        held = _Held(kind=EXCHANGE_KINDS[name])
        with ExitStack() as stack:
            for one in self.experts:
                row = placement.physical_to_logical_map[one.layer]
                stack.enter_context(
                    one.holding(row.reshape(self.num_ranks, -1)[self.rank].tolist())
                )
            if name == FOLLOW:
                held.follow = self._follow(placement, counter, seen)
                stack.enter_context(held.follow.installed())
            else:
                build = self._implementation(placement, name, table, stack)
                for one in self.experts:
                    forward = self._exchange(placement, one, build, held, counter, seen)
                    stack.enter_context(one.computing(forward))
            yield held

    def _implementation(
        self, placement: Placement, name: str, table: Table | None, stack: ExitStack
    ) -> Callable[[Any], EPImplementation]:
        """Return what builds the exchange of a layer."""
        alone: dict[str, Any] = {"ep_mesh": self.everyone, "tp_mesh": self.alone}
        if name == ENGINE:
            return partial(AllToAllEP, **alone)
        if name == DEDUP:
            return partial(DedupExchange, **alone)
        if name == PADDED:
            return partial(PaddedExchange, **alone)
        if name == PER_NODE:
            width = placement.ranks_per_node
            return partial(PerNodeExchange, **alone, ranks_per_node=width)
        if table is None:
            raise ValueError(f"{name} needs a table")
        shuffle = TokenShuffle(table, placement)
        stack.callback(shuffle.watch(self.model).remove)
        shared: dict[str, Any] = {"ep_mesh": self.everyone, "tp_mesh": self.everyone}
        return partial(ShuffleExchange, **shared, shuffle=shuffle)

    def _exchange(
        self,
        placement: Placement,
        one: ExpertsModule,
        build: Callable[[Any], EPImplementation],
        held: "_Held",
        counter: TrafficCounter | None,
        seen: "_Seen | None",
    ) -> ExpertsForward:
        """Return what takes a layer's tokens to the slots of a placement."""
        implementation = build(one.module)
        slots = _Slots(placement, one.layer)
        own = self._own_places()
        notes = seen is not None and (self.rank == 0 or not held.kind.shares_batch)

        def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            if seen is not None and notes:
                places = np.arange(len(ids)) if held.kind.shares_batch else own
                seen.note(one.layer, places, by_descending_weight(ids, weights)[0])
            physical = slots.of(ids, self.rank, own + held.first)
            with _within(counter, one.layer):
                served = implementation(hidden, physical, weights)
            result: Tensor = served.to(hidden.dtype)
            return result

        return forward

    def _follow(
        self, placement: Placement, counter: TrafficCounter | None, seen: "_Seen | None"
    ) -> FollowRun:
        def watch(layer: int, place: Tensor, ids: Tensor, weights: Tensor) -> None:
            if seen is not None:
                seen.note(layer, place.cpu().numpy(), ids)

        device = self.batches.device
        slot_rank, local_slot = [], []
        for one in self.experts:
            slot = placement.slot_of(one.layer).max(axis=0)
            width = len(slot) // self.num_ranks
            slot_rank.append(torch.from_numpy(slot // width).to(device))
            local_slot.append(torch.from_numpy(slot % width).to(device))
        return FollowRun(
            self.loaded,
            self.experts,
            slot_rank=slot_rank,
            local_slot=local_slot,
            group=self.group,
            counter=counter,
            watch=watch,
        )


@dataclass(slots=True, kw_only=True)
class _Held:
    """An installed exchange; ``first`` is the first token of the batch that runs."""

    kind: ExchangeKind
    follow: FollowRun | None = None
    first: int = 0


class _Seen:
    """What routers chose, by layer."""

    def __init__(self, num_layers: int, top_k: int) -> None:
        self.first = 0
        none = np.empty(0, dtype=np.int64)
        self.places = [[none] for _ in range(num_layers)]
        self.experts = [[none.reshape(0, top_k)] for _ in range(num_layers)]

    def note(self, layer: int, places: IntArray, ids: Tensor) -> None:
        """Keep the experts ``[n, k]`` of tokens, given by their places in the batch."""
        self.places[layer].append(places + self.first)
        self.experts[layer].append(ids.cpu().numpy())


class _Slots:
    """The slot that serves a logical expert, ``local-first`` where there are replicas."""

    def __init__(self, placement: Placement, layer: int) -> None:
        self.serving = LayerServing.of(placement, layer)
        self.slot_of = placement.slot_of(layer)
        self.only = torch.from_numpy(self.slot_of.max(axis=0))

    def of(self, ids: Tensor, home: int, turn: IntArray) -> Tensor:
        """Return slots ``[n, k]`` of ids; ``turn`` [n] is each token's index."""
        if not self.serving.has_replicas:
            return self.only.to(ids.device)[ids]
        experts = ids.T.cpu().numpy()
        homes = np.full(len(ids), home)
        ranks = self.serving.ranks(experts, homes, turn)
        return torch.from_numpy(self.slot_of[ranks, experts].T.copy()).to(ids.device)


def _within(counter: TrafficCounter | None, layer: int) -> AbstractContextManager[None]:
    return nullcontext() if counter is None else counter.within(layer, "exchange")
