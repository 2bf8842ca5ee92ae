"""GPUs and links of the cost model: ``placer/target/hardware.toml`` or a user's file.

A link is a latency and a bandwidth; one that ``placer calibrate`` measured also has the
times themselves, by the bytes that were sent, and then those are taken (docs/formats.md).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from placer.arrays import FloatArray
from placer.errors import PlacerError, UsageError, meant
from placer.run.documents import parse_toml, validated
from placer.run.files import read_text
from placer.run.writing import atomic_file

_FIGURES = ("bf16_flops", "fp8_flops", "memory_bandwidth")
_WAYS = ("both_ways", "one_way")
_EXAMPLE = """bf16_flops = 989e12
fp8_flops = 1979e12
memory_bandwidth = 3.35e12
fast = { bandwidth = 380e9, latency = 20e-6 }
slow = { bandwidth = 44e9, latency = 25e-6 }"""

_Above0 = Annotated[float, msgspec.Meta(gt=0)]
_NotBelow0 = Annotated[float, msgspec.Meta(ge=0)]
_Points = list[tuple[_NotBelow0, _NotBelow0]]


class LinkFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A link class of a hardware file."""

    bandwidth: _Above0
    latency: _NotBelow0
    both_ways: _Points | None = None
    one_way: _Points | None = None


class HardwareFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A hardware file, which people write too; see ``docs/formats.md``."""

    bf16_flops: _Above0
    fp8_flops: _Above0
    memory_bandwidth: _Above0
    processor_share: _Above0 = 1.0
    source: str = ""
    notes: tuple[str, ...] = ()
    all_gather: _Points | None = None
    fast: LinkFile
    slow: LinkFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Measured times of an exchange by its bytes, linear between points.

    Attributes
    ----------
    num_bytes
        Ascending, at least two.
    seconds
        Not descending. Shorter messages than the first take as long as it, longer ones than
        the last as much more per byte as from the last but one to the last.
    """

    num_bytes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes, times = np.asarray(self.num_bytes), np.asarray(self.seconds)
        if (
            not _are_numbers(sizes, times)
            or len(sizes) != len(times)
            or len(sizes) < 2
            or not (np.isfinite(sizes).all() and np.isfinite(times).all())
            or (np.diff(sizes) <= 0).any()
            or (np.diff(times) < 0).any()
            or min(sizes[0], times[0]) < 0
        ):
            raise UsageError(
                "a curve needs at least two pairs of bytes and seconds, neither below 0, "
                f"bytes ascending and seconds not descending; got {self.to_json()}",
                "measure again: placer calibrate --ranks R --out FILE",
            )

    @classmethod
    def of(cls, pairs: Sequence[Sequence[float]]) -> Self:
        """Take ``[bytes, seconds]`` pairs."""
        sizes, times = zip(*pairs, strict=True) if pairs else ((), ())
        return cls(num_bytes=tuple(sizes), seconds=tuple(times))

    @classmethod
    def rising(cls, num_bytes: Sequence[float], seconds: Sequence[float]) -> Self:
        """Take noisy times: the mean of the least curves above and the greatest below."""
        times = np.asarray(seconds)
        above = np.maximum.accumulate(times)
        below = np.minimum.accumulate(times[::-1])[::-1]
        return cls(
            num_bytes=tuple(num_bytes), seconds=tuple(((above + below) / 2).tolist())
        )

    def at(self, num_bytes: FloatArray) -> FloatArray:
        """Return the seconds of each number of bytes, any shape."""
        within: FloatArray = np.interp(num_bytes, self.num_bytes, self.seconds)
        rise = (self.seconds[-1] - self.seconds[-2]) / (
            self.num_bytes[-1] - self.num_bytes[-2]
        )
        return within + np.maximum(num_bytes - self.num_bytes[-1], 0) * rise

    def to_json(self) -> list[list[float]]:
        """Return ``[bytes, seconds]`` pairs."""
        return [list(pair) for pair in zip(self.num_bytes, self.seconds, strict=False)]


