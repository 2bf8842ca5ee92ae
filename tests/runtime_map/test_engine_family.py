"""How engines are started with a plan, beside what their own parsers take."""

import itertools
import json
import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from placer.cli.main import main
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.runtime_map.engine_family import Deployment, known_families, start_lines
from placer.runtime_map.maps import RUNTIMES, export_map
from placer.target.engine import EXCHANGES, REPLICA_CHOICES, known_engines
from placer.target.map_formats import MAPS
from tests.plans import unsolved_plan

PLAIN = [*range(8)]
WITH_COPIES = [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 0]
FAMILIES = known_families()
ENGINES = known_engines()
# Read from the engines' sources.
OWN_FLAGS = tomllib.loads(
    (Path(__file__).parent / "engine_flags.toml").read_text(encoding="utf-8")
)
# vllm-ascend is a plugin: its start line is vLLM's.
OWN_FLAGS["vllm-ascend"] = OWN_FLAGS["vllm"]


def started(family, target, *, num_nodes=2, redundant_experts=0, engine=None):
    """The start of a family on 4 ranks per node."""
    served = Deployment(
        model="MODEL",
        map=None if target == "checkpoint" else "MAP",
        num_ranks=4 * num_nodes,
        num_nodes=num_nodes,
        redundant_experts=redundant_experts,
    )
    return FAMILIES[family].start(served, ENGINES[engine] if engine else None)


def every_start():
    """All families, targets and configurations; one node and two; replicas and none."""
    for name, family in FAMILIES.items():
        own = [one.name for one in ENGINES.values() if one.family == name]
        for target in family.targets:
            for engine in (None, *own):
                for num_nodes in (1, 2):
                    for redundant in (0, 8) if target in RUNTIMES else (0,):
                        yield (
                            name,
                            started(
                                name,
                                target,
                                num_nodes=num_nodes,
                                redundant_experts=redundant,
                                engine=engine,
                            ),
                        )


def test_families_and_engines_name_each_other():
    assert {one.family for one in ENGINES.values()} <= set(FAMILIES)
    for name, family in FAMILIES.items():
        assert family.default is None or ENGINES[family.default].family == name
        assert family.read_in
    for name, runtime in RUNTIMES.items():
        if runtime.family is not None:
            assert name in FAMILIES[runtime.family].targets
    for engine in ENGINES.values():
        assert engine.map_format in ("checkpoint", *FAMILIES[engine.family].targets)


def test_every_option_is_one_that_the_engine_takes():
    seen = set()
    for name, start in every_start():
        # What stands before is mpirun's.
        own = start.command.rpartition("trtllm-llmapi-launch")[2]
        words = [word for text in (own, *start.stale) for word in shlex.split(text)]
        options = {word for word in words if re.match(r"--[a-z]", word)}
        assert options <= set(OWN_FLAGS[name]["flags"]), (name, start)
        seen |= options
    assert {"--enable-eplb", "--attn-dp-size", "--nnodes", "--tp_size"} <= seen


def test_every_value_is_one_that_the_engine_takes():
    """Backends, modes and variables that select a configuration, and those that undo it."""
    seen = 0
    for name, start in every_start():
        choices = OWN_FLAGS[name].get("choices", {})
        for text in (start.command, *start.stale):
            words = re.split(r"[ =]", text)
            for option, value in itertools.pairwise(words):
                if option in choices:
                    assert value in choices[option], (name, text)
                    seen += 1
    assert seen > 100


def test_nothing_is_left_unfilled():
    for _, start in every_start():
        for line in start.lines():
            assert not re.search(r"\{\w+\}|ENVIRONMENT", line), line
        json.dumps(start.to_json())


@pytest.mark.parametrize(
    ("engine", "algorithm", "backend"),
    [
        ("sglang-deepep", "static", "deepep --deepep-mode normal"),
        ("sglang-deepep-ll", "static", "deepep --deepep-mode low_latency"),
        ("sglang-none", "dynamic", "none"),
        ("sglang-deepep-v2-hybrid", "static", "deepep_v2 --deepep-v2-mode hybrid"),
        (None, "static", "deepep --deepep-mode normal"),
        ("vllm-agrs", "static", "deepep"),
    ],
)
def test_sglang_is_started_as_the_plan_counts_on(engine, algorithm, backend):
    """2 nodes of 4, 8 redundant experts: homes are attention-DP ranks, copies are drawn."""
    start = started("sglang", "sglang", redundant_experts=8, engine=engine)
    for part in (
        "--model-path MODEL",
        "--tp-size 8 --ep-size 8 --attn-dp-size 8",
        f"--moe-a2a-backend {backend}",
        "--init-expert-location MAP",
        f"--ep-dispatch-algorithm {algorithm}",
        "--ep-num-redundant-experts 8",
        "--nnodes 2 --node-rank NODE_RANK --dist-init-addr HOST:PORT",
    ):
        assert part in start.command
    assert ("--ep-dispatch-algorithm dynamic" in start.stale) == (algorithm == "static")
    assert "--ep-dispatch-algorithm lp" in start.stale
    assert {"--enable-eplb", "--elastic-ep-backend", "--enable-waterfill"} <= set(
        start.stale
    )


