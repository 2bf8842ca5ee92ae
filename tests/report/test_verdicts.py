"""The answer of solve: figures of its own JSON, and what redundant experts cost."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from placer.cli.main import main
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.report.beside import beside_on_trace
from placer.report.chart import CONTIGUOUS, EPLB, PLACER
from placer.report.headline import headline_of_plan
from placer.report.solve_log import ending_line
from placer.report.verdicts import verdict_of_solve
from placer.trace import EVERYTHING, Trace
from tests.plans import unsolved_plan


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_a_verdict_has_the_figures_and_a_next_command_that_works(
    make_trace: Callable[..., Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, plan = make_trace(num_sequences=80).directory, tmp_path / "plan.json"
    cluster = ("--gpus-per-node", 4, "--fold", "0/2")
    sizes = ("--hidden-size", 1024, "--expert-size", 512, "--weight-bytes", 2)
    more = ("--redundant-experts", 4, "--replica-choice", "hash", *sizes)
    assert run("solve", trace, *cluster, *more, "--out", plan, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    verdict = told["verdict"]
    own, base = (
        one["fixed"]["remote_rank_copies_per_token"]
        for one in (told["metrics"]["heldout"], told["metrics"]["baselines"]["contiguous"])
    )
    (answer,) = verdict["answer"]
    percent, way = re.search(
        r"sends (\S+) % (less|more) than the contiguous", answer
    ).groups()
    assert float(percent) == pytest.approx(abs(100 * (own / base - 1)), abs=0.051)
    assert (way == "less") is (own < base)
    assert "EPLB with as many slots" in answer
    # One further expert on each of 4 ranks, 3 layers, 3 matrices of 1024 x 512 in 2 bytes.
    gib = 3 * 3 * 1024 * 512 * 2 / 2**30
    assert f"{gib:.3g} GiB of each rank's memory" in verdict["cost"]
    assert verdict["sure"].startswith("Held out: solved on ")
    words = shlex.split(verdict["next"])
    assert words[:2] == ["placer", "simulate"] and run(*words[1:], "--json") == 0


@pytest.mark.parametrize(
    ("model_type", "command"),
    [("gpt_oss", "placer export checkpoint"), ("qwen3_moe", "placer export sglang")],
)
def test_what_is_next_is_what_the_engine_loads(
    model_type: str, command: str, tmp_path: Path
) -> None:
    """SGLang ignores a map of gpt-oss, and reads one of Qwen3."""
    model = ModelSpec(num_experts=(4,), top_k=2, model_type=model_type)
    placed = Placement.from_json([[2, 0, 1, 3]], (4,), 2, 1)
    plan = unsolved_plan(model, placed, engine="sglang-deepep")
    path = tmp_path / "plan.json"
    assert verdict_of_solve(plan, path, tmp_path).next.startswith(f"{command} {path}")


@pytest.mark.parametrize(
    ("loads", "expected"),
    [({}, True), ({EPLB: 1.0}, None), ({EPLB: 1.0, PLACER: 1.004}, True)],
)
def test_a_plan_whose_load_is_above_that_of_eplb_is_not_called_better(
    loads: dict[str, float], expected: bool | None
) -> None:
    placed = Placement.from_json([[2, 0, 1, 3]], (4,), 2, 1)
    plan = unsolved_plan(ModelSpec(num_experts=(4,), top_k=2), placed)
    sent = {CONTIGUOUS: 2.0, EPLB: 2.0, PLACER: 1.0}
    load = {CONTIGUOUS: 1.5, EPLB: 1.5, PLACER: 1.2} | loads
    metrics = {
        name: {
            "fixed": {
                "remote_rank_copies_per_token": sent[name],
                "load_imbalance_mean": load[name],
            }
        }
        for name in sent
    }
    own = metrics.pop(PLACER)
    plan = replace(plan, metrics={"profile": own, "heldout": None, "baselines": metrics})
    told = verdict_of_solve(plan, Path("plan.json"), Path("trace"))
    assert told.is_better is expected


@pytest.mark.parametrize(
    ("baselines", "following"),
    [(["contiguous"], "placer export checkpoint"), (["contiguous", "eplb"], None)],
)
def test_after_simulate_is_exported_for_the_engine_that_was_judged(
    baselines: list[str],
    following: str | None,
    make_trace: Callable[..., Trace],
    write_plan: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The plan names no engine and is as contiguous; beside EPLB's it is worse."""
    trace = make_trace(num_experts=(4, 4, 4), num_sequences=8)
    placed = Placement.from_json([[1, 0, 3, 2]] * 3, (4, 4, 4), 2, 1)
    plan = write_plan(trace.model, placed)
    asked = [word for name in baselines for word in ("--baseline", name)]
    words = ("simulate", plan, trace.directory, "--engine", "vllm-agrs", *asked)
    assert run(*words, "--json") == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict["is_better"] is (None if following else False)
    if following is None:
        assert verdict["next"] is None
    else:
        assert verdict["next"].startswith(f"{following} {plan}")


@pytest.mark.parametrize(
    ("recorded", "reason"),
    [
        ({"trace_sha256": "0" * 64, "fold": "0/4"}, "profile is not in this trace"),
        ({}, "records no fold"),
    ],
)
def test_baselines_of_judged_sequences_are_warned_of(
    recorded: dict[str, str],
    reason: str,
    make_trace: Callable[..., Trace],
    write_plan: Callable[..., Path],
) -> None:
    trace = make_trace()
    placed = Placement.from_json([[*range(8)]] * 3, (8, 8, 8), 4, 1)
    plan = Plan.read(write_plan(trace.model, placed, **recorded))
    told = headline_of_plan(beside_on_trace(plan, {}, trace, EVERYTHING)).misleading
    assert any(reason in one and "eplb" in one for one in told)


@pytest.mark.parametrize(("gap", "words"), [(0.0001, "than 0.1%"), (0.032, "than 3.2%")])
def test_a_small_gap_is_not_shown_as_none(gap: float, words: str) -> None:
    placed = Placement.from_json([[2, 0, 1, 3]], (4,), 2, 1)
    report = unsolved_plan(ModelSpec(num_experts=(4,), top_k=2), placed).solver
    assert words in ending_line(msgspec.structs.replace(report, gap=gap))
