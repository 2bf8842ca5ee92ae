"""Advice on traffic that was made so that the right answer is known."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.cli.main import main
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.placement.topology import Topology
from placer.planning.advice import (
    Advice,
    advise_on_loads,
    next_command,
)
from placer.planning.question import (
    Question,
    usual_engines,
)
from placer.planning.trace_advice import (
    advise_on_trace,
    changed,
)
from placer.simulation.cost import ExpertShape
from placer.solver.search.pair_search import Search
from placer.target.engine import (
    Engine,
    engines_named,
)
from placer.target.hardware import Hardware
from placer.trace import (
    Chunk,
    Trace,
    TraceWriter,
)

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
    """Each of experts 0 to 3 has a partner of 4 to 7, always used together with it.

    All are used as often, in every sequence, so that no placement is busier than another;
    contiguous and the load balancer part them.
    """
    quarters = np.tile(np.arange(4), (40, num_tokens // 160))
    first = np.random.default_rng(0).permuted(quarters, axis=1).ravel()
    return np.stack([first, 4 + (first + 2) % 4], axis=1)


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


def advised(trace: Trace, question: Question = QUESTION) -> Advice:
    return advise_on_trace(trace, [question])


def test_partners_are_worth_placing(tmp_path: Path) -> None:
    trace = write(tmp_path / "t", partners())
    advice = advised(trace)
    assert advice.verdict == "worth it"
    # Apart: two ranks of four, at any home 2 x 3/4 copies; together half of that.
    for answer in advice.answers:
        assert answer.verdict == "worth it"
        for name, copies in (("contiguous", 1.5), ("placed", 0.75)):
            for one in answer.candidates[name]:
                assert one.sent_per_token == pytest.approx(copies, abs=0.05)
        assert "worth it. placing lowers copies sent by 50." in answer.sentence
    assert "--policy fixed" in next_command(advice, trace.directory, [QUESTION])
    few, filled = advice.warnings
    assert few == "20 held-out sequences are too few to trust: 30 are needed"
    assert filled.startswith("2,000 tokens do not fill batches of 16,384")


def test_what_keeping_to_the_load_of_eplb_costs_is_told(tmp_path: Path) -> None:
    """Of uneven partners, 1.05 of the mean: EPLB parts them, a cap of 1.10 does not."""
    first = np.random.default_rng(0).choice(4, 8000, p=[0.2625, 0.2625, 0.2375, 0.2375])
    trace = write(tmp_path / "trace", np.stack([first, first + 4], axis=1))
    (answer,) = advise_on_trace(trace, [replace(QUESTION, engine=None)]).answers[:1]
    sent = {name: found[0].sent_per_token for name, found in answer.candidates.items()}
    assert sent["placed"] == pytest.approx(1.5, abs=0.01)
    assert sent["placed, cap 1.10"] == pytest.approx(0.75, abs=0.01)
    assert "with a load cap of 1.10 in place of EPLB's load it lowers" in answer.sentence
    assert "(--max-imbalance 1.1)" in answer.sentence
    even = write(tmp_path / "even", partners())
    (answer,) = advise_on_trace(even, [QUESTION]).answers[:1]
    assert "load cap" not in answer.sentence, "there it costs nothing"


def test_without_an_engine_both_usual_exchanges_are_answered(tmp_path: Path) -> None:
    """All-gather gains nothing from partners on one rank, the all-to-all half."""
    trace = write(tmp_path / "t", partners())
    questions = [replace(QUESTION, engine=one) for one in usual_engines(1)]
    advice = advise_on_trace(trace, questions)
    found = {(one.engine, one.phase): one.verdict for one in advice.answers}
    assert found == {
        ("default all-gather", "prefill"): "not worth it",
        ("default all-gather", "decode"): "not worth it",
        ("token all-to-all", "prefill"): "worth it",
        ("token all-to-all", "decode"): "worth it",
    }
    command = next_command(advice, trace.directory, questions)
    assert command is not None
    assert "--engine" not in command


def test_a_family_is_answered_by_phase(tmp_path: Path) -> None:
    trace = write(tmp_path / "t", partners())
    questions = [replace(QUESTION, engine=one) for one in engines_named("vllm")]
    advice = advise_on_trace(trace, questions)
    answered = {(one.engine, one.phase) for one in advice.answers}
    assert answered == {
        (one.name, phase) for one in engines_named("vllm") for phase in one.phases
    }
    command = next_command(advice, trace.directory, questions)
    assert command is not None
    assert f"--engine {advice.best.engine}" in command


def test_a_figure_that_rises_is_not_said_to_fall() -> None:
    assert changed("copies sent", 1.0, 1.042) == (
        "raises copies sent by 4.2 % (1.000 to 1.042 per token and layer)"
    )
    assert changed("copies sent", 2.0, 1.5).startswith("lowers copies sent by 25.0 %")


def test_redundant_experts_are_named_where_one_expert_is_hot(tmp_path: Path) -> None:
    """Half of all pairs are of expert 0: no rank that holds it is near the mean."""
    rng = np.random.default_rng(0)
    other = rng.integers(1, 8, size=4000)
    trace = write(tmp_path / "t", np.stack([np.zeros(4000, dtype=int), other], axis=1))

    def reasons(engine: str) -> str:
        question = replace(QUESTION, engine=Engine.named(engine))
        return " ".join(advised(trace, question).reasons)

    assert "--redundant-experts 4" in reasons("sglang-deepep")
    assert "--redundant-experts" not in reasons("transformers-a2a"), "it loads no map"


def test_ctrl_c_ends_the_command_not_its_quick_plan(
    make_trace: Callable[..., Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(search: Search, number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "_round", interrupt)
    trace = make_trace(num_experts=(16, 16), num_sequences=8)
    with pytest.raises(KeyboardInterrupt):
        advised(trace)


def test_where_placement_cannot_change_traffic_balance_is_judged(tmp_path: Path) -> None:
    question = replace(QUESTION, engine=Engine.named("sglang-none"))
    advice = advised(write(tmp_path / "p", partners()), question)
    assert advice.verdict == "not worth it", "the load of partners is even already"
    assert "every token goes to every rank" in advice.reasons[0]
    assert all("placed" not in one.candidates for one in advice.answers)
    trace = write(tmp_path / "h", hot())
    advice = advised(trace, question)
    assert advice.verdict == "balance only"
    assert "--objective balance" in next_command(advice, trace.directory, [question])


def test_even_chance_is_worth_nothing(tmp_path: Path) -> None:
    trace = write(tmp_path / "t", even())
    advice = advised(trace)
    assert advice.verdict == "not worth it"
    assert next_command(advice, trace.directory, [QUESTION]) is None


def test_time_is_the_measure_where_hardware_is_given(tmp_path: Path) -> None:
    """With links next to infinitely fast, halving the copies saves no time."""
    trace = write(tmp_path / "t", partners())
    shape = ExpertShape(hidden_size=64, intermediate_size=4096)
    hardware = Hardware.named("h100")
    timed = replace(QUESTION, hardware=hardware, expert=shape)
    fast = replace(hardware, fast=replace(hardware.fast, bandwidth=1e18))
    assert advised(trace, replace(timed, hardware=fast)).verdict == "not worth it"
    slow = replace(hardware, fast=replace(hardware.fast, bandwidth=1e6))
    advice = advised(trace, replace(timed, hardware=slow))
    assert advice.verdict == "worth it"
    for answer in advice.answers:
        assert len(answer.break_even) == len(answer.candidates["placed"])
        assert "placed is faster than contiguous (a layer -" in answer.sentence
    with pytest.raises(UsageError, match="without the size of an expert"):
        advised(trace, replace(timed, expert=None))


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


def test_where_only_copies_fill_the_ranks_the_fewest_are_advised(tmp_path: Path) -> None:
    """Eight experts on three ranks: one more. The next command runs."""
    trace = write(tmp_path / "t", hot())
    three = replace(QUESTION, topology=Topology(gpus_per_node=3))
    counts = count_affinity([trace.read()], MODEL, {})
    for advice in (
        advise_on_loads(counts, three),
        advise_on_trace(trace, [replace(three, engine=Engine.named("vllm-deepep-ll"))]),
    ):
        assert advice.redundant_experts == 1
        assert advice.verdict == "balance only"
    command = next_command(advice, trace.directory, [three])
    assert command is not None and "--redundant-experts 1 --replica-choice hash" in command
    words = command.split()[1:]
    words[-1] = str(tmp_path / "plan.json")
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 0
