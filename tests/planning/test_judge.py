"""A plan file beside its baselines, and what is said about the figures."""

import dataclasses

import numpy as np
import pytest

from placer.affinity.count import expert_load
from placer.affinity.from_traces import affinity_of_traces
from placer.baseline import BASELINES, BaselineProblem
from placer.errors import PlacerError, UsageError
from placer.placement import Placement
from placer.placement.reference import contiguous
from placer.placement.topology import Topology
from placer.planning.judge import Serving, judge_plan
from placer.planning.planner import plan_from_affinity
from placer.planning.tables import TableOptions, make_table
from placer.planning.verdict import fact_lines, verdict_lines
from placer.report.batches import batch_tables, summary_table
from placer.report.comparison import comparison_table
from placer.serving.homes import batch_shapes
from placer.simulation import simulate
from placer.simulation.cost import ExpertShape
from placer.solver.balance.load_caps import balanced
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.table import build_table
from placer.target.engine import Engine, engines_named
from placer.target.hardware import Hardware
from placer.trace import Fold, Selection
from tests.plans import unsolved_plan

EVEN = contiguous((8,) * 3, 4)


@pytest.fixture
def plan_of(write_plan):
    """Return a writer of a plan for a trace, contiguous unless another is given."""

    def write(trace, placement=None, **provenance):
        placed = placement or contiguous(trace.model.num_experts, 4)
        return write_plan(trace.model, placed, **provenance)

    return write


def judged_plan(plan, trace, serving=None, **options):
    """Judge a plan that is served in one way."""
    (found,) = judge_plan(plan, trace, servings=(serving or Serving(),), **options)
    return found


def test_policies_and_baselines_are_those_of_simulate(make_trace, plan_of):
    """Balanced sees the load of the plan's own profile fold, and nothing else."""
    trace = make_trace(num_sequences=40)
    plan = plan_of(trace, fold="0/2", trace_sha256=trace.sha256)
    judged = judged_plan(plan, trace, selection=Selection(Fold(1, 2)))
    tokens = trace.read(Selection(Fold(1, 2)))
    load = expert_load(trace, Selection(Fold(0, 2)))
    assert judged.policies == simulate(contiguous((8,) * 3, 4), tokens)
    assert judged.baselines["balanced"] == simulate(balanced(load, 4), tokens)
    value = judged.to_json()
    assert list(value["baselines"]) == ["contiguous", "balanced", "eplb"]
    assert value["tokens"] == tokens.num_tokens
    assert (value["layers"], value["top_k"]) == (3, 2)


def test_the_load_of_a_fold_is_counted_exactly(make_trace):
    trace = make_trace()
    tokens = trace.read(Selection(Fold(0, 2)))
    for counts, experts in zip(
        expert_load(trace, Selection(Fold(0, 2))), tokens.experts, strict=True
    ):
        assert counts.tolist() == [int((experts == e).sum()) for e in range(8)]


def test_sequences_that_the_plan_was_solved_on_are_named(make_trace, plan_of):
    trace = make_trace(num_sequences=40)
    num_sequences = len(np.unique(trace.read().sequence_ids))

    def warnings(judged_on, **provenance):
        recorded = {"trace_sha256": trace.sha256} | provenance
        judged = judged_plan(
            plan_of(trace, **recorded), trace, selection=Selection(judged_on)
        )
        return " ".join(w for w in judged.warnings if "too good" in w)

    assert f"{num_sequences} of the {num_sequences}" in warnings(None)
    assert "solve with --fold 0/2" in warnings(None)
    assert "simulate with --not-fold 0/2" in warnings(None, fold="0/2")
    assert "simulate with --fold 1/3" in warnings(None, fold="not 1/3")
    assert warnings(Fold(1, 2), fold="0/2") == ""
    assert warnings(Fold(1, 2, inverted=True), fold="not 0/2") == ""
    assert warnings(Fold(1, 2), fold="not 0/2") != ""
    assert warnings(None, trace_sha256="0" * 64) == ""


