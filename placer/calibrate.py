"""Measure what the cost model needs to know of this cluster: its links and processors.

A dispatch is an all-to-all in which every rank has rows for every other, so the links are
measured by one: ``all_to_all_single`` with split sizes, nothing to the rank itself. For the
fast link the ranks of each node exchange among themselves; for the slow one all ranks do,
with one byte to each rank of the own node and the message spread over those of other nodes.
All ranks send at once, as in a dispatch, so what they share (a network card of the node,
processor cores) is shared here too.

An exchange takes ``latency + bytes / bandwidth``, the bytes those that one rank sends over
the link: the cost of a message of LogGP, with one latency for all that does not grow with
the bytes (Alexandrov et al., SPAA 1995). Both are fitted to medians of several repetitions
by least squares on the relative errors, so that short messages decide the latency and long
ones the bandwidth.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from placer.errors import PlacerError, UsageError
from placer.hardware import Hardware, Link
from placer.worker import Worker, together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

IntArray = npt.NDArray[np.int64]
BACKENDS: dict[str, str] = {"cpu": "gloo", "cuda": "nccl"}

_SHORTEST = 1024
_LONGEST = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
# A message that takes longer is the last of its link.
_LONG_ENOUGH = 0.2
# Short exchanges are timed so often that they take this long together.
_LAP, _MOST_LAPS = 0.02, 50
_MATMUL = {"cpu": 512, "cuda": 8192}
_COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 1024 * 2**20}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFit:
    """A link, and the timings that it was fitted to.

    Attributes
    ----------
    link
        What was fitted.
    num_bytes
        Bytes that one rank sent in an exchange, ascending.
    seconds
        How long the exchange took on the slowest rank.
    """

    link: Link
    num_bytes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.num_bytes) != len(self.seconds) or not self.num_bytes:
            raise ValueError("a fit has one time per message size, and at least one")

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative error of the fit at each size: 0.1 where it says 10 % too much."""
        return tuple(
            (self.link.latency + size / self.link.bandwidth) / seconds - 1
            for size, seconds in zip(self.num_bytes, self.seconds, strict=True)
        )

    @property
    def residual(self) -> float:
        """Root mean square of the relative errors."""
        return float(np.sqrt(np.mean(np.square(self.errors))))

    @property
    def worst(self) -> float:
        """The largest relative error, by magnitude."""
        return max(abs(error) for error in self.errors)

    def to_json(self) -> dict[str, object]:
        """Return the link, how well it fits, and the timings."""
        return {
            "bandwidth_bytes_per_s": self.link.bandwidth,
            "latency_s": self.link.latency,
            "residual_rms": round(self.residual, 4),
            "residual_worst": round(self.worst, 4),
            "num_bytes": list(self.num_bytes),
            "seconds": list(self.seconds),
        }


