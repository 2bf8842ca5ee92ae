"""GPUs and links of the cost model: ``placer/hardware.toml`` or a user's file."""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from placer.errors import PlacerError, UsageError
from placer.files import atomic_file, require_file

_FIGURES = ("bf16_flops", "fp8_flops", "memory_bandwidth")
_EXAMPLE = """bf16_flops = 989e12
fp8_flops = 1979e12
memory_bandwidth = 3.35e12
fast = { bandwidth = 380e9, latency = 20e-6 }
slow = { bandwidth = 44e9, latency = 25e-6 }"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link class: bytes per second and direction of one GPU, and seconds per transfer."""

    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        if not (0 < self.bandwidth < math.inf and 0 <= self.latency < math.inf):
            raise UsageError(
                f"a link needs a positive bandwidth and a latency of at least 0, got "
                f"{self.bandwidth:g} and {self.latency:g}",
                "bandwidth is in bytes per second, latency in seconds",
            )


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
    source: str = "the user's own file"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in _FIGURES:
            if not 0 < getattr(self, field) < math.inf:
                raise UsageError(
                    f"hardware {self.name}: {field} must be positive and finite, got "
                    f"{getattr(self, field):g}"
                )

    def flops(self, weight_bytes: float) -> float:
        """Return operations per second for weights of this many bytes per element."""
        return self.bf16_flops if weight_bytes > 1 else self.fp8_flops

    @classmethod
    def named(cls, name: str) -> "Hardware":
        """Return known hardware, or that of a TOML file with the same keys.

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
                f"choose among {', '.join(known)}, or name a .toml file",
            )
        require_file(path, "hardware file")
        try:
            return _read_hardware(
                path.stem, tomllib.loads(path.read_text(encoding="utf-8"))
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlacerError(
                f"hardware file {path} cannot be read: {error!r}",
                f"it holds, for example:\n{_EXAMPLE}",
            ) from error


def require_hardware_path(path: Path) -> None:
    """Refuse to write hardware where :meth:`Hardware.named` would not read it.

    Raises
    ------
    UsageError
        If ``path`` is no ``.toml`` file.
    """
    if path.suffix != ".toml" or path.is_dir():
        raise UsageError(
            f"hardware is written to a .toml file, not to {path}",
            "name one: --out hardware.toml",
        )


def write_hardware(hardware: Hardware, path: Path) -> None:
    """Write a file that :meth:`Hardware.named` reads, figures to four digits."""
    figures = [f"{field} = {getattr(hardware, field):.3e}" for field in _FIGURES]
    links = [
        f"{name} = {{ bandwidth = {link.bandwidth:.3e}, latency = {link.latency:.3e} }}"
        for name, link in (("fast", hardware.fast), ("slow", hardware.slow))
    ]
    # A JSON string of printable ASCII is a TOML basic string too.
    notes = [f"  {json.dumps(note)}," for note in hardware.notes]
    lines = [
        *figures,
        *links,
        f"source = {json.dumps(hardware.source)}",
        "notes = [",
        *notes,
        "]",
    ]
    with atomic_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


@cache
def known_hardware() -> Mapping[str, Hardware]:
    """Return the hardware of the data file by name."""
    text = (resources.files("placer") / "hardware.toml").read_text(encoding="utf-8")
    return {
        name: _read_hardware(name, value) for name, value in tomllib.loads(text).items()
    }


def _read_hardware(name: str, value: Mapping[str, Any]) -> Hardware:
    figures: dict[str, Any] = {field: float(value[field]) for field in _FIGURES}
    rest = {k: v for k, v in value.items() if k not in (*_FIGURES, "fast", "slow", "notes")}
    return Hardware(
        name=name,
        fast=Link(**value["fast"]),
        slow=Link(**value["slow"]),
        notes=tuple(value.get("notes", ())),
        **figures,
        **rest,
    )
