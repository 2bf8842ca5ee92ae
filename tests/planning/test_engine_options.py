"""What an engine asks of a solve."""

import pytest

from placer.errors import UsageError
from placer.model import ModelSpec
from placer.placement import Placement
from placer.placement.reference import contiguous
from placer.placement.topology import Topology
from placer.planning.engine_options import require_loadable, solved_for, split_groups
from placer.target.engine import Engine, known_engines
from tests.plans import unsolved_plan

ONE_NODE = Topology(gpus_per_node=4)
TWO_NODES = Topology(num_nodes=2, gpus_per_node=2)


def test_without_an_engine_what_was_asked_counts() -> None:
    served = solved_for(None, "fixed")
    assert (served.objective, served.exchange) == ("traffic", "per-rank")
    assert solved_for(None, "fixed", exchange="per-node").exchange == "per-node"
    assert not served.notes


@pytest.mark.parametrize(
    ("engine", "policy", "objective", "exchange"),
    [
        ("sglang-deepep", "fixed", "traffic", "per-node"),
        ("trtllm-onesided", "fixed", "traffic", "per-rank"),
        ("sglang-none", "follow", "balance", "per-rank"),
        ("deepspeed", "follow", "balance", "per-rank"),
        ("transformers-a2a", "fixed", "balance", "per-rank"),
        ("transformers-a2a", "follow", "traffic", "per-rank"),
    ],
)
def test_an_engine_decides_exchange_and_objective(
    engine: str, policy: str, objective: str, exchange: str
) -> None:
    served = solved_for(engine, policy)
    assert (served.objective, served.exchange) == (objective, exchange)
    plain = engine in ("sglang-deepep", "trtllm-onesided")
    assert bool(served.notes) != plain, "what is not solved for as it is, is said"


@pytest.mark.parametrize("engine", ["sglang-deepep-ll", "sglang-megamoe"])
def test_copies_balance_an_engine_that_sends_pairs(engine: str) -> None:
    """Fewer ranks per token save nothing there: a pair is sent wherever its copy is."""
    served = solved_for(engine, "fixed", has_replicas=True)
    assert (served.objective, served.replica_choice) == ("balance", "sglang-static")
    (note,) = served.notes
    assert "only the number of replicas matters" in note
    (note,) = solved_for(engine, "follow", has_replicas=True).notes
    assert "may send more pairs" in note


@pytest.mark.parametrize(
    ("objective", "has_replicas", "choice"),
    [
        ("traffic", False, None),
        ("traffic", True, "sglang-static"),
        ("balance", False, None),
        ("balance", True, "sglang-static"),
    ],
)
def test_copies_are_chosen_as_the_engine_does(
    objective: str, has_replicas: bool, choice: str | None
) -> None:
    served = solved_for("sglang-deepep", "fixed", objective, has_replicas=has_replicas)
    assert served.replica_choice == choice
    assert served.exchange == ("per-node" if objective == "traffic" else "per-rank")
    assert served.notes == ()


@pytest.mark.parametrize(
    ("engine", "counts"),
    [
        ("sglang-deepep", True),
        ("trtllm-onesided", True),
        ("sglang-deepep-ll", False),  # one copy per pair, wherever its expert is
        ("vllm-agrs", False),  # every token goes everywhere
    ],
)
def test_router_groups_count_where_ranks_or_nodes_are_what_is_sent_to(
    engine: str, counts: bool
) -> None:
    assert solved_for(engine, "fixed").groups_count == counts


def test_contradictions_are_refused() -> None:
    with pytest.raises(UsageError, match="--exchange per-rank contradicts"):
        solved_for("sglang-deepep", "fixed", exchange="per-rank")
    with pytest.raises(UsageError, match="--replica-choice hash contradicts"):
        solved_for("sglang-deepep", "fixed", replica_choice="hash")
    with pytest.raises(UsageError, match="is not known"):
        solved_for("nothing", "fixed")


def of_type(model_type: str | None, n_group: int = 1) -> ModelSpec:
    return ModelSpec(model_type=model_type, num_experts=(8, 8), top_k=2, n_group=n_group)


