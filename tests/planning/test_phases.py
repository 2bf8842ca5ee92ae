"""Which phase's tokens figures come from, and which batches nobody runs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from placer.cli.main import app
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.trace import Chunk, TraceWriter


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., str]:
    """Run a command on 40 sequences of ten tokens, all of prefill; return its stderr."""
    ids = np.random.default_rng(0).integers(0, 8, (400, 1)).astype(np.uint8)
    chunk = Chunk(
        experts=(np.concatenate([ids, (ids + 1) % 8], axis=1),),
        sequence_ids=(np.arange(400) // 10).astype(np.int32),
        positions=(np.arange(400) % 10).astype(np.int32),
        phase=np.zeros(400, dtype=np.uint8),
    )
    model = ModelSpec(num_experts=(8,), top_k=2, hidden_size=64)
    with TraceWriter(directory=tmp_path / "trace", model=model) as writer:
        writer.append(chunk)
        writer.finish()

    def run(command: str, *words: str) -> str:
        given = [command, str(tmp_path / "trace"), *words]
        if command != "simulate":
            given += ["--gpus-per-node", "4"]
        else:
            given.insert(1, str(tmp_path / "plan.json"))
        if command == "solve":
            given += ["--out", str(tmp_path / "plan.json"), "--force", "--proof", "none"]
        return CliRunner().invoke(app, given, catch_exceptions=False).stderr

    return run


@pytest.mark.parametrize("phase", [(), ("--phase", "prefill")])
def test_tokens_of_the_other_phase_are_told_by_every_command(
    told: Callable[..., str], phase: tuple[str, ...]
) -> None:
    """The trace records prefill alone, asked for or not."""
    expected = "decode is judged by prefill tokens"
    assert expected in told("solve", "--engine", "sglang-deepep-ll", *phase)
    for command in ("advise", "simulate"):
        assert expected in told(command, "--engine", "sglang-deepep-ll", *phase)
        assert expected not in told(command, "--engine", "sglang-deepep", *phase)
    assert expected not in told("solve", "--engine", "sglang-deepep", *phase)


def test_sizes_that_no_engine_is_run_for_are_told(told: Callable[..., str]) -> None:
    told("solve", "--engine", "sglang-deepep")
    for command in ("advise", "simulate"):
        words = (command, "--engine", "sglang-deepep", "--tokens-per-rank")
        assert (
            "--tokens-per-rank 64 is left out: these are decode batches, and "
            "sglang-deepep is not run for decode" in told(*words, "64,4096")
        )
        assert "left out" not in told(*words, "4096")
        assert "left out" not in told(command, "--engine", "sglang-deepep")
        with pytest.raises(UsageError, match="is run for prefill"):
            told(*words, "64")
