"""Advice on traffic that was made so that the right answer is known."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from placer.affinity import Affinity, count_affinity
from placer.cli.main import main
from placer.cli.output import TokensPerRankOption
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.placement.reference import contiguous
from placer.placement.topology import Topology
from placer.planning.advice import Advice, Answer, advise_on_loads, next_command
from placer.planning.advised_plans import (
    BALANCED,
    CAPPED,
    GUARDED,
    advised_plans,
    solve_command,
)
from placer.planning.judge import Serving, judge_plan
from placer.planning.question import Question, usual_engines
from placer.planning.trace_advice import advise_on_trace, percents
from placer.serving.homes import TOKENS_PER_RANK
from placer.simulation.batch_figures import BatchOptions, batch_steps
from placer.simulation.cost import ExpertShape
from placer.solver.search.pair_search import Search
from placer.target.engine import Engine, engines_named
from placer.target.hardware import Hardware
from placer.trace import Chunk, Fold, Selection, Trace, TraceWriter

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


BUSIER = "less traffic, busier rank"


def above_eplb(answer: Answer) -> list[float]:
    """Return the load of the best plan's busiest rank over EPLB's, less one."""
    both = zip(answer.candidates[answer.best], answer.candidates["eplb"], strict=True)
    return [(one.straggler or 0) / (even.straggler or 1) - 1 for one, even in both]


def test_partners_are_worth_placing(tmp_path: Path) -> None:
    trace = write(tmp_path / "t", partners())
    advice = advised(trace)
    assert advice.verdict == "worth it"
    # Apart: two ranks of four, at any home 2 x 3/4 copies; together half of that.
    for answer in advice.answers:
        # Two partners on one rank load it by two at once: it is busier in small batches.
        is_busier = any(more > 0.03 for more in above_eplb(answer))
        assert answer.verdict == (BUSIER if is_busier else "worth it")
        for name, copies in (("contiguous", 1.5), (CAPPED, 0.75)):
            for one in answer.candidates[name]:
                assert one.sent_per_token == pytest.approx(copies, abs=0.05)
        told = f'{answer.verdict}. Plan "{answer.best}" compared with contiguous: '
        assert told in answer.sentence
        assert ": copies sent -5" in answer.sentence
    assert "--policy fixed" in next_command(advice, trace.directory)
    few, filled = advice.warnings
    assert few == "20 held-out sequences are too few to trust: 30 are needed"
    assert filled.startswith("2,000 tokens do not fill batches of 16,384")


def test_the_verdict_is_that_of_the_best_plan_that_is_shown(tmp_path: Path) -> None:
    """Of uneven partners, 1.05 of the mean: EPLB parts them, a cap of 1.10 does not."""
    first = np.random.default_rng(0).choice(4, 8000, p=[0.2625, 0.2625, 0.2375, 0.2375])
    trace = write(tmp_path / "trace", np.stack([first, first + 4], axis=1))
    advice = advised(trace)
    for answer in advice.answers:
        sent = {name: found[0].sent_per_token for name, found in answer.candidates.items()}
        assert sent[GUARDED] == pytest.approx(1.5, abs=0.01)
        assert sent[CAPPED] == pytest.approx(0.75, abs=0.01)
        assert min(above_eplb(answer)) > 0.03
        assert (answer.verdict, answer.best) == (BUSIER, CAPPED)
        told = f'{BUSIER}. Plan "{CAPPED}" compared with contiguous: copies sent -'
        assert told in answer.sentence
    command = next_command(advice, trace.directory, ["--least-gain", "0.03"])
    assert command == (
        f"placer advise {trace.directory} --gpus-per-node 4 --policy fixed "
        "--least-gain 0.03 --hardware h100 --model MODEL"
    )
    tolerant = advised(trace, replace(QUESTION, least_gain=0.4))
    assert (tolerant.verdict, tolerant.best.best) == ("worth it", CAPPED)
    command = next_command(tolerant, trace.directory)
    assert command is not None and "--max-imbalance 1.1 --relax-cap" in command
    even = advised(write(tmp_path / "even", partners())).best
    assert even.best == GUARDED, "there EPLB's load costs nothing"


def test_the_next_command_gives_the_row_of_the_verdict(tmp_path: Path) -> None:
    """Run as it is printed: the same copies and busiest rank, on the same sequences."""
    for name, experts, engine in (
        ("partners", partners(), "sglang-deepep"),
        ("hot", hot(), "sglang-none"),
        ("plain", hot(), None),
    ):
        trace = write(tmp_path / name, experts)
        known = None if engine is None else Engine.named(engine)
        advice = advised(trace, replace(QUESTION, engine=known))
        best = advice.best
        command = solve_command(best.question, best.options, trace.directory)
        told = next_command(advice, trace.directory)
        assert told == (None if advice.verdict == "EPLB does as well" else command)
        words = shlex.split(command)[1:]
        words[-1] = str(plan := tmp_path / f"{name}.json")
        assert run(words) == 0
        heldout = Selection(Fold(0, 2)).complement()
        (judged,) = judge_plan(
            plan, trace, selection=heldout, servings=[Serving(engine=known)]
        )
        rows = advice.best.candidates[advice.best.best]
        made = {one.shape.tokens_per_rank: one.metrics for one in judged.batches["plan"]}
        for row in rows:
            assert row.tokens_per_rank is not None
            found = made[row.tokens_per_rank]
            assert row.straggler == pytest.approx(found.straggler_mean, abs=1e-9)
            copies = found.dispatch_fast_copies_per_token
            assert row.sent_per_token in (None, pytest.approx(copies, abs=1e-9))


def grouped_trace(directory: Path) -> Trace:
    """Two groups of four experts: the router takes both experts of one; the first is hot.

    Whole on a node each, one node has three quarters of the load.
    """
    rng = np.random.default_rng(0)
    group = rng.choice(2, 4000, p=[0.75, 0.25])
    pair = np.argsort(rng.random((4000, 4)), axis=1)[:, :2]
    model = ModelSpec(num_experts=(8,), top_k=2, n_group=2, topk_group=1)
    sequences = np.arange(4000) // 100
    with TraceWriter(directory=directory, model=model) as writer:
        writer.append(
            Chunk(
                experts=((4 * group[:, None] + pair).astype(np.uint8),),
                sequence_ids=sequences.astype(np.int32),
                positions=(np.arange(4000) % 100).astype(np.int32),
            )
        )
        writer.finish()
    return Trace(directory)


def test_router_groups_stay_as_whole_as_the_next_command_leaves_them(
    tmp_path: Path,
) -> None:
    """Whole groups on two nodes of two ranks: 1.5 of the mean, copies or not."""
    trace = grouped_trace(tmp_path / "t")
    two = Topology(num_nodes=2, gpus_per_node=2)
    question = replace(QUESTION, topology=two, engine=Engine.named("sglang-deepep"))
    advice = advised(trace, question)
    for one in advice.best.candidates[BALANCED]:
        assert one.straggler == pytest.approx(1.5, abs=0.05)
    assert not any("redundant experts" in text for text in advice.reasons)
    question = replace(question, engine=Engine.named("sglang-none"))
    for one in advised(trace, question).best.candidates[BALANCED]:
        assert one.straggler is not None and one.straggler < 1.1, "it may split them"


def test_without_an_engine_both_usual_exchanges_are_answered(tmp_path: Path) -> None:
    """All-gather gains nothing from partners on one rank, the all-to-all half.

    In small batches a rank with partners is busier.
    """
    trace = write(tmp_path / "t", partners())
    questions = [replace(QUESTION, engine=one) for one in usual_engines(1)]
    advice = advise_on_trace(trace, questions)
    found = {(one.engine, one.phase): one.verdict for one in advice.answers}
    assert found == {
        ("default all-gather", "prefill"): "not worth it",
        ("default all-gather", "decode"): "not worth it",
        ("token all-to-all", "prefill"): "worth it",
        ("token all-to-all", "decode"): BUSIER,
    }
    command = next_command(advice, trace.directory)
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
    command = next_command(advice, trace.directory)
    assert command is not None
    assert f"--engine {advice.best.engine}" in command


@pytest.mark.parametrize("nodes", [1, 2])
def test_nodes_that_an_engine_takes_otherwise_are_told_before_the_solve(
    nodes: int, tmp_path: Path
) -> None:
    """Of a trace and of its counts; once, whatever else the family has."""
    trace = write(tmp_path / "trace", partners())
    ranks = Topology(num_nodes=nodes, gpus_per_node=4 // nodes)
    asked = [replace(QUESTION, topology=ranks, engine=e) for e in engines_named("sglang")]
    counts = advise_on_loads(
        count_affinity([trace.read()], MODEL, {}), asked[:2], tmp_path / "counts"
    )
    for advice in (advise_on_trace(trace, asked[:2]), counts):
        told = [text for text in advice.warnings if "as one NVLink node" in text]
        assert len(told) == nodes - 1


def test_a_figure_that_rises_is_not_said_to_fall() -> None:
    assert percents([-0.042]) == "+4.2 %"
    assert percents([0.25, 0.25]) == "-25.0 %"


def test_redundant_experts_are_named_where_one_expert_is_hot(tmp_path: Path) -> None:
    """Half of all pairs are of expert 0: no rank that holds it is near the mean."""
    rng = np.random.default_rng(0)
    other = rng.integers(1, 8, size=4000)
    trace = write(tmp_path / "t", np.stack([np.zeros(4000, dtype=int), other], axis=1))

    def reasons(engine: str) -> str:
        question = replace(QUESTION, engine=Engine.named(engine))
        return " ".join(advised(trace, question).reasons)

    assert "--redundant-experts 4" in reasons("sglang-deepep")
    told = reasons("transformers-a2a")
    assert "redundant experts" not in told, "it loads no map"


def test_redundant_experts_are_not_named_where_they_gain_nothing(tmp_path: Path) -> None:
    """A random half says little of the other: what is even on it is not on the other."""
    rng = np.random.default_rng(0)
    topic = np.repeat(rng.permuted(np.tile(np.arange(8), 5)), 100)
    trace = write(tmp_path / "t", np.stack([topic, (topic + 1) % 8], axis=1))
    advice = advised(trace, replace(QUESTION, engine=Engine.named("sglang-deepep")))
    told = [text for text in advice.reasons if "--redundant-experts" in text]
    for text in told:
        with_more, without = map(float, re.findall(r"(\d\.\d{3}) (?:of|without)", text))
        assert with_more <= 0.97 * without


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
    assert all(CAPPED not in one.candidates for one in advice.answers)
    trace = write(tmp_path / "h", hot())
    advice = advised(trace, question)
    for answer in advice.answers:
        does_as_well = max(above_eplb(answer)) >= 0
        assert answer.verdict == ("EPLB does as well" if does_as_well else "balance only")
    command = next_command(advice, trace.directory)
    if advice.verdict == "EPLB does as well":
        assert command is None, "the engine's own EPLB needs no plan"
    else:
        assert "--objective balance" in command


def test_even_chance_is_worth_nothing(tmp_path: Path) -> None:
    trace = write(tmp_path / "t", even())
    advice = advised(trace)
    assert advice.verdict == "not worth it"
    assert next_command(advice, trace.directory) is None


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
        assert len(answer.break_even) == len(answer.candidates[answer.best])
        assert f'Plan "{answer.best}" compared with contiguous: layer -' in answer.sentence
    with pytest.raises(UsageError, match="needs the size of an expert"):
        advised(trace, replace(timed, expert=None))


def test_loads_alone_judge_balance(tmp_path: Path) -> None:
    counted = count_affinity(write(tmp_path / "h", hot()).chunks(), MODEL, {})
    alone = replace(counted, transition=(), coactivation=())
    assert advise_on_loads(alone, [QUESTION], tmp_path).verdict == "balance only"
    counted = count_affinity(write(tmp_path / "p", partners()).chunks(), MODEL, {})
    assert advise_on_loads(counted, [QUESTION], tmp_path).verdict == "not worth it"


@pytest.mark.parametrize("nodes", [2, 3])
def test_loads_alone_name_router_groups(
    nodes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What keeping them whole costs, or that more nodes than groups must split them."""
    model = ModelSpec(num_experts=(12,), top_k=2, n_group=4, topk_group=1)
    loads = np.array([40, 40, 40, *[10] * 9]) * 100
    counts = Affinity(model=model, num_tokens=10_500, load=(loads,))
    counts.write(tmp_path / "grouped.aff")
    words = ["advise", str(tmp_path / "grouped.aff"), "--nodes", str(nodes)]
    assert run([*words, "--gpus-per-node", "2" if nodes == 2 else "1"]) == 0
    out = capsys.readouterr().out
    if nodes == 2:  # 120 and 30 of 210 against 60 and 45 are on the two nodes
        assert re.search(r"- router groups stay whole: imbalance (\S+), (\S+) if they", out)
    else:
        assert "- the 4 router groups are split over 3 nodes: a token can then visit" in out


