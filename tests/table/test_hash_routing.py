"""Hash-routed layers: rows against what a real DeepSeek-V4 calls its experts with."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement import Placement
from placer.placement.reference import contiguous
from placer.planning.tables import TableOptions, make_table
from placer.table import build_table
from placer.table.hash_routing import read_token_experts
from placer.trace import Chunk, Trace, TraceWriter
from tests.families import build, oracle

VOCABULARY = 64


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model of four MoE layers, 0 and 1 hash-routed, and what all 64 ids are routed to.

    ``routed`` is [layer][id], each the set of experts that were called; ``profile`` holds
    ids 0 to 39 alone.
    """
    model = build("deepseek_v4")
    folder = tmp_path_factory.mktemp("deepseek") / "model"
    model.save_pretrained(folder)
    called = oracle(model, torch.arange(VOCABULARY)[None])
    routed = [called[name] for name in sorted(called)]
    assert len(routed) == 4
    seen = np.arange(40, dtype=np.int32)
    profile = Chunk(
        experts=tuple(
            np.array([sorted(layer[i]) for i in seen], dtype=np.uint8) for layer in routed
        ),
        sequence_ids=(seen // 10).astype(np.int32),
        positions=(seen % 10).astype(np.int32),
        token_ids=seen,
    )
    return SimpleNamespace(folder=folder, routed=routed, profile=profile)


def replicated() -> Placement:
    """Eight experts on four ranks, and on each rank one copy more; layers differ."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(4):
        own = rng.permutation(8).reshape(4, 2)
        more = [rng.choice(np.setdiff1d(range(8), held), 1) for held in own]
        rows.append(np.hstack([own, more]).ravel())
    return Placement(physical_to_logical_map=tuple(rows), num_experts=(8,) * 4, num_ranks=4)


@pytest.mark.parametrize("placement", [contiguous((8,) * 4, 4), replicated()])
def test_every_id_has_the_home_that_serves_most_of_its_real_experts(deepseek, placement):
    """Ids 40 to 63 are in no trace; their rows are as exact as the others."""
    spec = ModelSpec.from_checkpoint(deepseek.folder)
    experts = read_token_experts(deepseek.folder, spec)
    table = build_table(
        placement,
        deepseek.profile,
        vocab_size=VOCABULARY,
        token_experts=experts,
        with_token_score=True,
        replica_choice="hash",
    )
    assert sorted(experts) == [0, 1]
    for layer in (0, 1):
        slots = placement.physical_to_logical_map[layer].reshape(4, -1)
        for token_id, chosen in enumerate(deepseek.routed[layer]):
            served = [len(chosen & set(held.tolist())) / 2 for held in slots]
            assert served[table.token_rank[layer, token_id]] == max(served)
            assert table.token_confidence[layer, token_id] == max(served)
            assert table.token_score[layer, token_id].tolist() == served
    unseen = table.token_confidence[:, 40:]
    assert len(set(unseen[0].tolist())) > 1
    assert len(set(unseen[2].tolist())) == 1, "a layer with a router has the prior's row"


def test_a_tie_goes_to_the_home_that_the_checkpoint_lists_first(deepseek):
    """Top-2 of contiguous pairs: unless both are on one rank, the first one's rank."""
    spec = ModelSpec.from_checkpoint(deepseek.folder)
    experts = read_token_experts(deepseek.folder, spec)
    table = build_table(
        contiguous((8,) * 4, 4),
        deepseek.profile,
        vocab_size=VOCABULARY,
        token_experts=experts,
    )
    stored = load_file(deepseek.folder / "model.safetensors")
    for layer in (0, 1):
        listed = next(
            v for k, v in stored.items() if k.endswith(f"{layer}.ffn.gate.tid2eid")
        )
        assert table.token_rank[layer].tolist() == (listed[:, 0] // 2).tolist()


def test_no_history_outvotes_an_exact_row(deepseek):
    """Behind it, histories are counted as ever."""
    spec = ModelSpec.from_checkpoint(deepseek.folder)
    experts = read_token_experts(deepseek.folder, spec)
    options = {"vocab_size": VOCABULARY, "lookback": 1, "token_experts": experts}
    table = build_table(contiguous((8,) * 4, 4), deepseek.profile, **options)
    assert table.history_confidence[:2].max() == 0 < table.history_confidence[2:].min()


def test_under_a_cap_exact_rows_keep_the_rate_of_the_home_taken(deepseek):
    spec = ModelSpec.from_checkpoint(deepseek.folder)
    experts = read_token_experts(deepseek.folder, spec)
    placement = contiguous((8,) * 4, 4)
    options = {"vocab_size": VOCABULARY, "token_experts": experts}
    plain, capped = (
        build_table(placement, deepseek.profile, max_home_imbalance=cap, **options)
        for cap in (None, 1.01)
    )

    def crowd(table):
        homes = table.token_rank[:2, deepseek.profile.token_ids]
        return [np.bincount(row, minlength=4).max() for row in homes]

    assert max(crowd(plain)) > 12
    assert max(crowd(capped)) <= 11, "10 on each rank is even"
    for layer in (0, 1):
        for token_id, chosen in enumerate(deepseek.routed[layer]):
            home = capped.token_rank[layer, token_id]
            served = sum(expert // 2 == home for expert in chosen) / 2
            assert capped.token_confidence[layer, token_id] == served


def test_the_command_finds_the_hash_routed_layers_itself(deepseek, write_plan, tmp_path):
    spec = ModelSpec.from_checkpoint(deepseek.folder)
    with TraceWriter(directory=tmp_path / "trace", model=spec) as writer:
        writer.append(deepseek.profile)
        writer.finish()
    plan = write_plan(spec, contiguous((8,) * 4, 4))
    options = TableOptions(embeddings=deepseek.folder)
    result = make_table(plan, Trace(tmp_path / "trace"), fold=None, options=options)
    assert result.exact_layers == (0, 1)
    assert result.to_json()["exact_layers"] == [0, 1]
    assert result.table.provenance["exact_layers"] == [0, 1]
    served = [len(chosen) / 2 for chosen in deepseek.routed[0]]
    assert served == [1.0] * VOCABULARY
    share = [max(np.bincount([e // 2 for e in c])) / 2 for c in deepseek.routed[0]]
    assert result.table.token_confidence[0].tolist() == share


def test_a_trace_of_other_routing_is_refused(deepseek):
    spec = ModelSpec.from_checkpoint(deepseek.folder)
    experts = dict(read_token_experts(deepseek.folder, spec))
    experts[1] = (experts[1] + 1) % 8
    with pytest.raises(PlacerError, match="MoE layer 1 is hash-routed, but") as error:
        build_table(
            contiguous((8,) * 4, 4),
            deepseek.profile,
            vocab_size=VOCABULARY,
            token_experts=experts,
        )
    assert "--embeddings MODEL" in error.value.hint


def test_a_vocabulary_of_another_size_is_refused(deepseek):
    spec = ModelSpec.from_checkpoint(deepseek.folder)
    experts = read_token_experts(deepseek.folder, spec)
    with pytest.raises(PlacerError, match="64 token ids, but the vocabulary has 70"):
        build_table(
            contiguous((8,) * 4, 4),
            deepseek.profile,
            vocab_size=70,
            token_experts=experts,
        )


def test_a_model_without_hash_layers_has_no_exact_rows(tiny_model):
    assert read_token_experts(tiny_model, ModelSpec.from_checkpoint(tiny_model)) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:, :1], r"shape \[64, 1\], expected integers of shape \[64, 2\]"),
        (lambda t: t[:9], r"shape \[9, 2\]"),
        (lambda t: t.float(), "float32 of shape"),
        (lambda t: t + 3, r"experts outside 0\.\.7"),
        (lambda t: t - 1, r"experts outside 0\.\.7"),
    ],
)
def test_a_damaged_table_is_refused(deepseek, tmp_path, change, message):
    tensors = load_file(deepseek.folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("0.ffn.gate.tid2eid"))
    save_file({name: change(tensors[name]).contiguous()}, tmp_path / "model.safetensors")
    config = (deepseek.folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(PlacerError, match=message):
        read_token_experts(tmp_path, ModelSpec.from_checkpoint(tmp_path))


def test_an_index_whose_file_is_absent_is_refused(deepseek, tmp_path):
    name = "layers.0.ffn.gate.tid2eid"
    index = {"weight_map": {name: "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((deepseek.folder / "config.json").read_text())
    with pytest.raises(PlacerError, match="does not exist"):
        read_token_experts(tmp_path, ModelSpec.from_checkpoint(tmp_path))
    damaged: Path = tmp_path / "model.safetensors.index.json"
    damaged.write_text("{}")
    with pytest.raises(PlacerError, match="has no weight_map"):
        read_token_experts(tmp_path, ModelSpec.from_checkpoint(tmp_path))