def test_a_plan_from_counts_has_seen_the_traces_that_were_counted(make_trace, tmp_path):
    counted, other = make_trace("counted"), make_trace("other", seed=1)
    affinity_of_traces([counted], Selection(Fold(0, 2))).write(tmp_path / "counts")
    options = SolveOptions(
        topology=Topology(gpus_per_node=4), goal=Goal(caps=Caps(relax=True))
    )
    plan_from_affinity(tmp_path / "counts", options).write(tmp_path / "plan.json")

    def warnings(trace):
        judged = judged_plan(tmp_path / "plan.json", trace)
        return " ".join(w for w in judged.warnings if "too good" in w)

    seen = len(np.unique(counted.read(Selection(Fold(0, 2))).sequence_ids))
    assert f"{seen} of the" in warnings(counted)
    assert "simulate with --not-fold 0/2" in warnings(counted)
    assert warnings(other) == ""


def test_sequences_that_the_table_was_built_from_are_named(make_trace, plan_of, tmp_path):
    """The plan has not seen them, but the rates of the table are counts of them."""
    trace = make_trace(num_sequences=40)
    plan, path = plan_of(trace, trace_sha256="0" * 64), tmp_path / "table"

    def warnings(judged_on, fold):
        make_table(plan, trace, fold=fold, options=TableOptions()).table.write(path)
        judged = judged_plan(plan, trace, selection=Selection(judged_on), table_path=path)
        return " ".join(w for w in judged.warnings if "too good" in w)

    num_sequences = len(np.unique(trace.read().sequence_ids))
    assert f"{num_sequences} of the {num_sequences}" in warnings(None, None)
    assert "build the table with --fold 0/2" in warnings(None, None)
    assert "simulate with --not-fold 0/2" in warnings(None, Fold(0, 2))
    assert warnings(Fold(1, 2), Fold(0, 2)) == ""
    plan = plan_of(trace, fold="0/2")
    assert "table" not in warnings(None, None)  # one warning is enough
    assert "table" in warnings(Fold(1, 2), Fold(1, 2))


def test_without_a_profile_fold_balanced_says_that_it_sees_everything(make_trace, plan_of):
    trace = make_trace(num_sequences=40)
    judged = judged_plan(plan_of(trace), trace)
    assert any(
        "use all sequences, also the judged ones: balanced" in w for w in judged.warnings
    )
    alone = judged_plan(plan_of(trace), trace, baselines=("contiguous",))
    assert not any("balanced" in w for w in alone.warnings)


@pytest.mark.parametrize(("num_sequences", "warned"), [(8, True), (60, False)])
def test_few_sequences_support_no_verdict(make_trace, plan_of, num_sequences, warned):
    trace = make_trace(num_sequences=num_sequences)
    judged = judged_plan(plan_of(trace), trace)
    assert (
        any("too few for an interval or a verdict" in w for w in judged.warnings) == warned
    )


def test_of_the_usual_baselines_those_that_can_be_built_are(make_trace, plan_of):
    """Six experts on four ranks fit only with two copies, which `balanced` has not."""
    trace = make_trace(num_experts=(6, 6, 6))
    row = np.array([0, 1, 2, 3, 4, 5, 0, 1])
    placement = Placement(
        physical_to_logical_map=(row,) * 3, num_experts=(6,) * 3, num_ranks=4
    )
    serving, plan = Serving(replica_choice="hash"), plan_of(trace, placement)
    judged = judged_plan(plan, trace, serving)
    assert list(judged.baselines) == ["contiguous", "eplb"]
    # The plan is what engines begin with.
    assert judged.baselines["contiguous"] == judged.policies
    (told,) = (w for w in judged.warnings if w.startswith("no baseline"))
    assert told.startswith("no baseline balanced: MoE layer 0: 6 ")
    with pytest.raises(UsageError, match="divide over 4 ranks"):
        judged_plan(plan, trace, serving, baselines=("eplb", "exflow"))


def test_a_plan_for_token_homes_is_judged_under_them_where_its_table_is_given(
    make_trace, tmp_path
):
    """Engines that send pairs: homes that follow content change them, fixed ones do not."""
    trace, path = make_trace(num_sequences=60), tmp_path / "table"
    plan, solved = tmp_path / "plan.json", unsolved_plan(trace.model, EVEN)
    dataclasses.replace(solved, policy="token").write(plan)
    made = make_table(plan, trace, fold=None, options=TableOptions())
    made.table.write(path)
    serving = Serving(engine=Engine.named("sglang-deepep-ll"))
    without = judged_plan(plan, trace, serving)
    assert (without.sent, without.ratios) == (None, {})
    judged = judged_plan(plan, trace, serving, table_path=path)
    served = simulate(EVEN, trace.read(), table=made.table)
    pairs = {name: one.remote_pairs_per_token for name, one in served.items()}
    ratio = judged.ratios["contiguous"].ratio
    assert ratio == pytest.approx(pairs["token"] / pairs["fixed"], abs=1e-6)
    ((_, verdict),) = verdict_lines([judged])
    assert f"pairs sent {ratio:.3f} of contiguous's" in verdict
    assert "(token compared with fixed)" in verdict
    facts = list(fact_lines(judged, ["fixed", "token"]))
    assert any("under token, pairs sent: the plan" in line for line in facts)
    assert any("contiguous under fixed" in line for line in facts)
    (_, _, rows), _ = summary_table([judged])
    assert {row[3] for row in rows if row[1] == "plan"} == {pairs["token"]}


