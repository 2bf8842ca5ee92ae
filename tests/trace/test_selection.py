"""The tokens of a phase, alone and of a fold, against plain masks over the whole trace."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from placer.affinity.from_traces import affinity_of_traces
from placer.cli.main import app
from placer.errors import PlacerError, UsageError
from placer.placement.topology import Topology
from placer.planning.drift import check_plan
from placer.planning.judge import judge_plan
from placer.planning.planner import plan_from_trace
from placer.planning.tables import TableOptions, make_table
from placer.replay.replay import ReplayOptions, _batches
from placer.simulation import simulate
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.trace import Chunk, Fold, Selection, Trace, TraceWriter
from placer.trace.rewrite import split_trace

DECODE = Selection(phase="decode")
EVEN_DECODE = Selection(Fold(0, 2), "decode")
OPTIONS = SolveOptions(
    topology=Topology(gpus_per_node=4), goal=Goal(caps=Caps(relax=True)), proof="none"
)


def call(*words: object) -> Result:
    """Run a command; errors come through, because only ``main`` turns them to codes."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def trace(make_trace: Callable[..., Trace], tmp_path: Path) -> Trace:
    """40 sequences; the tokens from position 3 on are generated."""
    plain = make_trace("plain", num_tokens=1200, num_sequences=40)
    chunk = plain.read()
    phase = (chunk.positions >= 3).astype(np.uint8)
    with TraceWriter(directory=tmp_path / "trace", model=plain.model) as writer:
        writer.append(replace(chunk, phase=phase))
        writer.finish()
    return Trace(tmp_path / "trace")


def test_phases_part_the_tokens_of_a_fold(trace: Trace) -> None:
    whole = trace.read()
    even = whole.sequence_ids % 2 == 0
    found = {
        phase: trace.read(Selection(Fold(0, 2), phase)) for phase in ("prefill", "decode")
    }
    for number, (phase, chunk) in enumerate(found.items()):
        expected = whole.select(even & (whole.phase == number))
        assert chunk.num_tokens == expected.num_tokens > 0, phase
        assert (chunk.positions == expected.positions).all()
        assert (chunk.experts[1] == expected.experts[1]).all()
    assert sum(one.num_tokens for one in found.values()) == even.sum()


@pytest.mark.parametrize(
    ("selection", "options"),
    [
        (Selection(), ""),
        (DECODE, "--phase decode"),
        (EVEN_DECODE.complement(), "--not-fold 0/2 --phase decode"),
    ],
)
def test_what_is_recorded_and_told_is_what_was_selected(
    selection: Selection, options: str
) -> None:
    assert Selection.from_json(json.loads(json.dumps(selection.to_json()))) == selection
    assert selection.options == options


def test_a_trace_without_phases_is_refused_and_told_what_records_them(
    make_trace: Callable[..., Trace],
) -> None:
    with pytest.raises(PlacerError, match="--phase decode: the trace does not") as error:
        make_trace().read(DECODE)
    assert "--generate N" in error.value.hint


