"""Measure the links and processors of this cluster for the cost model.

A dispatch is an all-to-all in which every rank has rows for every other rank. So the links
are measured by an all-to-all: ``all_to_all_single`` with split sizes, nothing to the rank
itself. For the fast link, the ranks of each node exchange among themselves. For the slow
link, all ranks exchange: one byte goes to each rank of the same node, and the message is
spread over the ranks of other nodes. All ranks send at once, as in a dispatch. So what they
share (a network card of the node, processor cores) is shared here too.

Two more kinds are measured. In one, every other rank (for the slow link, every rank of
every other node) sends only to the next one, because real exchanges are unequal. The other
is an all-gather of all ranks, which is another algorithm.

An exchange takes ``latency + bytes / bandwidth``, with the bytes that one rank sends over
the link. This is the cost of a message in LogGP, with one latency for everything that does
not grow with the bytes (Alexandrov et al., SPAA 1995). Both are fitted to medians of
several repetitions by least squares on the relative errors. So short messages decide the
latency and long ones the bandwidth. Libraries change their algorithm with the length of the
message, so two numbers do not fit all: the medians themselves are also kept, as a curve.

A repetition goes through all sizes and kinds of exchange, as a model does. So a disturbance
of the machine affects one repetition of all of them, and connections do not adapt to one
size.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from placer.arrays import BoolArray, IntArray
from placer.errors import PlacerError, UsageError, one_of
from placer.run.worker import Worker, together
from placer.target.hardware import Curve, Hardware
from placer.target.link_fit import LinkFit, fit_link

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = get_args(Device)
BACKENDS: dict[Device, str] = {"cpu": "gloo", "cuda": "nccl"}

_SHORTEST = 1024
_LONGEST = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
# A message that takes longer is the last of its link.
_LONG_ENOUGH = 0.1
# Short exchanges are timed so often that they take this long together.
_LAP, _MOST_LAPS = 0.01, 10
_MATMUL = {"cpu": 512, "cuda": 8192}
_COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 1024 * 2**20}


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """The options of a calibration.

    Attributes
    ----------
    num_ranks
        All ranks.
    num_nodes
        Nodes that they are on, numbered node by node.
    device
        ``cpu``, which exchanges by gloo, or ``cuda``, by NCCL.
    repetitions
        Timings of which the median counts.
    """

    num_ranks: int
    num_nodes: int = 1
    device: Device = "cpu"
    repetitions: int = 7

    def __post_init__(self) -> None:
        one_of("--device", self.device, DEVICES)
        if self.num_ranks < 2:
            raise UsageError(
                f"a link needs at least two ranks, got --ranks {self.num_ranks}",
                "measure between two ranks at least: --ranks 2",
            )
        if self.num_nodes < 1 or self.num_ranks % self.num_nodes:
            raise UsageError(
                f"--ranks {self.num_ranks} on --nodes {self.num_nodes}: every node has the "
                "same number of ranks",
                "choose --nodes so that it divides --ranks",
            )
        if self.repetitions < 1:
            raise UsageError(
                f"--repetitions must be at least 1, got {self.repetitions}",
                "for example --repetitions 7",
            )

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a node."""
        return self.num_ranks // self.num_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The results of a calibration.

    Attributes
    ----------
    options
        How.
    bf16_flops
        Dense operations per second of a bf16 matrix product on the slowest rank.
    memory_bandwidth
        Bytes read and written per second by a copy on the slowest rank.
    processor_share
        Operations per second when all ranks compute over those of a single rank, at most 1.
    fast, slow
        Links inside and between nodes; ``None`` where no two ranks are joined by it.
    all_gather
        Times of an all-gather of all ranks, by the bytes that one rank gives times the
        number of the others.
    """

    options: CalibrationOptions
    bf16_flops: float
    memory_bandwidth: float
    fast: LinkFit | None
    slow: LinkFit | None
    all_gather: Curve | None = None
    processor_share: float = 1.0

    @property
    def links(self) -> dict[str, LinkFit]:
        """The links that were measured, by name."""
        both = {"fast": self.fast, "slow": self.slow}
        return {name: fit for name, fit in both.items() if fit is not None}

    def hardware(self, name: str) -> Hardware:
        """Return the hardware for the cost model; notes list what was not measured.

        Raises
        ------
        ValueError
            If no link was measured.
        """
        fast, slow = (self.fast or self.slow), (self.slow or self.fast)
        if fast is None or slow is None:
            raise ValueError("at least one link is measured")
        return Hardware(
            name=name,
            bf16_flops=self.bf16_flops,
            fp8_flops=self.bf16_flops,
            memory_bandwidth=self.memory_bandwidth,
            fast=fast.measured,
            slow=slow.measured,
            all_gather=self.all_gather,
            processor_share=self.processor_share,
            source="placer calibrate",
            notes=tuple(self.notes()),
        )

    def notes(self) -> Iterator[str]:
        """Yield how the figures were measured, and which ones were not."""
        options = self.options
        nodes = f"{options.num_nodes} node{'s' * (options.num_nodes > 1)}"
        yield (
            f"{options.num_ranks} ranks on {nodes}, {options.device}, "
            f"{BACKENDS[options.device]}, medians of {options.repetitions} repetitions."
        )
        for name, fit in self.links.items():
            yield (
                f"{name}: fitted to all-to-all exchanges of {fit.num_bytes[0]} to "
                f"{fit.num_bytes[-1]} bytes per rank; errors of the fit {fit.residual:.1%} "
                f"(root mean square), {fit.worst:.1%} (worst)."
            )
        yield from self.missing()
        yield "fp8_flops: not measured, taken from bf16."

    def missing(self) -> Iterator[str]:
        """Yield which link was not measured, and why."""
        if self.fast is None:
            yield (
                "fast: not measured, because each node has one rank; taken from the "
                "slow link."
            )
        if self.slow is None:
            yield (
                "slow: not measured, because there is one node; taken from the fast link."
            )

    def to_json(self) -> dict[str, object]:
        """Return all that was measured."""
        return {
            "num_ranks": self.options.num_ranks,
            "num_nodes": self.options.num_nodes,
            "device": self.options.device,
            "bf16_flops": self.bf16_flops,
            "memory_bandwidth": self.memory_bandwidth,
            "processor_share": self.processor_share,
            "fast": None if self.fast is None else self.fast.to_json(),
            "slow": None if self.slow is None else self.slow.to_json(),
            "all_gather": None if self.all_gather is None else self.all_gather.to_json(),
            "notes": list(self.notes()),
        }


def require_devices(options: CalibrationOptions, ranks_here: int) -> None:
    """Refuse ``cuda`` where this machine has fewer GPUs than ranks.

    Raises
    ------
    PlacerError
        If a rank would not have its own GPU: NCCL joins no two ranks on one.
    """
    if options.device == "cpu":
        return
    import torch

    if torch.cuda.device_count() < ranks_here:
        raise PlacerError(
            f"{ranks_here} ranks on this machine need one GPU each, but it has "
            f"{torch.cuda.device_count()}",
            "give fewer --ranks, or measure on the CPU: --device cpu",
        )


def calibrate(
    options: CalibrationOptions,
    worker: Worker,
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Measure as one of the workers that torchrun started; all return the same.

    Parameters
    ----------
    options
        What is measured.
    worker
        Which of the ranks this process is.
    progress
        Called with what is being measured.

    Raises
    ------
    UsageError
        If there are not as many workers as ranks.
    PlacerError
        If no link can be fitted to the timings.
    """
    if worker.number != options.num_ranks:
        raise UsageError(
            f"--ranks is {options.num_ranks}, but torchrun started {worker.number} workers",
            "leave --ranks out under torchrun",
        )
    tell = progress or (lambda _text: None)
    if options.device == "cuda":
        worker.use_own_gpu()
    with together(worker, BACKENDS[options.device]):
        bench = _Bench(options, worker)
        tell("matrix product and copy")
        flops, memory = bench.flops(), bench.memory_bandwidth()
        share = min(flops / bench.flops(alone=True), 1.0)
        tell("exchanges")
        timings = bench.time_exchanges()
    return Calibration(
        options=options,
        bf16_flops=flops,
        memory_bandwidth=memory,
        processor_share=share,
        fast=_fit(timings, "fast"),
        slow=_fit(timings, "slow"),
        all_gather=Curve.rising(*zip(*timings["all_gather"], strict=True)),
    )


