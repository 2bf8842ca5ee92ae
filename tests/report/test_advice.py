"""Advice on traffic that was made so that the right answer is known."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.cli.main import main
from placer.engine import Engine
from placer.errors import UsageError
from placer.hardware import Hardware
from placer.model import ModelSpec
from placer.plan.problem import Topology
from placer.plan.search import Search
from placer.report.advice import Question, advise_on_loads, advise_on_trace, next_command
from placer.simulation.cost import ExpertShape
from placer.trace import Chunk, Trace, TraceWriter

MODEL = ModelSpec(num_experts=(8, 8), top_k=2)
FOUR = Topology(gpus_per_node=4)
QUESTION = Question(topology=FOUR)


def write(directory: Path, experts: np.ndarray) -> Trace:
    """Write both layers' experts ``[T, 2]``, 40 sequences."""
    num_tokens = len(experts)
    sequences = np.arange(num_tokens) * 40 // num_tokens
    chunk = Chunk(
        experts=(experts.astype(np.uint8),) * 2,
        sequence_ids=sequences.astype(np.int32),
        positions=(np.arange(num_tokens) % (num_tokens // 40)).astype(np.int32),
    )
    with TraceWriter(directory=directory, model=MODEL) as writer:
        writer.append(chunk)
        writer.finish()
    return Trace(directory)


def partners(num_tokens: int = 4000) -> np.ndarray:
    """Experts e and e + 4 are always used together, all as often: contiguous parts them."""
    first = np.random.default_rng(0).integers(4, size=num_tokens)
    return np.stack([first, first + 4], axis=1)


def hot(num_tokens: int = 4000) -> np.ndarray:
    """Experts 0 and 1, neighbours, have most of the load; who else is used is chance."""
    rng = np.random.default_rng(0)
    weight = np.array([6, 6, 1, 1, 1, 1, 1, 1])
    keys = np.log(weight) + rng.gumbel(size=(num_tokens, 8))
    return np.argsort(-keys, axis=1)[:, :2]


def even(num_tokens: int = 4000) -> np.ndarray:
    return np.random.default_rng(0).permuted(
        np.tile(np.arange(8), (num_tokens, 1)), axis=1
    )[:, :2]


def test_partners_are_worth_placing(tmp_path: Path) -> None:
    trace = write(tmp_path / "t", partners())
    advice = advise_on_trace(trace, QUESTION)
    assert advice.verdict == "worth it"
    # Apart: two ranks of four, at any home 2 x 3/4 copies; together half of that.
    assert advice.candidates["contiguous"].copies_per_token == pytest.approx(1.5, abs=0.05)
    assert advice.candidates["placed"].copies_per_token == pytest.approx(0.75, abs=0.05)
    assert "--policy fixed" in next_command(advice, trace.directory, QUESTION)
    assert advice.warnings == ("20 held-out sequences are too few to trust: 30 are needed",)


def test_ctrl_c_ends_the_command_not_its_quick_plan(
    make_trace: Callable[..., Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(search: Search, number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "_round", interrupt)
    trace = make_trace(num_experts=(16, 16), num_sequences=8)
    with pytest.raises(KeyboardInterrupt):
        advise_on_trace(trace, QUESTION)


def test_where_placement_cannot_change_traffic_balance_is_judged(tmp_path: Path) -> None:
    question = replace(QUESTION, engine=Engine.named("sglang-none"))
    advice = advise_on_trace(write(tmp_path / "p", partners()), question)
    assert advice.verdict == "not worth it", "the load of partners is even already"
    assert "every token goes to every rank" in advice.reasons[0]
    assert "placed" not in advice.candidates
    trace = write(tmp_path / "h", hot())
    advice = advise_on_trace(trace, question)
    assert advice.verdict == "balance only"
    assert "--objective balance" in next_command(advice, trace.directory, question)


def test_even_chance_is_worth_nothing(tmp_path: Path) -> None:
    trace = write(tmp_path / "t", even())
    advice = advise_on_trace(trace, QUESTION)
    assert advice.verdict == "not worth it"
    assert next_command(advice, trace.directory, QUESTION) is None


def test_time_is_the_measure_where_hardware_is_given(tmp_path: Path) -> None:
    """With links next to infinitely fast, halving the copies saves no time."""
    trace = write(tmp_path / "t", partners())
    shape = ExpertShape(hidden_size=64, intermediate_size=4096)
    hardware = Hardware.named("h100")
    timed = replace(QUESTION, hardware=hardware, expert=shape)
    fast = replace(hardware, fast=replace(hardware.fast, bandwidth=1e18))
    assert advise_on_trace(trace, replace(timed, hardware=fast)).verdict == "not worth it"
    slow = replace(hardware, fast=replace(hardware.fast, bandwidth=1e6))
    advice = advise_on_trace(trace, replace(timed, hardware=slow))
    assert advice.verdict == "worth it"
    assert advice.break_even is not None
    with pytest.raises(UsageError, match="without the size of an expert"):
        advise_on_trace(trace, replace(timed, expert=None))


def test_loads_alone_judge_balance(tmp_path: Path) -> None:
    counted = count_affinity(write(tmp_path / "h", hot()).chunks(), MODEL, {})
    alone = replace(counted, transition=(), coactivation=())
    assert advise_on_loads(alone, QUESTION).verdict == "balance only"
    counted = count_affinity(write(tmp_path / "p", partners()).chunks(), MODEL, {})
    assert advise_on_loads(counted, QUESTION).verdict == "not worth it"


def test_the_command_prints_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "t", partners())
    arguments = ["advise", str(tmp_path / "t"), "--gpus-per-node", "4"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--json"])
    assert done.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == "worth it"
    assert printed["next"].startswith("placer solve")