@pytest.fixture
def hot_loads(tmp_path: Path) -> Path:
    """Eight experts on eight ranks: without replicas all placements are as uneven."""
    loads = np.array([600, 560, 120, 120, 20, 10, 10, 10]) * 1000
    counts = Affinity(
        model=ModelSpec(num_experts=(8,), top_k=2), num_tokens=725_000, load=(loads,)
    )
    counts.write(tmp_path / "hot.aff")
    return tmp_path / "hot.aff"


def test_loads_that_only_redundant_experts_even_out_name_them(
    hot_loads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command reaches the printed figure; engines with one answer share a line."""
    words = ["advise", str(hot_loads), "--gpus-per-node", "8"]
    for engine in ([], ["--engine", "sglang"], ["--engine", "deepspeed"]):
        capsys.readouterr()
        assert run([*words, *engine]) == 0
        out = capsys.readouterr().out
        # 600 of 1,450 pairs on one of eight ranks.
        assert " ".join(out.split()).count("(3.310 to 3.310") == 1
        if engine == ["--engine", "deepspeed"]:
            assert "redundant" not in out and "next:" not in out
            continue
        assert "not worth it without redundant experts" in " ".join(out.split())
        first = re.search(
            r"with 8 redundant experts the busiest rank has\s+(\S+)\s+of[^:]*:\s+"
            r"(placer .*)",
            out,
        )
        assert first is not None
        assert f"next: {first[2]}\n" in out
        plan = tmp_path / f"{len(engine)}.json"
        command = shlex.split(first[2])[1:]
        command[command.index("plan.json")] = str(plan)
        assert run([*command, "--json"]) == 0
        solver = json.loads(plan.read_text())["solver"]
        assert f"{solver['predicted_imbalance']:.3f}" == first[1]


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


def test_with_hardware_the_plan_can_be_timed_as_it_was_advised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed commands make the plan of the verdict, and predict its time."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t", partners())
    sizes = ["--hidden-size", "7168", "--expert-size", "256", "--weight-bytes", "2"]
    sizes = ["--tokens-per-rank", "4096", "--hardware", "h100", *sizes]
    words = ["advise", "t", "--gpus-per-node", "4", "--engine", "trtllm-onesided", *sizes]
    assert run([*words, "--json"]) == 0
    advised = json.loads(capsys.readouterr().out)
    assert run(shlex.split(advised["next"])[1:]) == 0
    timing = shlex.split(advised["then"])[1:]
    assert timing[-len(sizes) :] == sizes
    capsys.readouterr()
    assert run([*timing, "--json"]) == 0
    timed = json.loads(capsys.readouterr().out)["batches"]["plan"][0]["time"]["total_us"]
    (answer,) = advised["answers"]
    assert timed == pytest.approx(answer["candidates"][answer["best"]][0]["time_us"], 1e-3)


THREE = replace(QUESTION, topology=Topology(gpus_per_node=3))
FIVE = replace(QUESTION, topology=Topology(gpus_per_node=5))


def run(words: list[str]) -> int:
    with pytest.raises(SystemExit) as done:
        main(words)
    return int(done.value.code or 0)


@pytest.mark.parametrize("engine", [None, "sglang-none"])
def test_where_only_copies_fill_the_ranks_the_fewest_are_advised(
    tmp_path: Path, engine: str | None
) -> None:
    """Eight experts on three ranks: one more. The next command runs."""
    trace = write(tmp_path / "t", hot())
    one = usual_engines(1)[0] if engine is None else Engine.named(engine)
    asked = [replace(THREE, engine=one)]
    counts = count_affinity([trace.read()], MODEL, {})
    counts.write(tmp_path / "counts")
    for number, (advice, source) in enumerate(
        (
            (advise_on_loads(counts, asked, tmp_path / "counts"), tmp_path / "counts"),
            (advise_on_trace(trace, asked), trace.directory),
        )
    ):
        assert advice.redundant_experts == 1
        assert (
            "8 experts do not divide over 3 ranks: every placement, contiguous and EPLB's "
            "too, has 1 redundant expert"
        ) in advice.reasons
        found = advice.best.candidates
        does_as_well = "eplb" in found and max(above_eplb(advice.best)) >= 0
        assert advice.verdict == ("EPLB does as well" if does_as_well else "balance only")
        if "eplb" in found:
            assert any("sends at least 3 % less than" in one for one in advice.reasons)
        command = next_command(advice, source)
        if does_as_well:
            assert command is None
            continue
        assert command is not None and "--redundant-experts 1" in command
        assert (f"--engine {engine}" in command) == (engine is not None)
        words = command.split()[1:]
        words[-1] = str(tmp_path / f"plan{number}.json")
        assert run(words) == 0


def test_no_copies_are_advised_to_an_engine_that_loads_no_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the hint names is accepted; ``solve`` refuses the same with the same words."""
    trace = write(tmp_path / "t", hot())
    counts = count_affinity([trace.read()], MODEL, {})
    asked = [replace(THREE, engine=one) for one in engines_named("vllm")]
    with pytest.raises(UsageError, match="8 experts do not divide over 3 ranks") as error:
        advise_on_trace(trace, asked)
    assert "vLLM loads no map" in error.value.message
    with pytest.raises(UsageError) as other:
        advise_on_loads(counts, asked, tmp_path)
    assert str(other.value) == str(error.value)
    assert error.value.hint == (
        "choose a number of ranks (nodes x GPUs per node) among 1, 2, 4, 8; or an engine "
        "that loads a map: "
        "sglang, trtllm"
    )
    for engine, ranks in (("vllm-agrs", 4), ("sglang-none", 3)):
        advise = ["advise", str(trace.directory), "--engine", engine]
        assert run([*advise, "--gpus-per-node", str(ranks)]) == 0
    capsys.readouterr()
    for copies in ("0", "1"):
        solve = ["solve", str(trace.directory), "--engine", asked[0].served.name]
        solve += ["--redundant-experts", copies, "--gpus-per-node", "3"]
        assert run([*solve, "--out", str(tmp_path / "plan.json")]) == 2
        assert error.value.message in capsys.readouterr().err


def test_engines_that_cannot_be_started_are_left_out_of_a_family(tmp_path: Path) -> None:
    trace = write(tmp_path / "t", partners())
    two = replace(QUESTION, topology=Topology(num_nodes=2, gpus_per_node=2))
    every = engines_named("sglang")
    advice = advise_on_trace(trace, [replace(two, engine=one) for one in every])
    alone = [one.name for one in every if one.within]
    assert alone and not {one.engine for one in advice.answers} & set(alone)
    told = [text for text in advice.warnings if text.startswith("left out: ")]
    assert [name for name in alone if any(name in text for text in told)] == alone


def sent(answer: Answer) -> dict[str, list[float | None]]:
    return {
        name: [one.sent_per_token for one in every]
        for name, every in answer.candidates.items()
    }


def test_each_engine_is_judged_by_a_plan_for_its_own_choice(tmp_path: Path) -> None:
    """Whoever is asked about first: SGLang's static draws differ from the hash."""
    trace = write(tmp_path / "t", hot())
    names = ("sglang-deepep", "trtllm-onesided")
    asked = {name: replace(FIVE, engine=Engine.named(name)) for name in names}
    together = advise_on_trace(trace, [asked["trtllm-onesided"], asked["sglang-deepep"]])
    for answer in together.answers:
        assert answer.engine is not None
        (alone,) = [
            one
            for one in advised(trace, asked[answer.engine]).answers
            if one.phase == answer.phase
        ]
        assert sent(answer) == sent(alone)


def test_the_draws_of_an_engine_know_which_layers_are_dense(tmp_path: Path) -> None:
    """The figures are those of the model's own layer numbers, and a warning where none."""
    trace = write(tmp_path / "t", hot())
    question = replace(FIVE, engine=Engine.named("sglang-deepep"))
    advice = advised(trace, question)
    assert any("no file says which layers are dense" in text for text in advice.warnings)
    numbered = msgspec.structs.replace(MODEL, layer_ids=(3, 7))
    with TraceWriter(directory=tmp_path / "n", model=numbered) as writer:
        writer.append(trace.read())
        writer.finish()
    own = Trace(tmp_path / "n")
    known = advised(own, question)
    assert not any("layers are dense" in text for text in known.warnings)
    heldout = own.read(Selection(Fold(0, 2)).complement())
    options = BatchOptions(
        policy="fixed",
        exchanges=("per-node", "per-node"),
        replica_choice="sglang-static",
        layer_ids=(3, 7),
    )
    (answer,) = known.answers
    (shape,) = question.answered
    metrics = batch_steps(contiguous((8, 8), 5, 1, 2), heldout, shape, options).figures()
    copies = metrics.metrics.dispatch_fast_copies_per_token
    assert answer.candidates["contiguous"][0].sent_per_token == pytest.approx(copies)
    (before,) = advice.answers
    assert sent(before) != sent(answer)


def test_engines_that_send_pairs_are_advised_to_balance(tmp_path: Path) -> None:
    """As `solve` does. SGLang serves a pair at home where it can: replicas count there."""
    trace = write(tmp_path / "t", partners())
    engine = Engine.named("sglang-deepep-ll")
    for question, reason in (
        (QUESTION, "can only balance"),
        (THREE, "only the number of replicas matters"),
    ):
        advice = advised(trace, replace(question, engine=engine))
        assert list(advice.answers[0].candidates) == ["contiguous", "eplb", BALANCED]
        assert any(reason in text for text in advice.reasons)


def test_from_counts_the_engine_says_which_copy_serves(tmp_path: Path) -> None:
    counts = count_affinity([write(tmp_path / "t", hot()).read()], MODEL, {})
    asked = [
        replace(THREE, engine=Engine.named(name))
        for name in ("sglang-none", "sglang-deepep")
    ]
    even, drawn = advise_on_loads(counts, asked, tmp_path).answers
    assert (even.engine, drawn.engine) == ("sglang-none", "sglang-deepep")
    assert even.candidates != drawn.candidates


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--hardware", "h100"),
        ("--batching", "decode"),
        ("--tokens-per-rank", "64"),
        ("--policy", "follow"),
    ],
)
def test_counts_refuse_what_only_tokens_can_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    path = tmp_path / "counts"
    count_affinity([write(tmp_path / "t", hot()).read()], MODEL, {}).write(path)
    assert run(["advise", str(path), "--gpus-per-node", "4", option, value]) == 2
    assert f"{option} {value} is for a trace" in capsys.readouterr().err


def test_help_shows_the_sizes_of_batches_that_are_served() -> None:
    assert TokensPerRankOption.__metadata__[0].show_default == ",".join(
        map(str, TOKENS_PER_RANK)
    )


def test_replicas_for_an_engine_that_sends_pairs_are_balanced_as_they_are_solved() -> None:
    """Under fixed; for other homes which pairs are remote counts."""
    pairs = replace(QUESTION, engine=Engine.named("sglang-deepep-ll"), redundant_experts=4)
    assert pairs.sent is not None, "which experts have replicas changes what is sent"
    assert list(advised_plans(pairs, MODEL)) == [BALANCED]
    assert CAPPED in advised_plans(replace(pairs, policy="follow"), MODEL)
    others = replace(pairs, engine=Engine.named("sglang-deepep"))
    assert CAPPED in advised_plans(others, MODEL)