def test_sglang_serves_a_permuted_checkpoint_without_a_map():
    """Without redundant experts no copy is chosen, so no choice can make the plan stale."""
    start = started("sglang", "checkpoint", num_nodes=1)
    for absent in ("--init-expert-location", "--ep-dispatch-algorithm", "--nnodes"):
        assert absent not in start.command
        assert absent not in " ".join(start.stale)


def test_vllm_keeps_the_order_of_the_checkpoint():
    start = started("vllm", "checkpoint", engine="vllm-deepep-v2-direct")
    assert start.command.startswith("VLLM_DEEPEP_V2_ALLOW_HYBRID_MODE=0 vllm serve MODEL ")
    for part in (
        "--enable-expert-parallel --tensor-parallel-size 1 --data-parallel-size 8",
        "--expert-placement-strategy linear",
        "--all2all-backend deepep_v2",
        "--data-parallel-size-local 4 --data-parallel-start-rank START_RANK",
    ):
        assert part in start.command
    assert "--enable-eplb" not in start.command
    assert {"--enable-eplb", "--expert-placement-strategy round_robin"} <= set(start.stale)


@pytest.mark.parametrize("target", ["trtllm", "checkpoint"])
def test_tensorrt_llm_gets_a_file_of_options(target):
    """On 2 nodes of 4 ranks, where its kernels of one NVLink domain do not run."""
    start = started("trtllm", target)
    written, command = start.command.split(" > options.yaml && ")
    options = shlex.split(written)[2]
    assert options.startswith("enable_attention_dp: true\n")
    assert ('load_balancer: "MAP"' in options) == (target == "trtllm")
    assert command.startswith(
        "mpirun -n 8 --hostfile HOSTFILE -x TRTLLM_FORCE_COMM_METHOD=DEEPEPLOWLATENCY "
        "trtllm-llmapi-launch trtllm-serve MODEL --tp_size 8 --ep_size 8"
    )
    map_alone = target == "trtllm"
    assert ("layer_updates_per_iter above 0" in start.stale) == map_alone
    assert ("moe_config.load_balancer" in start.stale) != map_alone


def test_a_path_is_quoted_and_never_filled_in():
    served = Deployment(model="a b{ranks}", map="it's", num_ranks=4, num_nodes=1)
    for family in ("sglang", "vllm-ascend", "trtllm"):
        command = FAMILIES[family].start(served).command
        words = shlex.split(command.partition(" && ")[2] or command)
        assert "a b{ranks}" in words
        assert "it's" in command.replace("'\"'\"'", "'")


@pytest.mark.parametrize(
    ("family", "model_type", "architectures", "reads"),
    [
        ("sglang", "kimi_k2", (), True),
        ("sglang", "kimi_k2", ("DeepseekV3ForCausalLM",), True),
        ("sglang", "kimi_k25", (), True),
        ("trtllm", "kimi_k2", (), True),
        ("trtllm", "kimi_k25", ("KimiK25ForConditionalGeneration",), True),
        ("sglang", "of_a_vendor", ("Qwen3MoeForCausalLM",), True),
        ("sglang", "qwen3_moe", ("OfAVendorForCausalLM",), False),
        ("trtllm", "kimi_k2", ("KimiOfAVendor",), False),
        ("sglang", "step3p5", ("Step3p5ForCausalLM",), True),
        ("sglang", "mistral_large_3", (), True),
        ("sglang", "kimi_vl", ("KimiVLForConditionalGeneration",), False),
        ("sglang", "mixtral", ("MixtralForCausalLM",), False),
        ("trtllm", "mixtral", ("MixtralForCausalLM",), True),
        ("sglang", "gpt_oss", ("GptOssForCausalLM",), False),
        ("trtllm", "gpt_oss", ("GptOssForCausalLM",), True),
        ("trtllm", "deepseek_v2", ("DeepseekV2ForCausalLM",), False),
        ("sglang", None, (), True),
        ("vllm-ascend", "mixtral", (), True),
    ],
)
def test_engines_choose_by_architecture_whether_they_read_a_map(
    family, model_type, architectures, reads
):
    reason = FAMILIES[family].no_map_reason(model_type, architectures)
    assert (reason is None) == reads
    assert reads or model_type in reason


def test_needs_are_known():
    known = {"map", "checkpoint", "redundant", "nodes", "rack", *REPLICA_CHOICES, *ENGINES}
    assert known.isdisjoint(EXCHANGES)
    for family in FAMILIES.values():
        for one in (*family.flags, *family.options, *family.conditions, *family.stale):
            assert set(one.needs) <= known