def test_a_phase_that_no_token_has_is_refused(trace: Trace, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    split_trace(trace, prompts, selection=Selection(phase="prefill"))
    assert (Trace(prompts).read().positions < 3).all()
    with pytest.raises(PlacerError, match="no token is left") as error:
        Trace(prompts).read(DECODE)
    assert "--phase" in error.value.hint


def test_a_plan_is_solved_and_judged_on_its_phase(trace: Trace) -> None:
    """The same plan as of a trace that holds nothing else."""
    plan = plan_from_trace(trace, OPTIONS, EVEN_DECODE)
    assert (plan.provenance["fold"], plan.provenance["phase"]) == ("0/2", "decode")
    whole = trace.read()
    odd = whole.select((whole.sequence_ids % 2 == 1) & (whole.phase == 1))
    assert plan.metrics["heldout"]["fixed"] == (
        simulate(plan.placement, odd)["fixed"].to_json()
    )
    alone = plan_from_trace(trace, OPTIONS, Selection(Fold(0, 2), "prefill"))
    assert alone.metrics["heldout"] != plan.metrics["heldout"]


def test_another_phase_than_the_plans_is_told(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan_from_trace(trace, OPTIONS, EVEN_DECODE).write(path)

    def told(selection: Selection) -> str:
        (judged,) = judge_plan(path, trace, selection=selection)
        return " ".join(judged.warnings)

    assert "solved for decode tokens, but all tokens" in told(Selection(Fold(1, 2)))
    assert "but prefill tokens are judged" in told(Selection(Fold(1, 2), "prefill"))
    assert "solved for decode" not in told(EVEN_DECODE.complement())
    assert "simulate with --not-fold 0/2 --phase decode" in told(EVEN_DECODE)
    words = ("check", path, trace.directory, "--tolerance", "9")
    assert "give --phase decode" in call(*words).stderr
    assert "--phase" not in call(*words, "--phase", "decode").stderr


def test_baselines_have_the_profile_of_the_plan(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = plan_from_trace(trace, OPTIONS, EVEN_DECODE)
    plan.write(path)
    (judged,) = judge_plan(path, trace, selection=EVEN_DECODE.complement())
    assert (
        judged.baselines["balanced"]["fixed"].to_json()
        == (plan.metrics["baselines"]["balanced"]["fixed"])
    )


def test_a_table_is_of_the_plans_phase_unless_told(trace: Trace, tmp_path: Path) -> None:
    path, options = tmp_path / "plan.json", TableOptions()
    plan_from_trace(trace, OPTIONS, EVEN_DECODE).write(path)
    own = make_table(path, trace, options=options)
    assert own.profile == EVEN_DECODE
    assert own.table.provenance["phase"] == "decode"
    every = make_table(path, trace, phase="all", options=options)
    assert every.profile == Selection(Fold(0, 2))
    with pytest.raises(UsageError, match="--phase warmup is not known"):
        make_table(path, trace, phase="warmup", options=options)


def test_counts_keep_the_phase_and_can_be_selected_from_no_more(
    trace: Trace, tmp_path: Path
) -> None:
    counts, plan = tmp_path / "counts", tmp_path / "plan.json"
    affinity_of_traces([trace], DECODE).write(counts)
    words = ("solve", counts, "--gpus-per-node", "4", "--relax-cap")
    call(*words, "--out", plan)
    assert json.loads(plan.read_text())["provenance"]["phase"] == "decode"
    for command in (
        (*words, "--phase", "decode", "--out", tmp_path / "no"),
        ("advise", counts, "--gpus-per-node", "4", "--phase", "decode"),
    ):
        with pytest.raises(UsageError, match="tokens can no longer be selected") as error:
            call(*command)
        assert "placer affinity TRACE --phase decode" in error.value.hint


def test_drift_is_of_the_tokens_selected(trace: Trace) -> None:
    plan = plan_from_trace(trace, OPTIONS, DECODE)
    report = check_plan(plan, trace, DECODE)
    assert report.num_tokens == trace.read(DECODE).num_tokens
    assert [one.now for one in report.figures] == pytest.approx(
        [one.then for one in report.figures], abs=1e-4
    )


def test_replay_runs_prompts_alone_and_no_generated_tokens_alone(trace: Trace) -> None:
    short = ReplayOptions(sequence_length=3, sequences_per_rank=1)
    ids = _batches(trace, Selection(phase="prefill"), short, 2)
    assert ids[0, 0].tolist() == trace.read().token_ids[:3].tolist()
    with pytest.raises(UsageError, match="--phase decode: replay runs") as error:
        _batches(trace, DECODE, short, 2)
    assert "--phase prefill" in error.value.hint


def test_a_chunk_without_phase_is_no_decode(make_chunk: Callable[..., Chunk]) -> None:
    chunk = make_chunk()
    assert Selection(Fold(0, 2)).keep(chunk).tolist() == [
        n % 2 == 0 for n in chunk.sequence_ids
    ]
    with pytest.raises(PlacerError, match="does not record"):
        DECODE.keep(chunk)
