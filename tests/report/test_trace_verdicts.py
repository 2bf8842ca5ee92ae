"""The first sentence of commands on traces: true of what they found, and leading on."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from placer.cli.main import main
from placer.planning.learning import LearningPoint
from placer.report.results import Frontier, FrontierPlan
from placer.report.trace_verdicts import verdict_of_learning
from placer.report.verdicts import verdict_of_frontier
from placer.trace import Trace


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    return told.out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("trace validate TRACE", "TRACE is valid: every hash, tensor and id of 400 tokens"),
        ("trace sample TRACE --sequences 3 --out OUT", "OUT holds 146 tokens of 3 "),
        ("trace split TRACE --fold 0/2 --out OUT", "OUT holds 196 tokens of 4 "),
        ("trace merge TRACE OTHER --out OUT", "OUT holds 500 tokens of 16 "),
        ("trace dedup TRACE --no-rows --out OUT", "Removed 0 of 400 tokens (0.0 %). OUT"),
        ("trace links TRACE", "TRACE: first experts of a token in neighbouring layers"),
    ],
)
def test_the_answer_comes_first_and_its_next_command_runs(
    line: str,
    told: str,
    make_trace: Callable[..., Trace],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    made = {"TRACE": make_trace(), "OTHER": make_trace("other", num_tokens=100, seed=1)}
    for name, trace in made.items():
        trace.directory.rename(name)
    lines = printed(capsys, *line.split())
    assert " ".join(lines.split()).startswith(told)
    shown = json.loads(
        printed(capsys, *line.split(), *["--force"] * ("OUT" in line), "--json")
    )
    assert " ".join(shown["verdict"]["answer"]).startswith(told)
    following = lines.splitlines()[-1].removeprefix("next: placer ")
    assert following == shown["verdict"]["next"].removeprefix("placer ")
    printed(capsys, *shlex.split(following))


def point(num_tokens: int, ratio: float, imbalance: float) -> LearningPoint:
    return LearningPoint(
        num_tokens=num_tokens,
        num_sequences=2,
        remote_rank_copies_per_token=ratio,
        ratio=ratio,
        load_imbalance_mean=imbalance,
        moved=0.0,
    )


@pytest.mark.parametrize(
    ("points", "told"),
    [
        # As little traffic, but busier ranks: not enough.
        ([(10, 0.8, 1.4), (20, 0.8, 1.12), (40, 0.8, 1.1)], "20 tokens are enough."),
        # A good one before a bad one is luck.
        ([(10, 0.8, 1.1), (20, 0.9, 1.1), (40, 0.8, 1.1)], "More tokens still help:"),
        ([(10, 0.81, 1.1), (20, 0.79, 1.1), (40, 0.8, 1.1)], "10 tokens are enough."),
    ],
)
def test_tokens_are_enough_where_all_plans_from_more_are_as_good(
    points: list[tuple[int, float, float]], told: str
) -> None:
    (answer,) = verdict_of_learning([point(*one) for one in points], "solve").answer
    assert answer.startswith(told)


@pytest.mark.parametrize(
    ("plans", "is_better", "told"),
    [
        ([(0.9, 1.02), (0.7, 1.3)], True, "one-0 beats EPLB: it sends 10.0 % less than"),
        ([(0.9, 1.06), (0.7, 1.3)], None, "The most even one, one-0, sends 10.0 % less"),
        ([(1.1, 1.0), (0.7, 1.3)], None, "The most even one, one-0, sends 10.0 % more"),
        ([], None, "Nothing was measured"),
    ],
)
def test_a_frontier_says_whether_a_plan_beats_eplb(
    plans: list[tuple[float, float]], is_better: bool | None, told: str
) -> None:
    def plan(name: str, sent: float, imbalance: float) -> FrontierPlan:
        return FrontierPlan(name=name, max_imbalance=None, sent=sent, imbalance=imbalance)

    found = Frontier(
        plans=tuple(plan(f"one-{n}", *one) for n, one in enumerate(plans)),
        baselines={"eplb": plan("eplb", 1.0, 1.02)},
        words="copies sent",
        is_heldout=True,
        unmeasured=(),
    )
    verdict = verdict_of_frontier(found, Path("out"))
    assert told in verdict.answer[0]
    assert verdict.is_better is is_better


def test_a_learning_curve_leads_to_a_plan_with_its_own_options(
    make_trace: Callable[..., Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = make_trace(num_tokens=2000, num_sequences=40).directory
    asked = "--gpus-per-node 2 --max-imbalance 1.3 --not-fold 1/4 --tokens 100"
    words = printed(capsys, "trace", "learning", trace, *asked.split()).splitlines()[-1]
    assert words.startswith(f"next: placer solve {trace} --gpus-per-node 2 ")
    assert "--max-imbalance 1.3 --not-fold 1/4 --relax-cap" in words
    quick = ["--proof", "none", "--num-rounds", "1", "--num-sweeps", "1"]
    following = shlex.split(words)[2:]
    following[-1] = str(tmp_path / "plan.json")
    printed(capsys, *following, *quick)