def test_facts_and_verdict_know_the_replica_choice_that_is_asked_for(make_trace, plan_of):
    """vLLM picks copies without regard to the home; local-first prefers it."""
    trace = make_trace()
    row = np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3])
    placement = Placement(
        physical_to_logical_map=(row,) * 3, num_experts=(8,) * 3, num_ranks=4
    )
    plan, engine = plan_of(trace, placement), Engine.named("vllm-deepep-ll")
    for choice, changes in (("hash", False), ("local-first", True)):
        serving = Serving(engine=engine, replica_choice=choice)
        judged = judged_plan(plan, trace, serving)
        facts, verdict = " ".join(fact_lines(judged, ["fixed"])), [*verdict_lines([judged])]
        assert ("Placement can only balance" in facts) != changes
        assert ("every placement sends the same" in verdict[0][1]) != changes


def test_without_a_baseline_there_are_no_empty_brackets(make_trace, plan_of):
    trace = make_trace()
    judged = judged_plan(plan_of(trace), trace)
    alone = dataclasses.replace(
        judged, batches={"plan": judged.batches["plan"]}, baselines={}, ratios={}
    )
    for _, line in verdict_lines([alone]):
        assert line.endswith("the mean load")


def test_a_table_of_another_plan_is_refused(make_trace, plan_of, tmp_path):
    trace = make_trace()
    plan, table = plan_of(trace), tmp_path / "table.safetensors"
    dataclasses.replace(
        build_table(contiguous((8,) * 3, 4), trace.read(), vocab_size=50),
        plan_sha256="0" * 64,
    ).write(table)
    with pytest.raises(PlacerError, match="was written for the plan") as error:
        judged_plan(plan, trace, table_path=table)
    assert f"placer tables {plan} TRACE" in error.value.hint


def test_a_trace_of_another_model_is_refused(make_trace, plan_of):
    plan = plan_of(make_trace())
    other = make_trace("other", num_experts=(8, 8))
    with pytest.raises(PlacerError, match="different models") as error:
        judged_plan(plan, other)
    assert "placer inspect" in error.value.hint


def test_eplb_has_as_many_slots_as_the_plan(make_trace, plan_of):
    """Made from the profile fold, judged on the other."""
    trace = make_trace(num_sequences=40)
    row = np.array([0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 0])
    placement = Placement(
        physical_to_logical_map=(row,) * 3, num_experts=(8,) * 3, num_ranks=4
    )
    plan = plan_of(trace, placement, fold="0/2", trace_sha256=trace.sha256)
    selection, serving = Selection(Fold(1, 2)), Serving(replica_choice="hash")
    judged = judged_plan(plan, trace, serving, selection=selection, baselines=("eplb",))
    problem = BaselineProblem(
        trace=trace,
        selection=Selection(Fold(0, 2)),
        topology=Topology(gpus_per_node=4),
        redundant_experts=4,
    )
    expected = BASELINES["eplb"](problem)
    assert [len(slots) for slots in expected.physical_to_logical_map] == [12] * 3
    heldout = trace.read(selection)
    assert judged.baselines["eplb"] == simulate(expected, heldout, replica_choice="hash")


def test_an_unknown_baseline_is_refused(make_trace, plan_of):
    trace = make_trace()
    with pytest.raises(UsageError, match="--baseline best is not known") as error:
        judged_plan(plan_of(trace), trace, baselines=("best",))
    assert "contiguous, balanced, random" in error.value.hint