def _are_numbers(*columns: npt.NDArray[Any]) -> bool:
    """Return whether these are lists of numbers, not of text, truth values or lists."""
    return all(column.ndim == 1 and column.dtype.kind in "iuf" for column in columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCurves:
    """Measured times of all-to-all exchanges over a link class.

    Attributes
    ----------
    both_ways
        All ranks send and receive as much as each other.
    one_way
        Each rank only sends or only receives.
    """

    both_ways: Curve
    one_way: Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link class: bytes per second and direction of one GPU, and seconds per transfer.

    Attributes
    ----------
    bandwidth, latency
        An exchange takes ``latency + bytes / bandwidth``.
    curves
        Measured times, which count instead where there are any.
    """

    bandwidth: float
    latency: float
    curves: LinkCurves | None = None

    def __post_init__(self) -> None:
        if not (0 < self.bandwidth < math.inf and 0 <= self.latency < math.inf):
            raise UsageError(
                f"a link needs a positive bandwidth and a latency of at least 0, got "
                f"{self.bandwidth:g} and {self.latency:g}",
                "bandwidth is in bytes per second, latency in seconds",
            )

    @property
    def start(self) -> float:
        """Seconds of an exchange of next to nothing."""
        return self.latency if self.curves is None else self.curves.both_ways.seconds[0]

    def growth(self, sent: FloatArray, received: FloatArray) -> FloatArray:
        """Return the seconds beyond :attr:`start` of a rank, from bytes of any shape.

        A link whose directions do not disturb each other takes as long as the more of the
        two. Where they do, as gloo's, an exchange lasts as long as one of the mean both
        ways, but no less than the more of the two one way: exact where both are equal, and
        where one is nothing.
        """
        busiest: FloatArray = np.maximum(sent, received)
        if self.curves is None:
            return busiest / self.bandwidth
        seconds = np.maximum(
            self.curves.both_ways.at((sent + received) / 2), self.curves.one_way.at(busiest)
        )
        return np.maximum(seconds - self.start, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A GPU and its links.

    Attributes
    ----------
    name
        What ``--hardware`` was given.
    bf16_flops, fp8_flops
        Dense floating-point operations per second.
    memory_bandwidth
        Bytes per second.
    fast, slow
        The links between GPUs of one node, and between nodes.
    all_gather
        Measured times of an all-gather of all ranks, by the bytes that one rank gives times
        the number of the others; ``None`` where it is taken for an all-to-all.
    processor_share
        Part of its speed that a processor has left when all ranks compute: below 1 where
        ranks share one.
    source
        Where the figures come from.
    notes
        How, one sentence each.
    """

    name: str
    bf16_flops: float
    fp8_flops: float
    memory_bandwidth: float
    fast: Link
    slow: Link
    all_gather: Curve | None = None
    processor_share: float = 1.0
    source: str = "the user's own file"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in _FIGURES:
            if not 0 < getattr(self, field) < math.inf:
                raise UsageError(
                    f"hardware {self.name}: {field} must be positive and finite, got "
                    f"{getattr(self, field):g}"
                )

        if not 0 < self.processor_share <= 1:
            raise UsageError(
                f"hardware {self.name}: processor_share must be above 0 and at most 1, got "
                f"{self.processor_share:g}"
            )

    def flops(self, weight_bytes: float) -> float:
        """Return operations per second for weights of this many bytes per element."""
        return self.bf16_flops if weight_bytes > 1 else self.fp8_flops

    @classmethod
    def named(cls, name: str) -> "Hardware":
        """Return known hardware, or the hardware of a TOML file with the same keys.

        Raises
        ------
        UsageError
            If it is neither.
        PlacerError
            If the file cannot be read as hardware.
        """
        known = known_hardware()
        if name in known:
            return known[name]
        path = Path(name)
        if path.suffix != ".toml":
            raise UsageError(
                f"--hardware {name} is not known",
                f"{meant(name, known)}choose among {', '.join(known)}, or name a .toml "
                "file",
            )
        text = read_text(path, what="hardware file")
        try:
            value = parse_toml(text, f"hardware file {path}")
            example = f"it holds, for example:\n{_EXAMPLE}"
            validated(value, HardwareFile, f"hardware file {path}", example)
            return _read_hardware(path.stem, value)
        except UsageError as error:
            raise UsageError(f"hardware file {path}: {error}", error.hint) from error
        except (KeyError, TypeError, ValueError) as error:
            raise PlacerError(
                f"hardware file {path} cannot be read: {error!r}",
                f"it holds, for example:\n{_EXAMPLE}",
            ) from error


def require_hardware_path(path: Path) -> None:
    """Refuse an output that :meth:`Hardware.named` could not read.

    Raises
    ------
    UsageError
        If ``path`` is no ``.toml`` file.
    """
    if path.suffix != ".toml" or path.is_dir():
        raise UsageError(
            f"hardware files end in .toml, got {path}",
            "for example --out hardware.toml",
        )


def write_hardware(hardware: Hardware, path: Path) -> None:
    """Write a file that :meth:`Hardware.named` reads, figures to four digits."""
    lines = [f"{field} = {getattr(hardware, field):.3e}" for field in _FIGURES]
    lines.append(f"processor_share = {hardware.processor_share:.3f}")
    # A JSON string of printable ASCII is a TOML basic string too.
    lines += [f"source = {json.dumps(hardware.source)}", "notes = ["]
    lines += [*(f"  {json.dumps(note)}," for note in hardware.notes), "]"]
    if hardware.all_gather is not None:
        lines.append(_curve_text("all_gather", hardware.all_gather))
    for name, link in (("fast", hardware.fast), ("slow", hardware.slow)):
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {getattr(link, key):.3e}" for key in ("bandwidth", "latency")]
        if link.curves is not None:
            for way in _WAYS:
                lines.append(_curve_text(way, getattr(link.curves, way)))
    with atomic_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _curve_text(name: str, curve: Curve) -> str:
    pairs = zip(curve.num_bytes, curve.seconds, strict=True)
    return "\n".join(
        [f"{name} = [", *(f"  [{size:.0f}, {time:.3e}]," for size, time in pairs), "]"]
    )


@cache
def known_hardware() -> Mapping[str, Hardware]:
    """Return the hardware of the data file by name."""
    data = (resources.files("placer.target") / "hardware.toml").read_bytes()
    return {
        name: _read_hardware(name, value)
        for name, value in parse_toml(data, "hardware.toml").items()
    }


def _read_hardware(name: str, value: Mapping[str, Any]) -> Hardware:
    figures: dict[str, Any] = {field: float(value[field]) for field in _FIGURES}
    apart = (*_FIGURES, "fast", "slow", "all_gather", "notes")
    rest = {k: v for k, v in value.items() if k not in apart}
    gather = value.get("all_gather")
    return Hardware(
        name=name,
        fast=_read_link(value["fast"]),
        slow=_read_link(value["slow"]),
        all_gather=None if gather is None else Curve.of(gather),
        notes=tuple(value.get("notes", ())),
        **figures,
        **rest,
    )


def _read_link(value: Mapping[str, Any]) -> Link:
    figures = dict(value)
    curves = None
    if any(way in figures for way in _WAYS):
        curves = LinkCurves(**{way: Curve.of(figures.pop(way)) for way in _WAYS})
    return Link(**figures, curves=curves)
