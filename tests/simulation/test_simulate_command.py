"""``placer simulate`` and ``placer tables``, from files to files, as a user runs them."""

import json
import shlex

import numpy as np
import pytest
from typer.testing import CliRunner

from placer.baseline import BASELINES
from placer.cli.main import app, main
from placer.demo.road import shipped_model
from placer.errors import PlacerError, UsageError
from placer.placement import Placement
from placer.placement.reference import contiguous
from placer.table import Table
from placer.target.engine import engines_named

QUICK = ("--num-rounds", "0", "--num-sweeps", "1", "--proof", "none")
BUILT = "built from the tokens that the plan was solved on"


def call(*words):
    """Run a command, with what prints warnings and notes: ``InputCommand``."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def files(make_trace, write_plan, tmp_path):
    """A trace of 60 sequences and the contiguous plan, solved on the even ones."""
    trace = make_trace(num_sequences=60, num_tokens=2_000)
    placement = contiguous(trace.model.num_experts, 4)
    plan = write_plan(trace.model, placement, fold="0/2", trace_sha256=trace.sha256)
    return plan, trace.directory, tmp_path / "table.safetensors"


def test_the_table_is_built_from_the_plans_own_fold(files):
    plan, trace, table = files
    result = call("tables", plan, trace, "--out", table, "--force")
    assert "token_equal" in result.stdout
    assert f"\n{BUILT}: --fold 0/2\n" in result.stderr
    assert Table.read(table).provenance["fold"] == "0/2"
    assert Table.read(table).vocab_size == 50
    first = table.read_bytes()
    call("tables", plan, trace, "--out", table, "--force")
    assert table.read_bytes() == first


def test_tables_in_json_hold_the_heldout_figures(files):
    plan, trace, table = files
    value = json.loads(
        call("tables", plan, trace, "--out", table, "--force", "--json").stdout
    )
    assert value["chance"] == 0.25
    assert value["fold"] == "0/2"
    heldout = value["heldout"]
    assert heldout["token"]["local_activation_rate"] > 0.3
    judged = call("simulate", plan, trace, "--table", table, "--fold", "1/2", "--json")
    assert json.loads(judged.stdout)["policies"] == heldout


def test_an_inverted_fold_of_all_sequences_but_one_part(files):
    plan, trace, table = files
    result = call("tables", plan, trace, "--out", table, "--force", "--not-fold", "0/3")
    assert BUILT not in result.stderr
    assert "are in the plan's profile" in result.stderr  # with the fold 0/2
    assert Table.read(table).provenance["fold"] == "not 0/3"


def test_simulate_in_json_has_policies_and_baselines(files):
    plan, trace, _ = files
    value = json.loads(call("simulate", plan, trace, "--fold", "1/2", "--json").stdout)
    assert set(value["policies"]) == {"fixed", "follow", "oracle"}
    assert set(value["baselines"]) == {"contiguous", "balanced", "eplb"}
    assert value["baselines"]["contiguous"] == value["policies"]


def test_simulate_for_people_puts_warnings_on_stderr(files):
    plan, trace, _ = files
    words = ("--baseline", "random", "--tokens-per-rank", "50")
    result = call("simulate", plan, trace, *words)
    assert "too good" in result.stderr
    assert "too good" not in result.stdout
    assert "random" in result.stdout
    assert "balanced" not in result.stdout
    verdict = result.stdout.splitlines()[0]
    assert verdict.startswith("decode: copies sent")
    assert "of random's" in verdict


@pytest.mark.parametrize(
    "words", [("--fold", "0/2", "--not-fold", "0/2"), ("--fold", "2/2")]
)
def test_folds_that_cannot_be_meant_are_wrong_usage(files, words):
    plan, trace, _ = files
    with pytest.raises(UsageError) as error:
        call("simulate", plan, trace, *words)
    assert error.value.exit_code == 2


def test_a_refused_table_leaves_no_file(files):
    plan, trace, table = files
    with pytest.raises(UsageError, match="--lookback 99"):
        call("tables", plan, trace, "--out", table, "--force", "--lookback", "99")
    assert not list(table.parent.glob("table*"))


def test_a_table_file_in_place_of_the_plan_is_refused(files):
    plan, trace, table = files
    call("tables", plan, trace, "--out", table, "--force")
    with pytest.raises(PlacerError):
        call("simulate", table, trace)


def test_simulate_serves_as_an_engine_does(files):
    plan, trace, _ = files
    words = ("--fold", "1/2", "--engine", "sglang-deepep-ll", "--hardware", "b200")
    sizes = ("--hidden-size", "64", "--expert-size", "32")
    shown = call("simulate", plan, trace, *words, *sizes, "--details").stdout
    assert "predicted microseconds of a layer on b200" in shown
    assert "k (1 - 1/R) copies per token for every placement" in " ".join(shown.split())
    value = json.loads(call("simulate", plan, trace, *words, *sizes, "--json").stdout)
    assert value["engine"] == "sglang-deepep-ll"
    assert value["replica_choice"] == "sglang-static"
    assert value["bytes_per_token"]["plan"]["dispatch_slow"] == 0


def test_a_family_is_simulated_by_engine(files):
    plan, trace, _ = files
    words = ("--fold", "1/2", "--engine", "sglang", "--tokens-per-rank", "16,2000")
    shown = call("simulate", plan, trace, *words).stdout
    verdicts = shown.split("\n\n")[0].replace("\n  ", " ").splitlines()
    lines = {line.split(",")[0]: line for line in reversed(verdicts)}
    assert ": every placement sends the same" in lines["sglang-none"]
    assert "prefill: copies sent 1.000 of" in lines["sglang-deepep"]
    assert max(map(len, shown.split("\n\n")[0].splitlines())) <= 100
    again = shlex.split(shown.splitlines()[-1].split("next: ")[1])
    assert again[:4] == ["placer", "simulate", str(plan), str(trace)]
    assert set(again[4:]) == {*words, "sglang-deepep"} - {"sglang"}
    assert call(*again[1:]).exit_code == 0
    value = json.loads(call("simulate", plan, trace, *words, "--json").stdout)["engines"]
    assert value["sglang-deepep"]["sent"] == "remote_rank_copies_per_token"
    drawn = [one["batching"] for one in value["sglang-deepep"]["batches"]["plan"]]
    assert drawn == ["prefill"]


def test_a_plan_is_served_by_the_engine_that_it_was_solved_for(files):
    plan, trace, _ = files
    value = json.loads(plan.read_text()) | {"sha256": None}
    value["provenance"]["engine"] = "sglang-deepep-ll"
    plan.write_text(json.dumps(value))
    for words, engine in (
        ((), "sglang-deepep-ll"),
        (("--engine", "deepspeed"), "deepspeed"),
    ):
        found = call("simulate", plan, trace, "--fold", "1/2", "--json", *words).stdout
        assert json.loads(found)["engine"] == engine


def test_without_an_engine_copies_serve_as_the_plan_was_solved_for(files):
    plan, trace, _ = files
    value = json.loads(plan.read_text()) | {"sha256": None}
    value["provenance"]["replica_choice"] = "hash"
    plan.write_text(json.dumps(value))
    cases = [((), "hash"), (("--engine", "sglang-deepep"), "sglang-static")]
    cases += [(("--replica-choice", "cover"), "cover")]
    for words, choice in cases:
        found = call("simulate", plan, trace, "--fold", "1/2", "--json", *words).stdout
        assert json.loads(found)["replica_choice"] == choice


@pytest.fixture
def copies(make_trace, write_plan):
    """A trace, and a plan with redundant experts that does not say which replica serves."""
    trace = make_trace(num_sequences=60, num_tokens=2_000)
    row = np.array([0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 0])
    placement = Placement(
        physical_to_logical_map=(row,) * 3, num_experts=(8,) * 3, num_ranks=4
    )
    return write_plan(trace.model, placement), trace.directory


def test_copies_of_a_plan_that_does_not_say_which_serves_ask_for_a_choice(copies):
    plan, trace = copies
    with pytest.raises(UsageError, match="engines differ in the replica choice") as error:
        call("simulate", plan, trace)
    assert error.value.exit_code == 2
    commands = error.value.hint.splitlines()[1:]
    assert len(commands) == 2
    for line in commands:
        words = shlex.split(line, comments=True)[1:]
        found = json.loads(call(*words, "--json").stdout)
        assert words[-2:] == ["--replica-choice", found["replica_choice"]]
    found = json.loads(
        call("simulate", plan, trace, "--engine", "trtllm-onesided", "--json").stdout
    )
    assert found["replica_choice"] == "hash"


@pytest.mark.parametrize("engine", ["vllm", "vllm-deepep-ht", "deepspeed", "transformers"])
def test_copies_that_an_engine_cannot_load_are_refused_as_solve_does(copies, engine):
    plan, trace = copies
    solve = ["solve", str(trace), "--gpus-per-node", "4", "--redundant-experts", "4"]
    refused = []
    for words in (["simulate", str(plan), str(trace)], [*solve, "--out", "p"]):
        name = engines_named(engine)[0].name if words[0] == "solve" else engine
        with pytest.raises(UsageError) as error:
            call(*words, "--engine", name)
        refused.append(error.value)
    assert "loads no map" in refused[0].message
    assert refused[0].message == refused[1].message
    assert refused[0].hint == refused[1].hint


def test_of_a_family_those_are_left_out_that_do_not_run_on_the_nodes(copies):
    """2 nodes of 2 ranks: NVLink kernels and DeepEP of TensorRT-LLM do not run there."""
    plan, trace = copies
    value = json.loads(plan.read_text()) | {"num_nodes": 2, "sha256": None}
    plan.write_text(json.dumps(value))
    result = call("simulate", plan, trace, "--engine", "trtllm", "--json")
    assert [*json.loads(result.stdout)["engines"]] == [
        "trtllm-deepep-ll",
        "trtllm-allgather",
    ]
    for name in ("onesided", "twosided", "deepep"):
        assert f"trtllm-{name} is left out: --engine trtllm-{name} runs" in result.stderr


def test_nodes_that_an_engine_takes_otherwise_are_told(files):
    plan, trace, _ = files
    words = ("simulate", plan, trace, "--engine", "sglang-deepep", "--fold", "1/2")
    assert "as one NVLink node" not in call(*words).stderr
    value = json.loads(plan.read_text()) | {"num_nodes": 2, "sha256": None}
    plan.write_text(json.dumps(value))
    assert "every 4 ranks in a row as one NVLink node" in call(*words).stderr


def test_a_permuted_checkpoint_that_splits_router_groups_is_not_simulated(files):
    plan, trace, _ = files
    value = json.loads(plan.read_text()) | {"sha256": None}
    value["model"] |= {"n_group": 4, "topk_group": 2}
    value["physical_to_logical_map"][1] = [0, 2, 1, 3, 4, 5, 6, 7]
    plan.write_text(json.dumps(value))
    with pytest.raises(UsageError, match="MoE layer 1: the plan mixes router groups"):
        call("simulate", plan, trace, "--engine", "vllm-agrs")
    assert call("simulate", plan, trace, "--engine", "sglang-none").exit_code == 0


def test_each_engine_of_a_family_weighs_experts_as_if_asked_alone(files):
    plan, trace, _ = files
    words = ["simulate", plan, trace, "--fold", "1/2", "--hardware", "h100", "--json"]
    words += ["--hidden-size", "128", "--expert-size", "64", "--tokens-per-rank", "64"]
    found = json.loads(call(*words, "--engine", "sglang").stdout)["engines"]
    for name in ("sglang-none", "sglang-deepep-ll"):
        alone = json.loads(call(*words, "--engine", name).stdout)
        assert found[name]["batches"] == alone["batches"]


def test_a_plan_without_replicas_needs_no_choice(files):
    plan, trace, _ = files
    found = json.loads(call("simulate", plan, trace, "--fold", "1/2", "--json").stdout)
    assert found["replica_choice"] is None


def test_a_table_of_copies_that_nothing_chooses_among_is_refused_at_once(copies, tmp_path):
    """With the command that solves anew from this plan, and records the choice."""
    plan, trace = copies
    with pytest.raises(UsageError, match="engines differ in the replica choice") as error:
        call("tables", plan, trace, "--out", tmp_path / "table.safetensors", "--force")
    for line in error.value.hint.splitlines()[1:]:
        words = shlex.split(line, comments=True)[1:]
        paths = {"TRACE": trace, "PLAN": plan, "NEW": tmp_path / "new.json"}
        with pytest.raises(SystemExit) as done:
            main([str(paths.get(word, word)) for word in [*words, *QUICK]])
        assert done.value.code == 0
        call(
            "tables",
            paths["NEW"],
            trace,
            "--out",
            tmp_path / "table.safetensors",
            "--force",
        )
        paths["NEW"].unlink()


def test_the_width_of_a_trace_that_does_not_know_it_is_enough_for_bytes(files, tiny_model):
    """Hidden size 32, the tiny model's own: 64 bytes per copy in bf16."""
    plan, trace, _ = files
    words = ("--fold", "1/2", "--json")
    untold = json.loads(call("simulate", plan, trace, *words).stdout)
    assert untold["bytes_per_token"] is None
    for sizes in (("--hidden-size", "32"), ("--model", tiny_model)):
        value = json.loads(call("simulate", plan, trace, *words, *sizes).stdout)
        copies = value["policies"]["fixed"]["remote_rank_copies_per_token"]
        sent = value["bytes_per_token"]["plan"]["dispatch_fast"]
        assert sent == pytest.approx(64 * copies, abs=0.1)
    with pytest.raises(UsageError, match="--expert-size 16 is for --hardware"):
        call("simulate", plan, trace, "--hidden-size", "32", "--expert-size", "16")
    known = shipped_model().parent / "traces" / "final"
    with pytest.raises(UsageError, match="--hidden-size 32 is for --hardware"):
        call("simulate", plan, known, "--hidden-size", "32")