def fit_link(num_bytes: Sequence[int], seconds: Sequence[float]) -> LinkFit:
    """Fit ``latency + bytes / bandwidth`` to timings, least squares on relative errors.

    A latency below 0 cannot be: the fit with latency 0 is the best one then.

    Raises
    ------
    PlacerError
        If there are fewer than two sizes, or the time does not grow with them.
    """
    sizes, times = np.asarray(num_bytes, float), np.asarray(seconds, float)
    positive = np.isfinite(times).all() and (times > 0).all()
    if len(np.unique(sizes)) < 2 or not positive:
        raise PlacerError(
            f"a link is fitted to positive times of at least two sizes, got {times.size}",
            "measure again: placer calibrate",
        )
    # Scaled, so that both columns are of the same order.
    per_byte = times.max() / sizes.max()
    columns = np.stack([1 / times, sizes * per_byte / times], axis=1)
    latency, slope = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)[0]
    if latency < 0:
        latency, slope = 0.0, columns[:, 1].sum() / np.square(columns[:, 1]).sum()
    if slope <= 0:
        raise PlacerError(
            "an exchange of more bytes takes no longer: no bandwidth can be told",
            "measure again on a quiet machine: placer calibrate",
        )
    return LinkFit(
        link=Link(bandwidth=float(1 / (slope * per_byte)), latency=float(latency)),
        num_bytes=tuple(num_bytes),
        seconds=tuple(seconds),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """What is measured, and how often.

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
    device: Literal["cpu", "cuda"] = "cpu"
    repetitions: int = 7

    def __post_init__(self) -> None:
        if self.device not in BACKENDS:
            raise UsageError(
                f"--device {self.device} is not known",
                f"choose among {', '.join(BACKENDS)}",
            )
        if self.num_ranks < 2:
            raise UsageError(
                f"a link has two ends, got --ranks {self.num_ranks}",
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
                f"--repetitions is {self.repetitions}", "repeat at least once: 7"
            )

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a node."""
        return self.num_ranks // self.num_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured.

    Attributes
    ----------
    options
        How.
    bf16_flops
        Dense operations per second of a bf16 matrix product on the slowest rank.
    memory_bandwidth
        Bytes read and written per second by a copy on the slowest rank.
    fast, slow
        Links inside and between nodes; ``None`` where no two ranks are joined by it.
    """

    options: CalibrationOptions
    bf16_flops: float
    memory_bandwidth: float
    fast: LinkFit | None
    slow: LinkFit | None

    @property
    def links(self) -> dict[str, LinkFit]:
        """The links that were measured, by name."""
        both = {"fast": self.fast, "slow": self.slow}
        return {name: fit for name, fit in both.items() if fit is not None}

    def hardware(self, name: str) -> Hardware:
        """Return what the cost model reads; what was not measured is said in the notes."""
        fast, slow = (self.fast or self.slow), (self.slow or self.fast)
        if fast is None or slow is None:
            raise ValueError("at least one link is measured")
        return Hardware(
            name=name,
            bf16_flops=self.bf16_flops,
            fp8_flops=self.bf16_flops,
            memory_bandwidth=self.memory_bandwidth,
            fast=fast.link,
            slow=slow.link,
            source="placer calibrate",
            notes=tuple(self.notes()),
        )

    def notes(self) -> Iterator[str]:
        """Yield how the figures were measured, and which ones were not."""
        options = self.options
        yield (
            f"{options.num_ranks} ranks on {options.num_nodes} nodes, {options.device}, "
            f"{BACKENDS[options.device]}, medians of {options.repetitions} repetitions."
        )
        for name, fit in self.links.items():
            yield (
                f"{name}: fitted to all-to-all exchanges of {fit.num_bytes[0]} to "
                f"{fit.num_bytes[-1]} bytes per rank; errors of the fit {fit.residual:.1%} "
                f"(root mean square), {fit.worst:.1%} (worst)."
            )
        yield from self.missing()
        yield "fp8_flops: not measured, that of bf16."

    def missing(self) -> Iterator[str]:
        """Yield which link was not measured, and why."""
        if self.fast is None:
            yield "fast: not measured, as each node has one rank; the slow link's figures."
        if self.slow is None:
            yield "slow: not measured, as there is one node; the fast link's figures."

    def to_json(self) -> dict[str, object]:
        """Return all that was measured."""
        return {
            "num_ranks": self.options.num_ranks,
            "num_nodes": self.options.num_nodes,
            "device": self.options.device,
            "bf16_flops": self.bf16_flops,
            "memory_bandwidth": self.memory_bandwidth,
            "fast": None if self.fast is None else self.fast.to_json(),
            "slow": None if self.slow is None else self.slow.to_json(),
            "notes": list(self.notes()),
        }


def require_devices(options: CalibrationOptions, ranks_here: int) -> None:
    """Refuse ``cuda`` where this machine has fewer GPUs than ranks.

    Raises
    ------
    PlacerError
        If a rank would have no GPU of its own: NCCL joins no two ranks on one.
    """
    if options.device == "cpu":
        return
    import torch

    if torch.cuda.device_count() < ranks_here:
        raise PlacerError(
            f"{ranks_here} ranks on this machine need as many GPUs, but it has "
            f"{torch.cuda.device_count()}",
            "name fewer --ranks, or measure between processes on the CPU: --device cpu",
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
        Told what is being measured.

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
        fits = {}
        for name, measure in (("fast", bench.time_fast), ("slow", bench.time_slow)):
            tell(f"{name} link")
            timings = list(measure())
            fits[name] = fit_link(*zip(*timings, strict=True)) if timings else None
    return Calibration(
        options=options,
        bf16_flops=flops,
        memory_bandwidth=memory,
        fast=fits["fast"],
        slow=fits["slow"],
    )


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
        self.node = nodes[self.rank // width]
        # Every rank takes part in making the group of every node.
        self.node_group = [dist.new_group(node) for node in nodes][self.rank // width]

    def flops(self) -> float:
        """Return operations per second of a square bf16 matrix product."""
        import torch

        size = _MATMUL[self.device.type]
        one = torch.ones(size, size, dtype=torch.bfloat16, device=self.device)
        out = torch.empty_like(one)
        return 2.0 * size**3 / self.seconds(lambda: torch.matmul(one, one, out=out))

    def memory_bandwidth(self) -> float:
        """Return bytes read and written per second by a copy."""
        import torch

        size = _COPY_BYTES[self.device.type]
        one = torch.ones(size, dtype=torch.uint8, device=self.device)
        out = torch.empty_like(one)
        return 2.0 * size / self.seconds(lambda: out.copy_(one))

    def time_fast(self) -> Iterator[tuple[int, float]]:
        """Yield bytes sent per rank and seconds of exchanges inside the nodes."""
        splits = np.array([rank != self.rank for rank in self.node], np.int64)
        yield from self._time(splits, np.zeros_like(splits), self.node_group)

    def time_slow(self) -> Iterator[tuple[int, float]]:
        """Yield bytes sent per rank and seconds of exchanges between the nodes."""
        ranks = np.arange(self.options.num_ranks)
        far = ~np.isin(ranks, self.node)
        near = ~far & (ranks != self.rank)
        yield from self._time(far.astype(np.int64), near.astype(np.int64), None)

    def _time(
        self,
        far: IntArray,
        near: IntArray,
        group: "ProcessGroup | None",
    ) -> Iterator[tuple[int, float]]:
        """Time growing messages to the ranks ``far``, with one byte to those ``near``."""
        num_peers = int(far.sum())
        if not num_peers:
            return
        for each in itertools.chain([1], self._message_sizes(num_peers)):
            exchange = self._exchange((far * each + near).tolist(), group)
            seconds = self.seconds(exchange)
            yield each * num_peers, seconds
            if seconds > _LONG_ENOUGH:
                return

    def _message_sizes(self, num_peers: int) -> Iterator[int]:
        """Yield bytes to each peer, doubling up to the longest message of a rank."""
        size = _SHORTEST
        while size * num_peers <= _LONGEST[self.device.type]:
            yield size
            size *= 2

    def _exchange(
        self, splits: list[int], group: "ProcessGroup | None"
    ) -> Callable[[], object]:
        import torch
        import torch.distributed as dist

        sent = torch.zeros(sum(splits), dtype=torch.uint8, device=self.device)
        received = torch.empty_like(sent)
        # Whatever a rank sends to another, it receives from it.
        return lambda: dist.all_to_all_single(received, sent, splits, splits, group=group)

    def seconds(self, action: Callable[[], object]) -> float:
        """Return the median over repetitions of the seconds on the slowest rank."""
        self._lap(action, 2)  # connections and buffers warm up
        laps = int(np.clip(_LAP / self._lap(action, 2), 1, _MOST_LAPS))
        times = [self._lap(action, laps) for _ in range(self.options.repetitions)]
        return float(np.median(times))

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