def _fit(timings: dict[str, list[tuple[int, float]]], name: str) -> LinkFit | None:
    """Fit a link to its exchanges, if there are any."""
    if name not in timings:
        return None
    fit = fit_link(*zip(*timings[name], strict=True))
    one_way = zip(*timings[f"{name} one way"], strict=True)
    return replace(fit, one_way=Curve.rising(*one_way))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exchange:
    """What is timed.

    Attributes
    ----------
    name
        The curve that it is a point of.
    num_bytes
        Sent or received by the busiest rank.
    action
        Does it.
    laps
        How often it is done for one timing.
    """

    name: str
    num_bytes: int
    action: Callable[[], object]
    laps: int


class _Bench:
    """Times what all ranks do at once, inside a process group."""

    def __init__(self, options: CalibrationOptions, worker: Worker) -> None:
        import torch
        import torch.distributed as dist

        self.options = options
        self.rank = worker.index
        self.device = torch.device(worker.device(options.device))
        width = options.ranks_per_node
        nodes = [
            list(range(first, first + width))
            for first in range(0, options.num_ranks, width)
        ]
        # Every rank takes part in making the group of every node.
        self.node_group = [dist.new_group(node) for node in nodes][self.rank // width]
        # What is sent and received does not matter: all exchanges share the memory.
        longest = 2 * _LONGEST[self.device.type]
        self.sent = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        self.received = torch.empty_like(self.sent)

    def flops(self, *, alone: bool = False) -> float:
        """Return operations per second of a square bf16 matrix product.

        ``alone``: times of the first rank, while the others wait.
        """
        import torch

        size = _MATMUL[self.device.type]
        one = torch.ones(size, size, dtype=torch.bfloat16, device=self.device)
        out = torch.empty_like(one)
        idle = alone and self.rank > 0
        seconds = self.seconds(lambda: idle or torch.matmul(one, one, out=out))
        return 2.0 * size**3 / seconds

    def memory_bandwidth(self) -> float:
        """Return bytes read and written per second by a copy."""
        import torch

        size = _COPY_BYTES[self.device.type]
        one = torch.ones(size, dtype=torch.uint8, device=self.device)
        out = torch.empty_like(one)
        return 2.0 * size / self.seconds(lambda: out.copy_(one))

    def time_exchanges(self) -> dict[str, list[tuple[int, float]]]:
        """Return bytes of the busiest rank and median seconds, by name of the curve."""
        exchanges = list(self._exchanges())
        laps = [
            [self._lap(one.action, one.laps) for one in exchanges]
            for _ in range(self.options.repetitions)
        ]
        found: dict[str, list[tuple[int, float]]] = {}
        for one, seconds in zip(exchanges, np.median(laps, axis=0), strict=True):
            found.setdefault(one.name, []).append((one.num_bytes, float(seconds)))
        return found

    def _exchanges(self) -> Iterator[_Exchange]:
        """Yield what is timed, from one byte to each peer up."""
        width = self.options.ranks_per_node
        ranks = np.arange(self.options.num_ranks)
        near = ranks[:, None] // width == ranks // width
        near &= ranks[:, None] != ranks
        far = ranks[:, None] // width != ranks // width
        for name, pairs, rest, step in (
            ("fast", near[:width, :width], far[:width, :width], 1),
            ("slow", far, near, width),
        ):
            if not pairs.any():
                continue
            group = self.node_group if name == "fast" else None
            yield from self._growing(name, pairs, rest, group)
            # Every other rank sends to the next, or every other node's ranks to those of
            # the next node.
            place = ranks[: len(pairs)]
            apart = (place[:, None] + step == place) & (place // step % 2 == 0)[:, None]
            yield from self._growing(f"{name} one way", apart, rest, group)
        yield from self._growing("all_gather", near | far, None, None)

    def _growing(
        self,
        name: str,
        pairs: BoolArray,
        rest: BoolArray | None,
        group: "ProcessGroup | None",
    ) -> Iterator[_Exchange]:
        """Yield growing messages between ``pairs``, with one byte between the ``rest``.

        Both are ``[n, n]`` of the ranks of the group; without ``rest`` it is an all-gather.
        """
        busiest = int(max(pairs.sum(axis=0).max(), pairs.sum(axis=1).max()))
        for each in self._message_sizes(busiest):
            if rest is None:
                action = self._all_gather(each)
            else:
                action = self._all_to_all(pairs * each + rest, group)
            seconds = self._warm(action)
            laps = int(np.clip(_LAP / seconds, 1, _MOST_LAPS))
            yield _Exchange(name=name, num_bytes=each * busiest, action=action, laps=laps)
            # Twice, as other work may have held it up.
            if seconds > _LONG_ENOUGH and self._lap(action, 1) > _LONG_ENOUGH:
                return

    def _message_sizes(self, num_peers: int) -> Iterator[int]:
        """Yield bytes to each peer, doubling up to the longest message of a rank."""
        yield 1
        size = _SHORTEST
        while size * num_peers <= _LONGEST[self.device.type]:
            yield size
            size *= 2

    def _all_to_all(
        self, matrix: IntArray, group: "ProcessGroup | None"
    ) -> Callable[[], object]:
        """Return what sends the bytes of a matrix ``[n, n]`` from each rank to each."""
        import torch.distributed as dist

        own = self.rank % len(matrix)
        to, by = matrix[own].tolist(), matrix[:, own].tolist()
        sent, received = self.sent[: sum(to)], self.received[: sum(by)]
        return lambda: dist.all_to_all_single(received, sent, by, to, group=group)

    def _all_gather(self, each: int) -> Callable[[], object]:
        """Return what gives this many bytes of each rank to every other."""
        import torch.distributed as dist

        number = self.options.num_ranks
        received = list(self.received[: each * number].view(number, each).unbind())
        return lambda: dist.all_gather(received, self.sent[:each])

    def seconds(self, action: Callable[[], object]) -> float:
        """Return the median over repetitions of the seconds on the slowest rank."""
        laps = int(np.clip(_LAP / self._warm(action), 1, _MOST_LAPS))
        times = [self._lap(action, laps) for _ in range(self.options.repetitions)]
        return float(np.median(times))

    def _warm(self, action: Callable[[], object]) -> float:
        """Warm connections and buffers up; return the seconds that it takes then."""
        self._lap(action, 1)
        return self._lap(action, 1)

    def _lap(self, action: Callable[[], object], laps: int) -> float:
        """Return the mean seconds of some actions that all ranks begin together.

        Without a common beginning, an exchange would wait for what slower ranks still have
        to send for the one before.
        """
        total = 0.0
        for _ in range(laps):
            self._slowest(0.0)
            began = time.perf_counter()
            action()
            if self.device.type == "cuda":
                import torch

                torch.cuda.synchronize(self.device)
            total += time.perf_counter() - began
        return self._slowest(total / laps)

    def _slowest(self, seconds: float) -> float:
        import torch
        import torch.distributed as dist

        value: torch.Tensor = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return float(value)
