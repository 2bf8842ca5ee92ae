"""What to solve for by predicted time, on traffic whose answer is known."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.cli.main import main
from placer.errors import NoSolutionError, UsageError
from placer.model import ModelSpec
from placer.placement import Placement
from placer.placement.topology import Topology
from placer.planning import layer_time
from placer.planning.layer_time import (
    BALANCED,
    TimeChoice,
    choose,
    choose_by_time,
    worth_by_time,
)
from placer.planning.question import Question
from placer.run.deadline import Deadline
from placer.run.session import Session
from placer.serving.homes import batch_shapes
from placer.simulation.batch_figures import (
    BatchFigures,
    BatchMetrics,
    BatchSteps,
    batch_steps,
)
from placer.simulation.cost import ExpertShape, PredictedTime
from placer.solver.balance import exact_balance
from placer.solver.balance.router_groups import are_whole
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.solve import solve
from placer.target.engine import Engine
from placer.target.hardware import Hardware
from placer.trace import Chunk, TraceWriter
from tests.plans import changed

MODEL = ModelSpec(num_experts=(8, 8), top_k=2)
FOUR = Topology(gpus_per_node=4)
OPTIONS = SolveOptions(topology=FOUR)
H100 = Hardware.named("h100")
QUESTION = Question(
    topology=FOUR,
    hardware=H100,
    expert=ExpertShape(hidden_size=64, intermediate_size=64),
)


def tokens(weight: tuple[float, ...] = (1, 1, 1, 1), num_tokens: int = 4000) -> Chunk:
    """Experts e and e + 4 are always used together, by these weights; 40 sequences."""
    share = np.array(weight) / sum(weight)
    first = np.random.default_rng(0).choice(4, size=num_tokens, p=share)
    experts = np.stack([first, first + 4], axis=1).astype(np.uint8)
    # All of one fold: the inner split must not go by the parity of the id.
    sequences = np.arange(num_tokens) * 40 // num_tokens * 2
    return Chunk(
        experts=(experts, experts),
        sequence_ids=sequences.astype(np.int32),
        positions=(np.arange(num_tokens) % (num_tokens // 40)).astype(np.int32),
    )


def chosen(weight: tuple[float, ...], bandwidth: float) -> TimeChoice:
    fast = replace(H100.fast, bandwidth=bandwidth, latency=0.0)
    question = replace(QUESTION, hardware=replace(H100, fast=fast))
    return choose_by_time(MODEL, tokens(weight), OPTIONS, question)


def made(*figures: tuple[float, ...]) -> tuple[BatchFigures, ...]:
    """Return figures of batches: straggler, seconds and those with overlap (1)."""
    return tuple(one_size(*one) for one in figures)


def one_size(straggler: float, total: float, overlapped: float = 1.0) -> BatchFigures:
    zero = dict.fromkeys(BatchMetrics.__dataclass_fields__, 0)
    time = dict.fromkeys(PredictedTime.__dataclass_fields__, 0.0)
    return BatchFigures(
        shape=batch_shapes((64,))[0],
        metrics=BatchMetrics(**zero | {"straggler_mean": straggler}),  # type: ignore[arg-type]
        time=PredictedTime(**time | {"total": total, "overlapped": overlapped}),
    )


def test_the_quickest_is_chosen_among_those_as_even_as_the_load_balancer() -> None:
    even, quick = made((1.2, 5.0)), made((1.2, 4.0))
    assert choose({BALANCED: even, "a": made((1.3, 1.0)), "b": quick}) == "b"
    assert (
        choose({BALANCED: even, "a": made((1.3, 1.0)), "b": made((1.1, 6.0))}) == BALANCED
    )


def test_every_size_of_batches_counts_alike_and_has_its_own_limit() -> None:
    """Half of the time at the small size outweighs a tenth more at the large one."""
    balanced = made((1.2, 1.0), (1.1, 100.0))
    small, large = made((1.2, 0.5), (1.1, 110.0)), made((1.2, 1.1), (1.1, 90.0))
    assert choose({BALANCED: balanced, "small": small, "large": large}) == "small"
    uneven = made((1.2, 0.1), (1.11, 1.0))
    assert choose({BALANCED: balanced, "uneven": uneven}) == BALANCED


def test_an_engine_is_timed_in_the_batches_that_it_is_run_for() -> None:
    for name, sizes in (("sglang-deepep", [4096]), ("sglang-deepep-ll", [64, 256])):
        question = replace(QUESTION, engine=Engine.named(name))
        found = choose_by_time(MODEL, tokens(), OPTIONS, question)
        assert [shape.tokens_per_rank for shape, _ in found.break_even_by_size] == sizes


def test_a_quicker_plan_that_is_left_out_is_told() -> None:
    found = chosen((1, 1, 1, 1), 1e9)
    made_up = {BALANCED: made((1.2, 5.0)), "a": made((1.3, 4.0))}
    told = replace(found, name=BALANCED, figures=made_up).told
    assert told is not None
    assert told.startswith(
        "a takes 20.0% less predicted time, but is not used. Its straggler is 1.3000"
    )
    as_even = {BALANCED: made((1.2, 5.0)), "a": made((1.2, 4.0))}
    assert replace(found, name="a", figures=as_even).told is None


def test_a_busier_plan_is_taken_where_it_is_faster_with_overlap_too() -> None:
    found = chosen((1, 1, 1, 1), 1e9)
    balanced = made((1.2, 5.0, 2.0), (1.1, 9.0, 4.0))
    busier = made((1.3, 4.0, 1.8), (1.2, 8.0, 3.6))
    made_up = {BALANCED: balanced, "a": busier}
    assert choose(made_up) == "a"
    told = replace(found, name="a", figures=made_up).told
    assert told is not None
    assert told.startswith("a is used, although its straggler is 1.3000 / 1.2000")
    assert told.endswith("takes 10.0% less predicted time with two-batch overlap")
    hidden = made((1.3, 4.0, 1.8), (1.2, 8.0, 4.0))
    assert choose({BALANCED: balanced, "a": hidden}) == BALANCED


def test_the_choice_agrees_with_every_candidates_figures() -> None:
    """Whatever the links: nothing that is as even as the balancer takes less time."""
    for bandwidth in (1e6, 1e18):
        found = chosen((1, 1, 1, 1), bandwidth)
        base = found.figures[BALANCED]

        def allowed(figures: Sequence[BatchFigures]) -> bool:
            both = list(zip(figures, base, strict=True))  # noqa: B023  # called here only
            return all(
                one.metrics.straggler_mean <= other.metrics.straggler_mean
                for one, other in both
            ) or all(one.time.overlapped < other.time.overlapped for one, other in both)  # type: ignore[union-attr]

        def time(figures: Sequence[BatchFigures]) -> float:
            both = zip(figures, base, strict=True)  # noqa: B023  # called here only
            return sum(one.time.total / other.time.total for one, other in both)  # type: ignore[union-attr]

        assert len(found.figures) == 7
        assert allowed(found.figures[found.name])
        for one in filter(allowed, found.figures.values()):
            assert time(found.figures[found.name]) <= time(one) + 1e-9


def test_the_load_cap_is_never_exceeded() -> None:
    with pytest.raises(NoSolutionError, match="out of reach"):
        capped = changed(OPTIONS, max_imbalance=1.1)
        choose_by_time(MODEL, tokens((9, 1, 1, 1)), capped, QUESTION)
    # Experts e and e + 4 together save all copies, and put 1.5 times the mean on a rank.
    profile = tokens((3, 2, 2, 1))
    found = choose_by_time(MODEL, profile, changed(OPTIONS, max_imbalance=1.3), QUESTION)
    placement, _ = solve(count_affinity([profile], MODEL, {}), found.options, None, profile)
    for layer, ids in enumerate(profile.experts):
        load = np.bincount(placement.expert_rank(layer)[ids].ravel(), minlength=4)
        assert load.max() <= 1.3 * load.mean()


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UsageError, match="needs the hardware"):
        choose_by_time(MODEL, tokens(), OPTIONS, replace(QUESTION, hardware=None))
    one = tokens()
    one = one.select(one.sequence_ids == 0)
    with pytest.raises(UsageError, match="only one"):
        choose_by_time(MODEL, one, changed(OPTIONS, relax=True), QUESTION)
    served = Placement.from_expert_rank([np.arange(8) // 2] * 2, 4)
    with pytest.raises(UsageError, match="compares new plans"):
        choose_by_time(MODEL, one, changed(OPTIONS, placement=served), QUESTION)
    # The load balancer may be chosen, and knows no such cap.
    capped = changed(OPTIONS, max_received_copies=1.0)
    with pytest.raises(UsageError, match="--max-received-copies 1 cannot be used with"):
        choose_by_time(MODEL, tokens(), capped, QUESTION)
    with pytest.raises(UsageError, match="--max-received-copies 1 cannot be used with"):
        worth_by_time(MODEL, tokens(), QUESTION)(capped, Session())


def test_the_command_records_the_choice_and_repeats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TraceWriter(directory=tmp_path / "t", model=MODEL) as writer:
        writer.append(tokens())
        writer.finish()
    words = ["solve", str(tmp_path / "t"), "--gpus-per-node", "4", "--objective", "time"]
    words += ["--hidden-size", "64", "--expert-size", "64", "--relax-cap"]
    for name in ("a.json", "b.json"):
        with pytest.raises(SystemExit) as done:
            main([*words, "--hardware", "h100", "--out", str(tmp_path / name), "--force"])
        assert done.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "least predicted time" in printed
    told = "decode, 64 tokens per rank: compared with the load balancer, the fastest "
    assert told + "plan for traffic is" in printed
    plans = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    assert plans[0]["provenance"]["time"] == plans[1]["provenance"]["time"]
    assert plans[0]["physical_to_logical_map"] == plans[1]["physical_to_logical_map"]
    capped = ["--objective", "traffic", "--hardware", "h100", "--max-imbalance", "1.1"]
    for wrong in (["--out", "c"], capped):
        with pytest.raises(SystemExit) as done:
            main([*words, *wrong, "--out", str(tmp_path / "c.json")])
        assert done.value.code == 2


def test_without_time_one_candidate_is_tried_and_the_deadline_tells() -> None:
    session = Session(deadline=Deadline(seconds=0.0))
    with session.choosing() as quick:
        choice = choose_by_time(MODEL, tokens(), OPTIONS, QUESTION, quick)
    assert len(choice.figures) == 2
    assert choice.name in choice.figures
    assert not session.deadline.reproducible


def grouped(num_tokens: int = 2000) -> tuple[ModelSpec, Chunk]:
    """Tokens of a router that uses two of eight groups, some of which are hot."""
    model = ModelSpec(num_experts=(32,), top_k=4, n_group=8, topk_group=2)
    rng = np.random.default_rng(0)
    hot = np.log(rng.lognormal(0, 0.7, 8))
    group = np.argsort(-(hot + rng.gumbel(size=(num_tokens, 8))), axis=1)[:, :2]
    first = rng.integers(0, 2, size=(num_tokens, 2)) * 2
    experts = (group[:, :, None] * 4 + first[:, :, None] + [0, 1]).reshape(num_tokens, 4)
    sequences = np.arange(num_tokens) * 40 // num_tokens
    return model, Chunk(
        experts=(experts.astype(np.uint8),),
        sequence_ids=sequences.astype(np.int32),
        positions=(np.arange(num_tokens) % (num_tokens // 40)).astype(np.int32),
    )


def test_the_load_balancer_that_is_judged_is_the_one_that_is_delivered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where balancing keeps router groups on nodes, so does what it is judged by."""
    model, profile = grouped()
    topology = Topology(num_nodes=4, gpus_per_node=2)
    options = SolveOptions(
        topology=topology, goal=Goal(redundant_experts=8, replica_choice="hash")
    ).quick()
    served: list[Placement] = []

    def noted(placement: Placement, *others: Any) -> BatchSteps:
        served.append(placement)
        return batch_steps(placement, *others)

    monkeypatch.setattr(layer_time, "batch_steps", noted)
    question = replace(QUESTION, topology=topology, shapes=batch_shapes((64,)))
    choose_by_time(model, profile, options, question)
    judged, *others = served
    assert are_whole(judged, 8, 4)
    inner, _ = layer_time.judged_halves(profile)
    asked = changed(options, objective="balance")
    delivered, _ = solve(count_affinity([inner], model, {}), asked)
    assert judged.to_json() == delivered.to_json()
    assert not any(are_whole(one, 8, 4) for one in others), "for traffic they are split"


def test_the_deadline_stops_the_load_balancer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer that CP-SAT would work on, with the deadline passed: it is not asked."""

    def never(*_: object) -> None:
        pytest.fail("CP-SAT was started")

    load = [600, 560, 120, 120, 20, 10, 10, 10]
    experts = np.random.default_rng(0).permutation(np.repeat(np.arange(8), load))
    profile = Chunk(
        experts=(experts[:, None].astype(np.uint8),),
        sequence_ids=(np.arange(1450) // 29).astype(np.int32),
        positions=(np.arange(1450) % 29).astype(np.int32),
    )
    model, topology = ModelSpec(num_experts=(8,), top_k=1), Topology(gpus_per_node=8)
    options = SolveOptions(
        topology=topology, goal=Goal(redundant_experts=8, replica_choice="hash")
    )
    question = replace(QUESTION, topology=topology, shapes=batch_shapes((64,)))
    monkeypatch.setattr(exact_balance, "repeatable_solver", never)
    deadline = Deadline(seconds=0.0)
    choose_by_time(model, profile, options.quick(), question, Session(deadline=deadline))
    assert not deadline.reproducible
