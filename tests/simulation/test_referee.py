"""Agreement with an independent referee on slices of real router traces."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from placer.placement import Placement
from placer.placement.reference import contiguous, random
from placer.simulation import simulate
from placer.solver.balance.load_caps import balanced
from placer.table import Table, build_table
from placer.trace import Chunk
from tests.referee import referee_result


def read_slice(path, num_tokens, num_layers):
    with np.load(path, allow_pickle=False) as data:
        experts = data["experts"][:num_tokens, :num_layers]
        sequence_ids = data["sequence_ids"][:num_tokens]
        ids = data["token_ids"][:num_tokens] if "token_ids" in data.files else None
    return Chunk(
        experts=tuple(np.ascontiguousarray(experts[:, n]) for n in range(num_layers)),
        sequence_ids=sequence_ids,
        positions=np.zeros(num_tokens, dtype=np.int32),
        token_ids=ids,
    )


def with_replicas(num_experts, num_layers, num_ranks, num_nodes, spare_per_rank):
    rng = np.random.default_rng(5)
    rows = []
    for _ in range(num_layers):
        own = rng.permutation(num_experts).reshape(num_ranks, -1)
        more = [
            rng.choice(np.setdiff1d(range(num_experts), r), spare_per_rank, replace=False)
            for r in own
        ]
        rows.append(np.hstack([own, more]).ravel())
    return Placement(
        physical_to_logical_map=tuple(rows),
        num_experts=(num_experts,) * num_layers,
        num_ranks=num_ranks,
        num_nodes=num_nodes,
    )


def assert_agrees(metrics, expected):
    """Every policy and metric of the referee, to 1e-4 (it rounds to four decimals)."""
    assert set(metrics) == set(expected) - {"tokens", "layers", "top_k"}
    for policy, found in metrics.items():
        values = found.to_json()
        assert set(values) == set(expected[policy])
        for name, value in expected[policy].items():
            assert values[name] == pytest.approx(value, abs=1e-4), (policy, name)


def gpt_oss_placements():
    load = [np.arange(32)[::-1] % 7 + 1] * 8
    return {
        "contiguous": contiguous((32,) * 8, 8),
        "balanced": balanced(load, 4),
        "two nodes": random((32,) * 8, 16, 2),
        "replicas": with_replicas(32, 8, 8, 1, 1),
        "replicas on two nodes": with_replicas(32, 8, 8, 2, 2),
    }


@pytest.mark.parametrize("name", gpt_oss_placements())
@pytest.mark.parametrize("batch_size", [4096, 100])
def test_agrees_on_a_slice_of_gpt_oss_without_a_table(archive, name, batch_size):
    tokens = read_slice(archive("gpt-oss-20b"), 6_000, 8)
    placement = gpt_oss_placements()[name]
    assert_agrees(
        simulate(placement, tokens, batch_size=batch_size, replica_choice="local-first"),
        referee_result(placement, tokens, batch_size),
    )


@pytest.mark.parametrize("with_token_score", [False, True])
@pytest.mark.parametrize("name", gpt_oss_placements())
def test_agrees_on_a_slice_of_gpt_oss_with_a_table(
    archive, tmp_path, name, with_token_score
):
    """The table is built from the first sequences; the referee reads its file."""
    every = read_slice(archive("gpt-oss-20b", with_token_ids=True), 9_000, 8)
    placement = gpt_oss_placements()[name]
    middle = every.sequence_ids[4_000]
    profile = every.select(every.sequence_ids < middle)
    table = build_table(
        placement,
        profile,
        vocab_size=int(profile.token_ids.max()) + 1,
        with_token_score=with_token_score,
        replica_choice="local-first",
    )
    path = tmp_path / "table.safetensors"
    table.write(path)
    tokens = every.select(every.sequence_ids >= middle)
    assert_agrees(
        simulate(
            placement,
            tokens,
            batch_size=512,
            table=Table.read(path),
            replica_choice="local-first",
        ),
        referee_result(placement, tokens, 512, load_file(path)),
    )


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_agrees_on_a_slice_of_deepseek(archive, num_nodes):
    tokens = read_slice(archive("deepseek-v2-lite-intent"), 4_000, 6)
    placement = with_replicas(64, 6, 16, num_nodes, 1)
    assert_agrees(
        simulate(placement, tokens, batch_size=4096, replica_choice="local-first"),
        referee_result(placement, tokens, 4096),
    )
