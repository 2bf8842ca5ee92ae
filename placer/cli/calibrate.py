"""``placer calibrate``: measure this cluster for the cost model."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from placer.cli.inputs import WORDS
from placer.cli.output import (
    ForceOption,
    JsonOption,
    claim,
    note,
    print_json,
    print_line,
    print_next,
    print_table,
    print_verdict,
    progress_line,
)
from placer.errors import one_of

# Beyond it, latency and bandwidth do not say how long an exchange takes.
_POOR_FIT = 0.25


def calibrate(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="The .toml file to write.")],
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Number of ranks to start on this machine. Leave it out under torchrun."
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option(help="Number of nodes. Ranks are numbered node by node.")
    ] = 1,
    device: Annotated[
        str, typer.Option(help="What to measure: cpu (with gloo) or cuda (with NCCL).")
    ] = "cpu",
    repetitions: Annotated[
        int, typer.Option(help="How often each measurement is made. The median is used.")
    ] = 7,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the links and processors of this cluster.

    Give the file to --hardware of simulate, advise or solve, which then predict time.
    replay takes it with --elsewhere. On several machines, start calibrate with torchrun on
    each of them. Rank 0 writes the file.
    """
    from placer.errors import UsageError
    from placer.report.verdicts import verdict_of_calibration
    from placer.run.worker import Worker, start_workers
    from placer.run.writing import require_target
    from placer.target.calibrate import DEVICES, CalibrationOptions, require_devices
    from placer.target.calibrate import calibrate as measure
    from placer.target.hardware import require_hardware_path, write_hardware

    require_hardware_path(out)
    worker = Worker.of_environment()
    if worker.alone and ranks is None:
        command = shlex.join([*context.command_path.split(), *context.meta[WORDS]])
        raise UsageError(
            "--ranks is missing",
            f"start two on this machine: {command} --ranks 2",
        )
    options = CalibrationOptions(
        num_ranks=worker.number if ranks is None else ranks,
        num_nodes=nodes,
        device=one_of("--device", device, DEVICES),
        repetitions=repetitions,
    )
    if worker.alone:
        require_target(out, directory=False, force=force)
        require_devices(options, options.num_ranks)
        words = [
            f"--{name}={value}"
            for name, value in (
                ("out", out),
                ("ranks", ranks),
                ("nodes", nodes),
                ("device", device),
                ("repetitions", repetitions),
            )
        ]
        flags = [*["--json"] * as_json, *["--force"] * force]
        raise typer.Exit(start_workers(options.num_ranks, ["calibrate", *words, *flags]))
    if not worker.index:
        claim(context, out, [], force=force, kinds=[])
    require_devices(options, worker.local_index + 1)
    if worker.index:
        measure(options, worker)
        return
    with progress_line("measuring") as progress:
        found = measure(options, worker, progress)
    write_hardware(found.hardware(out.stem), out)
    for name, fit in found.links.items():
        if fit.worst > _POOR_FIT:
            note(
                f"{name} link: latency and bandwidth predict the time of an exchange with "
                f"an error of up to {fit.worst:.0%}; the file also holds the measured "
                "times, which the cost model uses"
            )
    for sentence in found.missing():
        note(sentence)
    verdict = verdict_of_calibration(found, out)
    if as_json:
        print_json({"verdict": verdict.to_json(), "out": str(out), **found.to_json()})
        return
    print_verdict(verdict)
    print_table(
        ("link", "GB/s per rank", "latency us", "fit error (rms)", "fit error (max)"),
        [
            (
                name,
                fit.link.bandwidth / 1e9,
                fit.link.latency * 1e6,
                f"{fit.residual:.1%}",
                f"{fit.worst:.1%}",
            )
            for name, fit in found.links.items()
        ],
    )
    print_line(
        f"bf16 {found.bf16_flops / 1e12:.3g} TFLOP/s, memory "
        f"{found.memory_bandwidth / 1e9:.3g} GB/s"
    )
    print_line(f"wrote {out}")
    print_next(verdict)
