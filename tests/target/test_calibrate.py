"""A calibration by real processes, and the file that it writes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import placer
from placer.cli.main import main
from placer.errors import PlacerError, UsageError
from placer.placement.reference import contiguous
from placer.run.worker import Worker
from placer.target.calibrate import (
    Calibration,
    CalibrationOptions,
    calibrate,
    require_devices,
)
from placer.target.hardware import Hardware, write_hardware
from placer.target.link_fit import fit_link
from placer.trace import Trace

PLACER = (sys.executable, "-m", "placer.cli.main")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


@pytest.mark.parametrize(
    ("num_ranks", "num_nodes", "missing"), [(2, 1, "slow"), (2, 2, "fast"), (4, 2, None)]
)
def test_the_file_is_read_back_and_says_what_was_not_measured(
    tmp_path: Path, num_ranks: int, num_nodes: int, missing: str | None
) -> None:
    fit = fit_link([0, 1_000_000], [12.34e-6, 12.34e-6 + 1e-3])
    other = fit_link([0, 1_000_000], [5e-3, 1.0])
    found = Calibration(
        options=CalibrationOptions(num_ranks=num_ranks, num_nodes=num_nodes),
        bf16_flops=1.5e12,
        memory_bandwidth=2.5e10,
        fast=None if missing == "fast" else fit,
        slow=None if missing == "slow" else other,
    )
    path = tmp_path / "mine.toml"
    write_hardware(found.hardware("mine"), path)
    read = Hardware.named(str(path))
    assert (read.name, read.source) == ("mine", "placer calibrate")
    assert (read.bf16_flops, read.fp8_flops) == (1.5e12, 1.5e12)
    assert read.memory_bandwidth == 2.5e10
    if missing != "fast":
        assert read.fast.latency == pytest.approx(12.34e-6, rel=1e-3)
        assert read.fast.bandwidth == pytest.approx(1e9, rel=1e-3)
    if missing != "slow":
        assert read.slow.bandwidth == pytest.approx(1e6 / 0.995, rel=1e-3)
    if missing:
        assert read.fast == read.slow
    told = [one for one in read.notes if "taken from the" in one]
    assert [one.split(":")[0] for one in told] == ([missing] if missing else [])


@pytest.fixture(scope="module")
def run_directly(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("calibrate") / "here.toml"
    words = ("calibrate", "--ranks", "2", "--repetitions", "1", "--json", "--out", out)
    done = subprocess.run([*PLACER, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "slow: not measured" in done.stderr
    return out, json.loads(done.stdout)


def test_two_processes_measure_the_link_between_them(
    run_directly: tuple[Path, dict],
) -> None:
    out, told = run_directly
    hardware = Hardware.named(str(out))
    assert hardware.fast == hardware.slow
    fast = told["fast"]
    assert told["slow"] is None
    assert hardware.fast.bandwidth == pytest.approx(fast["bandwidth_bytes_per_s"], rel=1e-3)
    assert fast["num_bytes"][:3] == [1, 1024, 2048]
    assert len(fast["seconds"]) == len(fast["num_bytes"])
    assert hardware.fast.curves is not None
    assert list(hardware.fast.curves.both_ways.num_bytes) == fast["num_bytes"]
    assert fast["one_way"][1][0] == 1024, "one rank sends to the other"
    assert hardware.all_gather is not None
    assert hardware.all_gather.num_bytes[1] == 1024
    assert fast["seconds"][-1] > fast["seconds"][1], "more bytes take longer"
    assert hardware.bf16_flops > 0
    assert 0 < hardware.processor_share <= 1


def test_simulate_reads_what_was_measured(
    run_directly: tuple[Path, dict],
    make_trace: Callable[..., Trace],
    write_plan: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A dispatch of at most 128 copies of 64 bytes takes a time that was measured."""
    out, _ = run_directly
    trace = make_trace()
    plan = write_plan(trace.model, contiguous(trace.model.num_experts, 2))
    sizes = "--tokens-per-rank 64 --hidden-size 32 --expert-size 16"
    with pytest.raises(SystemExit) as ended:
        main(f"simulate {plan} {trace.directory} --hardware {out} {sizes} --json".split())
    assert ended.value.code == 0
    (batches,) = json.loads(capsys.readouterr().out)["batches"]["plan"]
    link = Hardware.named(str(out)).fast
    assert link.curves is not None
    most = max(
        np.interp(128 * 64, one.num_bytes, one.seconds)
        for one in (link.curves.both_ways, link.curves.one_way)
    )
    least = link.curves.both_ways.seconds[0]
    assert least * 1e6 - 1 <= batches["time"]["dispatch_us"] <= most * 1e6 + 1