@pytest.mark.parametrize(
    ("engine", "model_type", "reason"),
    [
        ("vllm-deepep-ht", "deepseek_v3", "vLLM loads no map"),
        ("transformers-a2a", "deepseek_v3", "transformers loads no map"),
        ("deepspeed", None, "DeepSpeed loads no map"),
        ("sglang-deepep", "mixtral", "SGLang ignores a map for mixtral"),
        (
            "sglang-deepep-v2-hybrid",
            "gpt_oss",
            "SGLang ignores the map for MXFP4 experts of gpt_oss",
        ),
        ("trtllm-onesided", "deepseek_v2", "TensorRT-LLM ignores a map for deepseek_v2"),
        ("sglang-deepep", "deepseek_v3", None),
        ("sglang-deepep", "kimi_k2", None),
        ("trtllm-onesided", "kimi_k25", None),
        ("trtllm-onesided", "gpt_oss", None),
        ("sglang-deepep", None, None),
    ],
)
def test_redundant_experts_that_no_map_brings_are_refused(
    engine: str, model_type: str | None, reason: str | None
) -> None:
    """What is refused is possible without redundant experts, as the hint says."""
    one, model = Engine.named(engine), of_type(model_type)
    if reason is None:
        require_loadable(one, model, redundant_experts=4, topology=ONE_NODE)
        return
    with pytest.raises(UsageError, match=reason) as error:
        require_loadable(one, model, redundant_experts=4, topology=ONE_NODE)
    assert f"placer solve TRACE --engine {engine} --redundant-experts 0" in error.value.hint
    loading = require_loadable(one, model, redundant_experts=0, topology=ONE_NODE)
    told = [note for note in loading.notes if "placer export checkpoint" in note]
    assert bool(told) == (one.map_format != "checkpoint")


def test_the_architectures_of_a_checkpoint_decide_whether_a_map_is_read() -> None:
    engine, model = Engine.named("sglang-deepep"), of_type("of_a_vendor")
    with pytest.raises(UsageError, match="SGLang ignores a map for of_a_vendor"):
        require_loadable(engine, model, redundant_experts=4, topology=ONE_NODE)
    known = ["Qwen3MoeForCausalLM"]
    require_loadable(engine, model, known, redundant_experts=4, topology=ONE_NODE)


@pytest.mark.parametrize("name", known_engines())
def test_an_engine_names_one_that_runs_on_these_nodes(name: str) -> None:
    """2 x 2 ranks: neither one node, nor one NVLink domain, nor nodes of 8."""
    engine, model = Engine.named(name), of_type("deepseek_v3")
    if not (engine.within or engine.topologies):
        require_loadable(engine, model, redundant_experts=0, topology=TWO_NODES)
        return
    reason = f"--engine {name} runs (on|inside) .* 2"
    with pytest.raises(UsageError, match=reason) as error:
        require_loadable(engine, model, redundant_experts=0, topology=TWO_NODES)
    other = Engine.named(error.value.hint.rpartition("--engine ")[2].split()[0])
    assert other.family == engine.family
    require_loadable(other, model, redundant_experts=0, topology=TWO_NODES)


@pytest.mark.parametrize(
    ("nodes", "ranks", "runs"),
    [
        (1, 2, 1),
        (1, 4, 1),
        (1, 8, 1),
        (1, 3, 0),
        (2, 4, 0),
        (2, 8, 1),
        (3, 8, 0),
        (4, 8, 1),
    ],
)
def test_deepep_of_tensorrt_llm_runs_where_its_source_says(
    nodes: int, ranks: int, runs: int
) -> None:
    """``_is_deepep_feasible``: one node of 2, 4 or 8 ranks, or 2, 4, 8, 16 nodes of 8."""
    assert (Engine.named("trtllm-deepep").misfit(nodes, ranks) is None) == runs