@pytest.mark.parametrize("as_json", [False, True])
def test_export_checkpoint_tells_how_every_engine_is_started(
    as_json, tiny_model, make_plan, tmp_path, capsys
):
    """The family that the plan was solved for comes first."""
    plan = make_plan(tiny_model)
    solved = json.loads(plan.read_text()) | {"sha256": None}
    solved["provenance"]["engine"] = "vllm-deepep-ht"
    plan.write_text(json.dumps(solved))
    words = ["export", "checkpoint", str(plan), str(tiny_model)]
    words += ["--out", str(tmp_path / "out"), *(["--json"] if as_json else [])]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    printed = capsys.readouterr()
    told = [line for line in printed.err.splitlines() if line.startswith("start ")]
    serving = [one for one in FAMILIES.values() if "checkpoint" in one.targets]
    assert len(told) == len(serving) > 4
    assert told[0].startswith(f"start vLLM: vllm serve {tmp_path / 'out'} ")
    assert "--all2all-backend deepep_high_throughput" in told[0]
    if as_json:
        start = json.loads(printed.out)["start"]
        assert f"start vLLM: {start[0]['command']}" == told[0]
        assert "--enable-eplb" in start[0]["stale"]


def solved(model, tmp_path, *, row=PLAIN, exchange=None, **provenance):
    """A plan on 4 ranks; with an exchange, one that lowers what is sent."""
    placed = Placement.from_json([row] * 2, (8, 8), 4, 1)
    plan = unsolved_plan(ModelSpec.from_checkpoint(model), placed, **provenance)
    if exchange is not None:
        lowered = msgspec.structs.replace(plan.solver, most_received_copies=1.0)
        plan = replace(plan, exchange=exchange, solver=lowered)
    plan.write(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.mark.parametrize(
    ("target", "choice", "engine", "drawn"),
    [
        ("sglang", "hash", None, "sglang-static"),
        ("sglang", "hash", "sglang-none", None),
        ("sglang", "sglang-static", None, None),
        ("sglang", "sglang-static", "sglang-deepep", None),
        ("sglang", "local-first", None, "sglang-static"),
        ("sglang", "hash", "trtllm-onesided", "sglang-static"),
        ("sglang", None, None, None),
        ("trtllm", "sglang-static", "sglang-deepep", "hash"),
        ("trtllm", "cover", None, "hash"),
        ("trtllm", "hash", None, None),
        ("json", "cover", None, None),
    ],
)
def test_copies_that_are_drawn_otherwise_are_told(
    target, choice, engine, drawn, tiny_model, tmp_path
):
    """With the command that solves for the engine of the start line."""
    told = {"replica_choice": choice, "engine": engine}
    plan = solved(tiny_model, tmp_path, row=WITH_COPIES, **told)
    out = tmp_path / f"map{MAPS[target].suffixes[0]}"
    written = export_map(target, plan, tiny_model, out)
    found = [one for one in written.warnings if "solved for replica choice" in one]
    assert bool(found) == (drawn is not None)
    if found:
        assert f"solved for replica choice {choice}, but {target}-" in found[0]
        assert f"uses {drawn}: " in found[0]
        assert "--nodes 1 --gpus-per-node 4 --redundant-experts 4 --out NEW" in found[0]
    if target == "sglang":
        # The start line never warns against what the plan was solved for.
        algorithm = "dynamic" if choice == "hash" else "static"
        assert f"--ep-dispatch-algorithm {algorithm} " in written.start[0].command
        assert f"--ep-dispatch-algorithm {algorithm}" not in written.start[0].stale


@pytest.mark.parametrize(
    ("exchange", "engine", "vllm", "sglang"),
    [
        (None, None, "allgather_reducescatter", "deepep --deepep-mode normal"),
        ("per-rank", None, "deepep_high_throughput", "deepep --deepep-mode normal"),
        ("per-node", None, "deepep_high_throughput", "deepep --deepep-mode normal"),
        (
            "per-rank",
            "sglang-deepep",
            "deepep_high_throughput",
            "deepep --deepep-mode normal",
        ),
        (
            None,
            "sglang-deepep-ll",
            "deepep_low_latency",
            "deepep --deepep-mode low_latency",
        ),
        (None, "trtllm-allgather", "allgather_reducescatter", "none"),
    ],
)
def test_a_checkpoint_is_served_with_the_exchange_of_the_plan(
    exchange, engine, vllm, sglang, tiny_model, tmp_path
):
    plan = solved(tiny_model, tmp_path, exchange=exchange or "per-rank", engine=engine)
    if exchange is None and engine is None:
        plan = solved(tiny_model, tmp_path)
    starts = {one.engine: one for one in start_lines("checkpoint", Plan.read(plan), "M")}
    assert f"--all2all-backend {vllm}" in starts["vLLM"].command
    assert f"--moe-a2a-backend {sglang}" in starts["SGLang"].command
    sends = "per-rank" if engine is None else ENGINES[engine].dispatch.exchange
    told = [text for text in starts["transformers"].conditions if "the plan is for" in text]
    lowers = engine is not None or exchange is not None
    assert bool(told) == (lowers and sends not in ("per-expert", "all-gather"))
    assert not told or "this engine sends per-expert" in told[0]


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_nodes_that_an_engine_takes_otherwise_stand_with_its_start(num_nodes):
    served = Deployment(model="M", map="x.json", num_ranks=8, num_nodes=num_nodes)
    start = known_families()["sglang"].start(served, ENGINES["sglang-deepep"])
    told = [text for text in start.conditions if "every 8 ranks in a row" in text]
    assert len(told) == num_nodes - 1