def test_bytes_are_copies_times_what_the_engine_sends(make_trace, plan_of):
    """Hidden size 100 in one batch of all: 200 bytes in bf16, 104 in fp8 with its scale."""
    trace = make_trace()
    plan = plan_of(trace)
    assert judged_plan(plan, trace).bytes_per_token() is None
    expert = ExpertShape(hidden_size=100, intermediate_size=10)
    judged = judged_plan(plan, trace, serving=Serving(expert=expert))
    copies = judged.policies["fixed"].remote_rank_copies_per_token
    sent = judged.bytes_per_token()["plan"]
    assert sent["dispatch_fast"] == pytest.approx(copies * 200, abs=0.1)
    assert sent["combine_fast"] == sent["dispatch_fast"]
    assert sent["dispatch_slow"] == 0
    engine = Engine.named("trtllm-onesided")
    judged = judged_plan(plan, trace, serving=Serving(expert=expert, engine=engine))
    sent = judged.bytes_per_token()["plan"]
    assert sent["dispatch_fast"] == pytest.approx(copies * 104, abs=0.1)
    assert sent["combine_fast"] == pytest.approx(copies * 200, abs=0.1)


def test_an_engine_that_placement_cannot_help_says_so(make_trace, plan_of):
    trace = make_trace()
    serving = Serving(engine=Engine.named("vllm-agrs"))
    judged = judged_plan(plan_of(trace), trace, serving=serving)
    facts = " ".join(fact_lines(judged, ["fixed"]))
    assert "dispatch all-gather in bf16" in facts
    assert "placement can change only the balance, not the traffic" in facts
    assert judged.ratios == {}
    assert (
        "of contiguous" not in comparison_table(json_of(judged), ["fixed"], judged.wire)[0]
    )
    for engine, verdict in verdict_lines([judged]):
        assert engine == "vllm-agrs"
        assert "every placement sends the same" in verdict


def test_time_is_predicted_for_plan_and_baselines(make_trace, plan_of):
    trace = make_trace(num_sequences=40)
    serving = Serving(
        hardware=Hardware.named("h200"),
        expert=ExpertShape(hidden_size=64, intermediate_size=32),
    )
    judged = judged_plan(plan_of(trace), trace, serving=serving)
    value = judged.to_json()
    assert set(value["batches"]) == {"contiguous", "balanced", "eplb", "plan"}
    told = [(one["tokens_per_rank"], one["batching"]) for one in value["batches"]["plan"]]
    assert told == [(64, "decode"), (256, "decode"), (4096, "prefill")]
    for figures in value["batches"].values():
        assert all(one["time"]["total_us"] > 0 for one in figures)
    # The plan is the contiguous placement itself.
    assert value["break_even"]["contiguous"] == [
        {"tokens_per_rank": size, "batching": batching}
        | {"pays": "never", "bandwidth_gb_per_s": None}
        for size, batching in told
    ]
    (_, prefill), (_, decode) = verdict_lines([judged])
    assert prefill.startswith("prefill: copies sent 1.000 of contiguous's")
    assert "as fast as contiguous (layer +0.0 %" in prefill
    assert "; busiest rank of a batch " in prefill, "with times too"
    assert decode.startswith("decode: ")
    titles = [title for title, _, _ in batch_tables(judged)]
    assert titles == [
        "per batch, under fixed",
        "bytes sent per token and layer",
        "predicted microseconds of a layer on h200",
        "break-even bandwidth (per GPU and direction, without overlap)",
    ]
    *_, (_, _, rows), _ = batch_tables(judged)
    every = [one for figures in judged.batches.values() for one in figures]
    assert [str(row[6]) for row in rows] == [f"{1e6 * one.time.total:.1f}" for one in every]


def test_time_needs_the_size_of_an_expert(make_trace, plan_of):
    trace = make_trace()
    serving = Serving(hardware=Hardware.named("h200"))
    with pytest.raises(UsageError, match="needs the size of an expert") as error:
        judged_plan(plan_of(trace), trace, serving=serving)
    assert "--model DIR" in error.value.hint


def json_of(judged):
    value = judged.to_json()
    return {**value["baselines"], "plan": value["policies"]}


@pytest.fixture
def two_node_plan(make_trace, plan_of):
    """A trace of 40 sequences, and its experts in reverse order on two nodes."""
    trace = make_trace(num_sequences=40)
    placement = Placement.from_expert_rank([np.array([0, 1, 2, 3] * 2)] * 3, 4, 2)
    return plan_of(trace, placement), trace