def test_workers_of_torchrun_measure_both_links(tmp_path: Path) -> None:
    out = tmp_path / "both.toml"
    words = ("calibrate", "--nodes", "2", "--repetitions", "1", "--out", str(out))
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node=4", "-m", "placer.cli.main", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1, "one worker speaks"
    assert [path.name for path in tmp_path.iterdir()] == ["both.toml"]
    hardware = Hardware.named(str(out))
    notes = hardware.notes
    assert notes[0].startswith("4 ranks on 2 nodes, cpu, gloo")
    # Two ranks of a node have one peer each; between the nodes each rank has two.
    assert notes[1].startswith("fast: fitted to all-to-all exchanges of 1 to")
    assert notes[2].startswith("slow: fitted to all-to-all exchanges of 2 to")
    # One way each rank of the first node sends to one of the other; each gives its bytes
    # to three ranks in an all-gather.
    assert hardware.slow.curves is not None
    assert hardware.slow.curves.one_way.num_bytes[:2] == (1, 1024)
    assert hardware.all_gather is not None
    assert hardware.all_gather.num_bytes[:2] == (3, 3072)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--out h.toml", "--ranks is missing"),
        ("--ranks 1 --out h.toml", "a link needs at least two ranks"),
        ("--ranks 0 --out h.toml", "a link needs at least two ranks, got --ranks 0"),
        ("--ranks 3 --nodes 2 --out h.toml", "--ranks 3 on --nodes 2"),
        ("--ranks 2 --nodes 0 --out h.toml", "on --nodes 0"),
        ("--ranks 2 --device tpu --out h.toml", "--device tpu is not known"),
        ("--ranks 2 --repetitions 0 --out h.toml", "--repetitions must be at least 1"),
        ("--ranks 2 --out h.json", r"files end in \.toml, got h\.json"),
        ("--ranks 2 --out .", r"files end in \.toml"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_process_starts(
    words: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", *words.split()])
    printed = capfd.readouterr().err
    assert ended.value.code == 2, printed
    assert printed.startswith("placer: ")
    assert len(printed.splitlines()) == 2, "one sentence and the remedy"
    assert re.search(message, printed)
    assert not list(tmp_path.iterdir())


def test_workers_must_be_as_many_as_the_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--ranks is 4, but torchrun started 2 workers"):
        placer.calibrate(tmp_path / "h.toml", ranks=4)


def test_one_process_alone_measures_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no links to measure") as refused:
        placer.calibrate(tmp_path / "h.toml", ranks=2)
    assert "torchrun --nproc-per-node 2" in str(refused.value.hint)
    assert not list(tmp_path.iterdir())


def test_every_rank_needs_a_gpu_of_its_own() -> None:
    import torch

    number = torch.cuda.device_count() + 1
    options = CalibrationOptions(num_ranks=2, device="cuda")
    with pytest.raises(PlacerError, match=f"{number} ranks .* it has {number - 1}"):
        require_devices(options, number)
    worker = Worker(index=number - 1, number=max(number, 2), local_index=number - 1)
    with pytest.raises(PlacerError, match=f"has no GPU: the machine has {number - 1}"):
        calibrate(replace(options, num_ranks=worker.number), worker)


@pytest.mark.parametrize(
    "line",
    [
        "bf16_flops = nan",
        "memory_bandwidth = inf",
        "fast = { bandwidth = nan, latency = 0 }",
        "slow = { bandwidth = 1e9, latency = nan }",
        "slow = { bandwidth = 1e9, latency = inf }",
    ],
)
def test_hardware_of_figures_that_are_no_numbers_is_refused(
    tmp_path: Path, line: str
) -> None:
    known = {
        "bf16_flops": "1e12",
        "fp8_flops": "1e12",
        "memory_bandwidth": "1e12",
        "fast": "{ bandwidth = 1e9, latency = 1e-6 }",
        "slow": "{ bandwidth = 1e9, latency = 1e-6 }",
    }
    path = tmp_path / "h.toml"
    path.write_text("\n".join(f"{key} = {value}" for key, value in known.items()))
    assert Hardware.named(str(path)).fast.bandwidth == 1e9
    key, _, value = line.partition(" = ")
    known[key] = value
    path.write_text("\n".join(f"{key} = {value}" for key, value in known.items()))
    with pytest.raises(PlacerError, match="which is not a finite number"):
        Hardware.named(str(path))