@pytest.mark.parametrize("name", ["sglang-deepep", "vllm-deepep-ht"])
@pytest.mark.parametrize(
    ("nodes", "ranks", "taken"),
    [(1, 4, None), (1, 8, None), (4, 8, None), (2, 4, 8), (3, 4, 8), (2, 2, 4), (1, 16, 8)],
)
def test_nodes_that_deepep_takes_otherwise_are_told(
    name: str, nodes: int, ranks: int, taken: int | None
) -> None:
    """Its Buffer has min(8, ranks) ranks in an NVLink node, and rank // 8 is the node."""
    doubt = Engine.named(name).doubt(nodes, ranks)
    if taken is None:
        assert doubt is None
    else:
        assert f"every {taken} ranks in a row" in doubt
        assert f"nodes have {ranks} ranks:" in doubt
        assert "Use nodes of 8 ranks, or one node with fewer" in doubt
        assert doubt.endswith("csrc/legacy/buffer.hpp, LEGACY_NUM_MAX_NVL_PEERS)")
    assert Engine.named("sglang-deepep-v2-hybrid").doubt(nodes, ranks) is None


def test_the_ranks_of_one_nvlink_domain_are_offered_as_one_node() -> None:
    """TensorRT-LLM's own wide-EP example: 36 ranks with 288 slots for 256 experts."""
    rack = Topology(num_nodes=9, gpus_per_node=4)
    engine, model = Engine.named("trtllm-onesided"), of_type("deepseek_v3")
    with pytest.raises(UsageError, match="one NVLink domain, --nodes is 9") as error:
        require_loadable(engine, model, redundant_experts=32, topology=rack)
    own, _, other = error.value.hint.partition("; if not: ")
    assert own.endswith(
        "placer solve TRACE --engine trtllm-onesided --nodes 1 --gpus-per-node 36 "
        "--redundant-experts 32 --out PLAN"
    )
    assert "--nodes 9 --gpus-per-node 4 --redundant-experts 32" in other


def test_one_nvlink_domain_is_one_node() -> None:
    engine = Engine.named("trtllm-onesided")
    assert engine.misfit(1, 72) is None
    assert "--nodes 1 --gpus-per-node 72" in str(engine.misfit(18, 4))


@pytest.mark.parametrize(
    ("engine", "model_type", "n_group", "keeps"),
    [
        ("vllm-agrs", "deepseek_v3", 8, True),
        ("vllm-agrs", "deepseek_v3", 1, False),
        ("deepspeed", "deepseek_v3", 8, False),
        ("sglang-deepep", "deepseek_v3", 8, False),
        ("sglang-deepep", "dots1", 8, True),
    ],
)
def test_a_plan_for_a_permuted_checkpoint_keeps_router_groups(
    engine: str, model_type: str, n_group: int, keeps: bool
) -> None:
    loading = require_loadable(
        Engine.named(engine),
        of_type(model_type, n_group),
        redundant_experts=0,
        topology=ONE_NODE,
    )
    assert loading.keeps_groups == keeps


def test_split_router_groups_tell_how_many_nodes_a_token_can_visit() -> None:
    """Eight experts in four groups of two, one group a node; a token has two groups."""
    model = ModelSpec(num_experts=(8,), top_k=4, n_group=4, topk_group=2)
    asked: dict[str, object] = {"objective": "balance"}
    whole = contiguous((8,), 4, 4)
    assert split_groups(unsolved_plan(model, whole, **asked)) is None
    # Each group on two nodes: two groups on all four.
    split = Placement.from_json([[0, 2, 1, 3, 4, 6, 5, 7]], (8,), 4, 4)
    told = split_groups(unsolved_plan(model, split, **asked))
    assert told is not None and "up to 4 nodes instead of 2." in told
    # No more than the experts of a token.
    three = ModelSpec(num_experts=(8,), top_k=3, n_group=4, topk_group=2)
    told = split_groups(unsolved_plan(three, split, **asked))
    assert told is not None and "up to 3 nodes instead of 2." in told
    pairs = unsolved_plan(model, split, engine="trtllm-deepep-ll", **asked)
    assert split_groups(pairs) is None, "it sends the same copies"
