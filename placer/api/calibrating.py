"""``placer.calibrate``: measure this cluster for the cost model."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from placer.api.files import AnyPath, writing
from placer.api.shown import Result, TitledTable
from placer.errors import UsageError, one_of
from placer.report.verdicts import verdict_of_calibration
from placer.run.worker import Worker, start_workers
from placer.run.writing import require_target
from placer.target.calibrate import (
    DEVICES,
    Calibration,
    CalibrationOptions,
    require_devices,
)
from placer.target.calibrate import calibrate as measure
from placer.target.hardware import require_hardware_path, write_hardware

# Beyond it, latency and bandwidth do not say how long an exchange takes.
_POOR_FIT = 0.25


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Calibrated(Result):
    """The links and processors of this cluster: :func:`placer.calibrate` makes one.

    Attributes
    ----------
    contents
        What the rest of placer works with; not part of the stable API.
    """

    contents: Calibration

    @property
    def notes(self) -> list[str]:
        """What two figures of a link do not say, and what was not measured."""
        poor = [
            f"{name} link: latency and bandwidth predict the time of an exchange with "
            f"an error of up to {fit.worst:.0%}; the file also holds the measured "
            "times, which the cost model uses"
            for name, fit in self.contents.links.items()
            if fit.worst > _POOR_FIT
        ]
        return [*poor, *self.contents.missing()]

    def tables(self) -> tuple[list[TitledTable], list[str]]:
        """Return what ``placer calibrate`` shows: links, and a sentence after them."""
        found = self.contents
        columns = (
            "link",
            "GB/s per rank",
            "latency us",
            "fit error (rms)",
            "fit error (max)",
        )
        rows = [
            (
                name,
                fit.link.bandwidth / 1e9,
                fit.link.latency * 1e6,
                f"{fit.residual:.1%}",
                f"{fit.worst:.1%}",
            )
            for name, fit in found.links.items()
        ]
        line = (
            f"bf16 {found.bf16_flops / 1e12:.3g} TFLOP/s, memory "
            f"{found.memory_bandwidth / 1e9:.3g} GB/s"
        )
        return [(None, columns, rows)], [line]


def calibrate(
    out: AnyPath,
    *,
    ranks: int | None = None,
    nodes: int = 1,
    device: str = "cpu",
    repetitions: int = 7,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Calibrated | None:
    """Measure the links and processors of this cluster, as ``placer calibrate`` does.

    Every process of torchrun makes the call: one for each rank.

    Parameters
    ----------
    out
        The ``.toml`` file to write. It is the ``hardware`` of other calls.
    ranks
        Number of ranks; as many as there are processes by default.
    nodes
        Number of nodes. Ranks are numbered node by node.
    device
        ``cpu`` (with gloo) or ``cuda`` (with NCCL).
    repetitions
        How often each measurement is made; the median is used.
    force
        Whether an earlier file at ``out`` is replaced.
    progress
        Called with what is measured, on the first process.

    Returns
    -------
    Calibrated or None
        On the first process; ``None`` on the others.

    Raises
    ------
    PlacerError
        If a rank has no GPU, no link can be fitted to the timings, or ``out`` exists.
    UsageError
        If there is only one process, or not as many as ranks, or an option has no such
        value.
    """
    place, worker = Path(out), Worker.of_environment()
    require_hardware_path(place)
    if worker.alone:
        raise UsageError(
            "only one process runs, which has no links to measure",
            "start more of this program: torchrun --nproc-per-node 2 PROGRAM",
        )
    options = _options(
        worker.number if ranks is None else ranks, nodes, device, repetitions
    )
    with nullcontext() if worker.index else writing(place, force=force, kinds=[]):
        require_devices(options, worker.local_index + 1)
        found = measure(options, worker, None if worker.index else progress)
        if worker.index:
            return None
        write_hardware(found.hardware(place.stem), place)
    return Calibrated(
        title="hardware",
        verdict=verdict_of_calibration(found, place),
        facts={"out": str(place), **found.to_json()},
        out=place,
        contents=found,
    )


def start_calibration(
    words: Sequence[str],
    out: Path,
    *,
    ranks: int | None,
    nodes: int,
    device: str,
    repetitions: int,
    force: bool,
) -> int | None:
    """Run ``placer calibrate`` as one process for each rank, on this machine.

    What each of them would refuse is refused here, before any starts.

    Parameters
    ----------
    words
        The words of the command line after ``placer calibrate``.
    out, ranks, nodes, device, repetitions, force
        What they say; as in :func:`calibrate`.

    Returns
    -------
    int or None
        The exit code; ``None`` where this process is one of those of torchrun.

    Raises
    ------
    PlacerError
        Those of :func:`calibrate`, or a process was ended by a signal.
    UsageError
        If ``ranks`` is missing.
    """
    require_hardware_path(out)
    if not Worker.of_environment().alone:
        return None
    if ranks is None:
        command = shlex.join(["placer", "calibrate", *words])
        raise UsageError(
            "--ranks is missing", f"start two on this machine: {command} --ranks 2"
        )
    options = _options(ranks, nodes, device, repetitions)
    require_target(out, directory=False, force=force)
    require_devices(options, ranks)
    return start_workers(ranks, ["calibrate", *words])


def _options(ranks: int, nodes: int, device: str, repetitions: int) -> CalibrationOptions:
    return CalibrationOptions(
        num_ranks=ranks,
        num_nodes=nodes,
        device=one_of("--device", device, DEVICES),
        repetitions=repetitions,
    )