@pytest.mark.parametrize(
    ("name", "metric", "heading"),
    [
        ("sglang-deepep", "remote_node_copies_per_token", "node copies/token"),
        ("trtllm-onesided", "remote_rank_copies_per_token", "copies/token"),
    ],
)
def test_ratios_and_table_are_of_what_the_engine_sends(
    two_node_plan, name, metric, heading
):
    judged = judged_plan(*two_node_plan, serving=Serving(engine=Engine.named(name)))
    value = json_of(judged)
    for baseline, ratio in judged.ratios.items():
        sent, base = (value[of]["fixed"][metric] for of in ("plan", baseline))
        assert ratio.ratio == pytest.approx(sent / base, abs=1e-4)
    columns, rows = comparison_table(value, ["fixed"], judged.wire)
    assert columns[2:4] == (heading, "of contiguous")
    assert [row[2] for row in rows] == [one["fixed"][metric] for one in value.values()]
    assert judged.to_json()["sent"] == metric
    args = value, ["fixed"], judged.wire
    fewer = comparison_table(*args, per_batch=False)[0]
    left_out = [one for one in columns if one not in fewer]
    assert left_out in (["straggler"], ["straggler", "bottleneck"]), "a table shows them"


def test_low_latency_kernels_send_pairs_that_no_placement_changes(two_node_plan):
    serving = Serving(engine=Engine.named("sglang-deepep-ll"))
    judged = judged_plan(*two_node_plan, serving=serving)
    assert judged.ratios == {}
    columns, _ = comparison_table(json_of(judged), ["fixed"], judged.wire)
    assert "pairs/token" in columns
    assert "of contiguous" not in columns
    # Homes that follow content change them.
    assert "of contiguous" in comparison_table(json_of(judged), ["follow"], judged.wire)[0]


def test_an_engine_answers_for_the_batches_that_it_is_run_for(two_node_plan):
    engines = engines_named("sglang")
    servings = [Serving(engine=one) for one in engines]
    found = {
        one.serving.engine.name: one
        for one in judge_plan(*two_node_plan, servings=servings)
    }
    assert list(found) == [one.name for one in engines]
    for one in engines:
        drawn = {shape.batching for shape in found[one.name].shapes}
        assert drawn == set(one.phases)
    small = judge_plan(*two_node_plan, servings=servings, shapes=batch_shapes((64,)))
    assert "sglang-deepep" not in [one.serving.engine.name for one in small]
    with pytest.raises(UsageError, match="is run for prefill") as error:
        judged_plan(*two_node_plan, servings[1], shapes=batch_shapes((64,)))
    assert error.value.hint == "give --batching prefill"
    with pytest.raises(UsageError) as error:
        judged_plan(*two_node_plan, servings[1], shapes=batch_shapes(batching="decode"))
    assert error.value.hint == "give --batching prefill instead of --batching decode"


def test_a_family_gives_the_figures_of_each_of_its_engines(two_node_plan):
    """What is counted once for several is what each counts alone."""
    servings = [Serving(engine=one) for one in engines_named("vllm")]
    together = judge_plan(*two_node_plan, servings=servings)
    for serving, one in zip(servings, together, strict=True):
        assert one.to_json() == judged_plan(*two_node_plan, serving).to_json()


def test_the_batches_leave_the_metrics_of_policies_as_they_are(make_trace, plan_of):
    """Those are defined by batches of 4,096 tokens of all ranks."""
    trace = make_trace(num_sequences=40)
    plan = plan_of(trace)
    decode, prefill = (
        judged_plan(plan, trace, shapes=batch_shapes((16,), batching))
        for batching in ("decode", "prefill")
    )
    assert (
        decode.policies
        == prefill.policies
        == simulate(contiguous((8,) * 3, 4), trace.read(), batch_size=4096)
    )
    one, other = (j.batches["plan"][0].metrics for j in (decode, prefill))
    assert one.straggler_mean != other.straggler_mean


def test_it_is_not_said_that_a_plan_from_loads_has_seen_what_it_may_not(
    make_trace, plan_of
):
    """Loads that an engine counted name no trace: nobody knows of which tokens they are."""
    trace = make_trace()
    told = " ".join(judged_plan(plan_of(trace), trace).warnings)
    assert "the plan does not record which tokens it was made from" in told
    assert "solved on" not in told
    known = judged_plan(plan_of(trace, trace_sha256=trace.sha256), trace)
    assert "sequences are in the plan's profile" in " ".join(known.warnings)