@pytest.mark.parametrize(
    "words",
    [
        ("--engine", "mine"),
        ("--replica-choice", "nearest"),
        ("--batching", "warmup"),
        ("--tokens-per-rank", "64,"),
        ("--hardware", "h300"),
        ("--hardware", "h200"),
    ],
)
def test_names_that_are_not_known_are_wrong_usage(files, words):
    plan, trace, _ = files
    with pytest.raises(UsageError) as error:
        call("simulate", plan, trace, *words)
    assert error.value.hint


def test_the_help_names_every_baseline():
    words = " ".join(call("simulate", "--help").stdout.split())
    assert [name for name in BASELINES if name not in words] == []


def test_baselines_of_others_are_simulated_by_name(files):
    plan, trace, _ = files
    names = ("eplb", "grace", "occult")
    asked = [word for name in names for word in ("--baseline", name)]
    result = call("simulate", plan, trace, "--fold", "1/2", "--json", *asked)
    assert tuple(json.loads(result.stdout)["baselines"]) == names


def test_a_combined_rule_is_judged_beside_the_plain_one(files):
    plan, trace, table = files
    value = json.loads(
        call(
            "tables", plan, trace, "--combined", "--out", table, "--force", "--json"
        ).stdout
    )
    heldout = value["heldout"]
    assert heldout["token_combined"]["local_activation_rate"] > 0.3
    assert heldout["token_equal_combined"]["home_imbalance_max"] < 1.05
    judged = call("simulate", plan, trace, "--table", table, "--fold", "1/2", "--json")
    assert json.loads(judged.stdout)["policies"] == heldout
    plain = Table.read(table).provenance["calibration"]
    assert plain["combined"]["slope"] > 0
    first = table.read_bytes()
    call("tables", plan, trace, "--combined", "--out", table, "--force")
    assert table.read_bytes() == first
