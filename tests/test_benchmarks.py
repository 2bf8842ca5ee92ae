"""The benchmarks, which `make test` does not run, can be run."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_benchmark_can_be_collected() -> None:
    files = sorted((ROOT / "tests/benchmarks").glob("bench_*.py"))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *map(str, files)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout
    assert all(file.name in done.stdout for file in files)
