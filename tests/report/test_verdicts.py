"""The answer of solve: figures of its own JSON, and what redundant experts cost."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from placer.cli.main import main
from placer.model import ModelSpec
from placer.placement import Placement
from placer.report.verdicts import verdict_of_solve
from placer.trace import Trace
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
