"""Options of ``placer solve`` together: each pair works, or is refused with a remedy."""

import csv
import hashlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from placer.cli.main import main
from placer.placement import Plan
from placer.trace import Trace

NOTHING_ASKED = {
    "robust": "none",
    "overflow_price": None,
    "replica_choice": None,
    "pins": [],
}
QUICK = ("--num-rounds", "0", "--num-sweeps", "1", "--proof", "none")


def solve(
    trace: Trace, out: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Run ``placer solve`` on two ranks; return its exit code and what it told."""
    arguments = [
        "solve",
        str(trace.directory),
        "--gpus-per-node",
        "2",
        "--out",
        str(out),
        "--force",
    ]
    cap = () if "--frontier" in words else ("--max-imbalance", "2")
    with pytest.raises(SystemExit) as done:
        main([*arguments, *QUICK, *cap, *words.split()])
    assert isinstance(done.value.code, int)
    return done.value.code, capsys.readouterr().err


@pytest.fixture
def trace(make_trace: Callable[..., Trace]) -> Trace:
    return make_trace(num_experts=(8, 8), num_sequences=8)


@pytest.mark.parametrize(
    ("words", "recorded", "num_slots"),
    [
        ("--policy token --fold 0/2", {}, 8),
        ("--policy request --fold 0/2", {}, 8),
        ("--policy token --redundant-experts auto --redundant-gain 0.2 "
         "--replica-choice local-first", {"replica_choice": "local-first"}, 16),
        ("--policy request --pin 0:1=1 --robust bootstrap --overflow-price 3",
         {"robust": "bootstrap", "overflow_price": 3.0, "pins": ["0:1=1"]}, 8),
        ("--policy follow --redundant-experts 2 --replica-choice hash --pin 1:7=0",
         {"replica_choice": "hash", "pins": ["1:7=0"]}, 10),
    ],
)  # fmt: skip
def test_what_goes_together_is_solved(
    trace: Trace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
    recorded: dict[str, object],
    num_slots: int,
) -> None:
    code, told = solve(trace, tmp_path / "plan.json", words, capsys)
    assert code == 0, told
    plan = Plan.read(tmp_path / "plan.json")
    assert plan.policy == words.split()[1]
    assert plan.provenance.items() >= (NOTHING_ASKED | recorded).items()
    assert [len(row) for row in plan.placement.physical_to_logical_map] == [num_slots] * 2
    for text in plan.provenance["pins"]:
        layer, expert, rank = (int(c) for c in text if c.isdigit())
        assert plan.placement.holds(layer)[expert, rank]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("--policy token --objective time --hardware h100 --hidden-size 64 "
         "--expert-size 32", "cannot be predicted"),
        ("--hardware h100 --max-imbalance 1.5", "a load cap that is given leaves nothing"),
        ("--hardware h100 --objective balance", "balance does not predict time"),
        ("--redundant-gain 0.2", "--redundant-gain 0.2 is for --redundant-experts auto"),
        ("--redundant-experts 2 --redundant-memory 1", "--redundant-memory 1.0 is for"),
        ("--overflow-price 3", "--overflow-price 3.0 is for --robust"),
        ("--replica-choice hash", "--replica-choice hash is for --redundant-experts"),
        ("--hidden-size 64", "--hidden-size 64 is for --hardware or --redundant-experts"),
        ("--require-optimal --frontier 1.5,2", "--require-optimal is for one plan"),
        ("--frontier 1.5,2 --max-imbalance 1.2", "--max-imbalance 1.2 is one load cap"),
        ("--weight-bytes 1", "--weight-bytes 1.0 is for --hardware or --redundant-experts"),
        ("--inter-cost 8", "--inter-cost 8 is for links inside nodes or between them"),
        ("--intra-cost 2 --ep-size 2", "--intra-cost 2 is for links"),
        ("--tensor-parallel-size 2", "--ep-size is missing"),
        ("--pin 9:0=0", "--pin 9:0=0: MoE layers are 0 to 1"),
        ("--pin 0:9=0", "MoE layer 0 has experts 0 to 7, and ranks are 0 to 1"),
        ("--pin 0:1=0 --pin 0:1=1", ("expert 1 is pinned to 2 ranks, but its number of "
            "slots is 1")),
        ("--pin 0:1=0 --pin 0:2=0 --pin 0:3=0 --pin 0:4=0 --pin 0:5=0",
         "5 experts of MoE layer 0 are pinned to rank 0, which has 4 slots"),
        ("--max-imbalance nan", "--max-imbalance must be a finite number"),
        ("--max-imbalance inf", "--max-imbalance must be a finite number"),
        ("--receive-price nan", "--receive-price must be a finite number"),
        ("--redundant-experts auto --redundant-memory nan --hidden-size 64 "
         "--expert-size 32 --replica-choice hash",
         "--redundant-memory must be a finite number"),
        ("--redundant-experts auto --replica-choice hash --preserve-groups",
         "router has no groups"),
        ("--redundant-experts 3 --replica-choice hash",
         "3 redundant ones are 11 slots, which do not divide"),
        ("--ignore-groups", "--ignore-groups is only for balancing"),
    ],
)  # fmt: skip
def test_what_does_not_is_refused_and_leaves_nothing(
    trace: Trace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
    match: str,
) -> None:
    code, told = solve(trace, tmp_path / "plan.json", words, capsys)
    assert code == 2
    assert match in told
    assert "hint: " in told
    assert not (tmp_path / "plan.json").exists()


def hinted(told: str) -> list[list[str]]:
    """Return the commands of a hint, one for each replica choice, as words for ``main``."""
    lines = [line for line in told.splitlines() if line.startswith("  placer ")]
    assert [line.split("  # ")[1].split(", ")[0] for line in lines] == [
        "sglang-deepep",
        "sglang-none",
    ]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("number", ["2", "auto"])
def test_redundant_experts_of_no_engine_ask_for_the_choice_of_one(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    out = tmp_path / "plan.json"
    code, told = solve(trace, out, f"--redundant-experts {number}", capsys)
    assert (code, out.exists()) == (2, False)
    assert "engines differ in the replica choice" in told
    for words in hinted(told):
        with pytest.raises(SystemExit) as done:
            main([str(out) if word == "PLAN" else word for word in [*words, *QUICK]])
        assert done.value.code == 0
        recorded = Plan.read(out).provenance["replica_choice"]
        assert words[-2:] == ["--replica-choice", recorded]
        out.unlink()


def test_redundant_experts_of_counts_share_their_load_evenly_unless_told(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No token is known, so none needs to be served: no option is asked for."""
    counts, out = tmp_path / "counts.safetensors", tmp_path / "plan.json"
    words = ["solve", str(counts), "--gpus-per-node", "2", "--objective", "balance"]
    words += ["--redundant-experts", "2", "--out", str(out), "--force"]

    def recorded(*more: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as done:
            main([*words, *more])
        assert done.value.code == 0
        choice = Plan.read(out).provenance["replica_choice"]
        out.unlink()
        return choice, capsys.readouterr().err

    with pytest.raises(SystemExit):
        main(["affinity", str(trace.directory), "--out", str(counts)])
    note = "replicas share their expert's load evenly"
    choice, told = recorded()
    assert (choice, note in told) == ("hash", True)
    choice, told = recorded("--replica-choice", "local-first")
    assert (choice, note in told) == ("local-first", False)
    choice, told = recorded("--engine", "sglang-deepep")
    assert (choice, note in told) == ("sglang-static", False)


def test_a_cap_that_is_given_is_kept_and_the_default_is_relaxed(
    make_trace: Callable[..., Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 8 experts on 8 ranks the busiest is above 1.10 times the mean, wherever it is."""
    trace, out = make_trace(num_experts=(8, 8), num_sequences=8), tmp_path / "plan.json"
    words = [
        "solve",
        str(trace.directory),
        "--gpus-per-node",
        "8",
        "--out",
        str(out),
        "--force",
    ]

    def told(*more: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as done:
            main([*words, *QUICK, *more])
        return done.value.code, capsys.readouterr().err

    code, said = told("--max-imbalance", "1.1")
    assert (code, "out of reach in 2 of 2 MoE layers" in said) == (3, True)
    code, said = told()
    assert code == 0
    assert said.count("load cap 1.1 is out of reach in 2 of 2 MoE layers and was") == 1
    assert "warning: the default load cap" in said
    plan = Plan.read(out)
    assert plan.provenance["max_imbalance_given"] is False
    busiest = [np.bincount(ids.ravel()).max() for ids in trace.read().experts]
    mean = trace.read().experts[0].size / 8
    assert list(plan.solver.relaxed_layers.values()) == pytest.approx(
        [one / mean for one in busiest]
    )
    out.unlink()
    code, said = told("--max-imbalance", "1.1", "--relax-cap")
    assert code == 0
    assert "warning: --max-imbalance" not in said
    assert "--max-imbalance 1.1 is out of reach in 2 of 2 MoE layers and was" in said
    assert Plan.read(out).provenance["max_imbalance_given"] is True


def test_a_start_of_another_model_or_number_of_slots_is_refused(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, out = tmp_path / "first.json", tmp_path / "plan.json"
    assert solve(trace, first, "", capsys)[0] == 0
    auto = f"--start {first} --redundant-experts auto --replica-choice hash"
    code, told = solve(trace, out, auto, capsys)
    assert (code, "with --start the number is that of the plan" in told) == (2, True)
    value = json.loads(first.read_text()) | {"sha256": None}
    value["model"]["top_k"] = 1
    first.write_text(json.dumps(value))
    code, told = solve(trace, out, f"--start {first}", capsys)
    assert (code, "are of different models: top_k 1 against 2" in told) == (2, True)
    assert not out.exists()


def test_a_plan_says_what_it_started_from(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, out = tmp_path / "first.json", tmp_path / "plan.json"
    assert solve(trace, first, "--pin 0:0=0 --pin 0:1=0", capsys)[0] == 0
    words = f"--start {first} --migration-cost 0.5 --pin 0:0=0 --pin 0:1=1"
    assert solve(trace, out, words, capsys)[0] == 0
    begun, plan = (Plan.read(path) for path in (first, out))
    moved = sum(
        np.count_nonzero(begun.placement.expert_rank(n) != plan.placement.expert_rank(n))
        for n in range(2)
    )
    assert moved >= 2, "expert 1 and the one that made way for it"
    rows = json.loads(first.read_text())["physical_to_logical_map"]
    digest = hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()
    assert plan.provenance.items() >= {
        "start_map_sha256": digest, "migration_cost": 0.5, "moved_experts": moved
    }.items()  # fmt: skip


def test_a_balanced_start_says_how_many_experts_move_and_how_to_move_fewer(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, out = tmp_path / "first.json", tmp_path / "plan.json"
    assert solve(trace, first, "--max-imbalance 4", capsys)[0] == 0
    for cost, says in ((0, True), (1e9, False)):
        words = [
            "solve",
            str(trace.directory),
            "--gpus-per-node",
            "2",
            "--start",
            str(first),
        ]
        words += ["--objective", "balance", "--migration-cost", str(cost)]
        with pytest.raises(SystemExit):
            main([*words, "--out", str(out)])
        told = " ".join(capsys.readouterr().out.split())
        moved = Plan.read(out).provenance["moved_experts"]
        assert f"{moved} of " in told and f"slots changed from {first}" in told
        assert ("--migration-cost" in told) == (says and moved > 0)
        assert (moved > 0) == says
        out.unlink()


def test_plans_of_a_frontier_say_what_was_chosen_for_all(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--frontier 1.5,2 --redundant-experts auto --ep-size 2 --replica-choice hash"
    assert solve(trace, tmp_path / "curve", words, capsys)[0] == 0
    with (tmp_path / "curve" / "frontier.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2
    for row in rows:
        plan = Plan.read(tmp_path / "curve" / row["file"])
        number = plan.provenance["redundant_experts"]["redundant_experts"]
        assert plan.placement.has_replicas == (number > 0)
        assert plan.provenance["layout"]["ep_size"] == 2


def test_costs_of_links_are_no_matter_of_balance(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--objective balance --nodes 2 --gpus-per-node 1 --inter-cost 3"
    code, told = solve(trace, tmp_path / "plan.json", words, capsys)
    assert (code, "they only price the copies" in told) == (0, True)
    code, told = solve(trace, tmp_path / "two.json", words[20:], capsys)
    assert (code, "they only price the copies" in told) == (0, False)
