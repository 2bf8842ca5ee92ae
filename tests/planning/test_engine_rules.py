"""Every engine, with all that may be asked for it: refused, or a plan that it loads."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.checkpoint.permutation import require_whole_groups
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.placement.topology import Topology
from placer.planning.solving import solve_request
from placer.runtime_map.maps import export_map
from placer.solver.options import SolveOptions
from placer.target.engine import Engine, known_engines
from placer.trace import Chunk, TraceWriter
from tests.plans import changed, request_for, unsolved_plan

CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "topk_method": "noaux_tc",
    "hidden_size": 64,
    "vocab_size": 50,
}
QUICK = SolveOptions(topology=Topology(gpus_per_node=4)).quick()


def silent(text: str) -> None:
    """Take any sentence."""


def model_of(folder: Path, n_group: int) -> ModelSpec:
    """Write a config of eight experts in one layer, and return its model."""
    folder.mkdir()
    config = CONFIG | {"n_group": n_group, "topk_group": max(1, n_group // 2)}
    (folder / "config.json").write_text(json.dumps(config))
    return ModelSpec.from_checkpoint(folder)


def require_exported(path: Path, engine: Engine, model: Path, out: Path) -> None:
    """Export for the engine; a permuted checkpoint's rules are asked themselves."""
    plan = Plan.read(path)
    if engine.map_format != "checkpoint":
        suffix = ".yaml" if engine.map_format == "trtllm" else ".json"
        out = out.with_suffix(suffix)
        export_map(engine.map_format, path, model, out)
        out.unlink()
        return
    assert not plan.placement.has_replicas
    rows = [plan.placement.permutation(0)]
    if engine.group_rule == "router-groups":
        require_whole_groups(plan.model, rows)


@pytest.mark.parametrize("name", known_engines())
def test_what_is_solved_for_an_engine_can_be_exported_for_it(
    name: str, make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    solved = 0
    for n_group in (1, 4):
        folder, source = tmp_path / f"model{n_group}", tmp_path / f"trace{n_group}"
        with TraceWriter(directory=source, model=model_of(folder, n_group)) as writer:
            writer.append(make_chunk(num_experts=(8,), num_tokens=40))
            writer.finish()
        for ranks, more, policy, groups in itertools.product(
            (4, 3), (0, 4, 1), ("fixed", "follow"), ("", "preserve_groups", "ignore_groups")
        ):
            topology = Topology(gpus_per_node=ranks)
            options = changed(QUICK, topology=topology, policy=policy)
            options = changed(options, **({groups: True} if groups else {}))
            request = request_for(source, options, engine=name, redundant_experts=more)
            try:
                plan = solve_request(request, silent, silent).plan
            except UsageError:
                continue
            plan.write(path := tmp_path / f"plan{solved}.json")
            require_exported(path, Engine.named(name), folder, tmp_path / "map")
            solved += 1
    assert solved >= 3


def counts(path: Path, chunk: Chunk) -> Path:
    sizes = tuple(int(ids.max()) + 1 for ids in chunk.experts)
    count_affinity([chunk], ModelSpec(num_experts=sizes, top_k=2), {}).write(path)
    return path


def test_counts_that_cannot_tell_copies_between_nodes_offer_to_balance(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    """The hint keeps engine, nodes and redundant experts; what it says can be solved."""
    request = request_for(
        counts(tmp_path / "a.aff", make_chunk()),
        replace(QUICK, topology=Topology(num_nodes=2, gpus_per_node=2)),
        engine="sglang-deepep",
        redundant_experts=4,
    )
    with pytest.raises(UsageError, match="--exchange per-node needs the tokens") as error:
        solve_request(request, silent, silent)
    for words in (
        f"placer solve {tmp_path / 'a.aff'} --engine sglang-deepep --objective balance",
        "--nodes 2 --gpus-per-node 2 --redundant-experts 4 --out PLAN",
    ):
        assert words in error.value.hint
    balance = request.with_goal(replace(request.options.goal, objective="balance"))
    plan = solve_request(balance, silent, silent).plan
    assert plan.placement.redundant_experts == 4


@pytest.mark.parametrize(
    ("asked", "engine", "told"),
    [
        ({}, "sglang-none", "solved for --engine sglang-none, as"),
        ({"engine": "vllm-agrs"}, "vllm-agrs", "solved for --engine vllm-agrs, but"),
        ({"exchange": "per-rank"}, None, "solved for no engine, but"),
        ({"engine": "sglang-none"}, "sglang-none", None),
    ],
)
def test_a_plan_to_start_from_brings_its_engine(
    make_chunk: Callable[..., Chunk],
    tmp_path: Path,
    asked: dict[str, str],
    engine: str | None,
    told: str | None,
) -> None:
    with TraceWriter(
        directory=tmp_path / "trace", model=ModelSpec(num_experts=(8,), top_k=2)
    ) as writer:
        writer.append(make_chunk(num_experts=(8,)))
        writer.finish()
    now = Placement.from_expert_rank([np.arange(8) // 2], 4)
    plan = unsolved_plan(ModelSpec(num_experts=(8,), top_k=2), now, engine="sglang-none")
    plan.write(tmp_path / "now.json")
    lines: list[str] = []
    start = tmp_path / "now.json"
    request = request_for(tmp_path / "trace", QUICK, start=start, **asked)
    found = solve_request(request, lines.append, silent).plan
    assert found.provenance.get("engine") == engine
    assert [one for one in lines if one.startswith("solved for ")] == [
        one for one in lines if told is not None and one.startswith(told)
    ]
    assert any(told in one for one in lines) if told else True
