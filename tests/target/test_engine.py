"""Engines as data, and what a placement can change of what they send."""

import re
import tomllib

import numpy as np
import pytest

from placer.errors import PlacerError, UsageError
from placer.placement import Placement
from placer.placement.reference import random
from placer.run import documents
from placer.run.documents import read_data
from placer.simulation import simulate
from placer.target.engine import (
    EXCHANGES,
    PHASES,
    REPLICA_CHOICES,
    Engine,
    Transfer,
    choose_replicas,
    engines_named,
    known_engines,
    placement_effect,
)
from placer.target.map_formats import MAPS
from placer.trace import Chunk

ENGINES = known_engines()


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_says_where_its_facts_come_from(name):
    engine = ENGINES[name]
    assert engine.name == name
    assert engine.source.startswith("https://")
    assert engine.read_in
    assert engine.notes
    assert engine.map_format in ("checkpoint", *MAPS)


def test_the_engines_that_users_name_are_there():
    assert {
        "sglang-deepep",
        "sglang-deepep-ll",
        "vllm-agrs",
        "vllm-deepep-ht",
        "vllm-deepep-ll",
        "trtllm-onesided",
        "transformers-a2a",
        "deepspeed",
    } <= set(ENGINES)


@pytest.mark.parametrize(
    ("name", "one_node", "phases"),
    [
        ("sglang-deepep", "per-rank", "prefill"),
        ("sglang-deepep-ll", "per-expert", "decode"),
        ("sglang-deepep-v2-direct", "per-rank", "prefill decode"),
        ("sglang-deepep-v2-hybrid", "per-rank", "prefill decode"),
        ("vllm-deepep-v2-direct", "per-rank", "prefill decode"),
        ("vllm-deepep-v2-hybrid", "per-rank", "prefill decode"),
    ],
)
def test_with_deepep_v2_placement_changes_what_decode_sends(name, one_node, phases):
    """V1's low-latency kernels send every pair; V2's send one copy per distinct rank."""
    engine = Engine.named(name)
    assert engine.phases == tuple(phases.split())
    sent = engine.dispatch.exchange.replace("per-node", "per-rank")
    assert sent == one_node, "inside one node a copy per node is one per rank"
    counts = engine.effect("fixed", has_replicas=False).changes_traffic
    assert counts == (one_node == "per-rank")


def test_an_unknown_engine_lists_those_that_are_known():
    with pytest.raises(UsageError, match="--engine nobody is not known") as error:
        Engine.named("nobody")
    names = error.value.hint.replace(",", " ").split()
    assert {"sglang-deepep-ll", "vllm", "sglang", "trtllm", "transformers"} <= set(names)
    for empty in ("", " "):
        with pytest.raises(UsageError, match="--engine is not the name of an engine"):
            engines_named(empty)


def test_a_family_is_all_its_engines_and_an_exact_name_is_one():
    assert [one.name for one in engines_named("sglang-deepep")] == ["sglang-deepep"]
    assert [one.name for one in engines_named("deepspeed")] == ["deepspeed"]
    for family in {one.family for one in ENGINES.values()}:
        found = engines_named(family)
        assert {one.family for one in found} == {family}
        # Whoever names a family is answered for prefill and for decode.
        assert {phase for one in found for phase in one.phases} == set(PHASES)


@pytest.mark.parametrize("family", ["sglang", "vllm", "trtllm", "transformers"])
def test_where_one_engine_is_needed_a_family_lists_its_names_by_phase(family):
    with pytest.raises(UsageError, match=f"--engine {family} names a family") as error:
        Engine.named(family)
    _, _, prefill = error.value.hint.partition("prefill:")
    prefill, _, decode = prefill.partition("decode:")
    for engine in engines_named(family):
        line = f"{engine.name} .*{re.escape(engine.selected_by)}"
        assert bool(re.search(line, prefill)) == ("prefill" in engine.phases)
        assert bool(re.search(line, decode)) == ("decode" in engine.phases)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("sglang-deeppe", "sglang-deepep"),
        ("vlm", "vllm"),
        ("TRTLLM", "trtllm"),
        ("megamoe", "sglang-megamoe"),
    ],
)
def test_an_unknown_engine_suggests_the_nearest(typed, meant):
    with pytest.raises(UsageError, match="is not known") as error:
        engines_named(typed)
    assert f"did you mean {meant}?" in error.value.hint


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"dispatch": {"exchange": "broadcast", "element": "bf16"}},
            "dispatch.exchange is",
        ),
        ({"combine": {"exchange": "per-rank", "element": "int3"}}, "combine.element is"),
        ({"phases": ["training"]}, r"phases\[0\] is .*allowed are prefill, decode"),
        ({"notes": "one"}, "notes is .*expected a list"),
        ({"ranks_of_node": "8"}, "ranks_of_node is .*expected a whole number"),
        ({"flag": "--x"}, "has the unknown field flag"),
    ],
)
def test_data_that_cannot_be_meant_is_refused(
    wrong: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the field: whoever adds an engine sees what is wrong with it."""
    good = ENGINES["sglang-deepep"].to_json() | {"topologies": []}
    value = {name: one for name, one in (good | wrong).items() if name != "name"}
    monkeypatch.setattr(documents, "parse_toml", lambda *_: {"mine": value})
    with pytest.raises(PlacerError, match=f"engines.toml: mine: .*{said}"):
        read_data("placer.target", "engines.toml", Engine)


def test_a_copy_counts_its_scales():
    """7168 elements: fp8 has 56 scales of 4 bytes; nvfp4 is 28 % of bf16."""
    sizes = {
        element: Transfer(exchange="per-rank", element=element).copy_bytes(7168)
        for element in ("bf16", "fp8", "nvfp4")
    }
    assert sizes == {"bf16": 14336, "fp8": 7392, "nvfp4": 3584 + 448}
    assert sizes["nvfp4"] / sizes["bf16"] == pytest.approx(0.28, abs=0.005)


def chosen(engine, wanted, *, has_replicas=True):
    named = None if engine is None else Engine.named(engine)
    return choose_replicas(named, wanted, has_replicas=has_replicas, command="placer x")


def test_the_users_replica_choice_wins_over_the_engines():
    assert chosen("vllm-deepep-ht", None) == "hash"
    assert chosen("vllm-deepep-ht", "cover") == "cover"
    with pytest.raises(UsageError, match="--replica-choice nearest is not known"):
        chosen(None, "nearest")


def test_no_engine_and_no_choice_will_do_without_redundant_experts_alone():
    assert chosen(None, None, has_replicas=False) is None
    assert chosen("deepspeed", None, has_replicas=False) is None
    with pytest.raises(UsageError, match="engines differ in the replica choice") as caught:
        chosen(None, None)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="deepspeed serves no redundant experts"):
        chosen("deepspeed", None)


def test_the_hint_names_each_choice_and_the_engines_that_have_it():
    with pytest.raises(UsageError) as caught:
        chosen(None, None)
    lines = caught.value.hint.splitlines()[1:]
    told = {}
    for line in lines:
        command, _, names = line.partition("  # ")
        option = command.removeprefix("  placer x --replica-choice ")
        told[option] = [
            one.name for name in names.split(", ") for one in engines_named(name)
        ]
    expected = {}
    for one in known_engines().values():
        if one.replica_choice is not None:
            expected.setdefault(one.replica_choice, []).append(one.name)
    assert {choice: sorted(names) for choice, names in told.items()} == {
        choice: sorted(names) for choice, names in expected.items()
    }


@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize("exchange", ["all-gather", "padded"])
def test_what_is_sent_to_all_does_not_depend_on_the_placement(policy, exchange):
    effect = placement_effect(policy, exchange, "local-first", has_replicas=True)
    assert not effect.changes_traffic
    assert "only the balance" in effect.reason


def expected_pairs(placement, tokens, choice):
    """Remote pairs per token, in the mean over all homes: every sequence at every home."""
    num_ranks = placement.num_ranks
    values = []
    for shift in range(num_ranks):
        # Sequences of one token, of which the first `shift` are fillers that are left out.
        ids = np.arange(tokens.num_tokens, dtype=np.int32)
        turned = Chunk(
            experts=tuple(np.roll(e, shift, axis=0) for e in tokens.experts),
            sequence_ids=ids,
            positions=np.zeros_like(ids),
        )
        metrics = simulate(placement, turned, replica_choice=choice)["fixed"]
        values.append(metrics.remote_pairs_per_token)
    return float(np.mean(values))


def one_token_sequences(num_tokens, num_experts, top_k, seed):
    rng = np.random.default_rng(seed)
    ids = np.arange(num_tokens, dtype=np.int32)
    weights = rng.dirichlet(np.full(num_experts, 0.5))
    rows = [rng.choice(num_experts, top_k, replace=False, p=weights) for _ in ids]
    return Chunk(
        experts=(np.asarray(rows, dtype=np.uint8),),
        sequence_ids=ids,
        positions=np.zeros_like(ids),
    )


def replicated(num_experts, num_ranks, seed):
    """Every rank holds its own experts and one more of another rank."""
    rng = np.random.default_rng(seed)
    own = rng.permutation(num_experts).reshape(num_ranks, -1)
    more = [[rng.choice(np.setdiff1d(range(num_experts), row))] for row in own]
    return Placement(
        physical_to_logical_map=(np.hstack([own, more]).ravel(),),
        num_experts=(num_experts,),
        num_ranks=num_ranks,
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_effect_under_fixed_and_per_expert_is_what_the_simulation_finds(seed):
    """Two placements of the same slots: same expected pairs where the effect says so.

    Tokens are as many as a multiple of the ranks, so all rotations give every token every
    home once.
    """
    tokens = one_token_sequences(64, 8, 2, seed)
    plain = [expected_pairs(random((8,), 4, seed=s), tokens, "local-first") for s in (1, 2)]
    effect = placement_effect("fixed", "per-expert", "local-first", has_replicas=False)
    assert not effect.changes_traffic
    assert plain == pytest.approx([2 * (1 - 1 / 4)] * 2)
    copies = [replicated(8, 4, s) for s in (1, 2)]
    near = [expected_pairs(placement, tokens, "local-first") for placement in copies]
    assert placement_effect(
        "fixed", "per-expert", "local-first", has_replicas=True
    ).changes_traffic
    load = np.bincount(tokens.experts[0].ravel(), minlength=8) / tokens.num_tokens
    for placement, found in zip(copies, near, strict=True):
        num_replicas = placement.holds(0).sum(axis=1)
        assert found == pytest.approx(float((load * (1 - num_replicas / 4)).sum()))


def test_a_choice_that_ignores_the_home_makes_replicas_useless_for_traffic():
    assert not placement_effect(
        "fixed", "per-expert", "hash", has_replicas=True
    ).changes_traffic
    assert placement_effect(
        "follow", "per-expert", "hash", has_replicas=True
    ).changes_traffic


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("choice", REPLICA_CHOICES)
def test_every_case_has_a_sentence(exchange, choice):
    for policy in ("fixed", "follow", "token", "request"):
        for has_replicas in (False, True):
            effect = placement_effect(policy, exchange, choice, has_replicas=has_replicas)
            assert len(effect.reason) > 20


def test_an_engine_whose_combine_still_depends_on_the_placement_says_so():
    one = Engine.named("sglang-deepep")
    assert one.effect("fixed", has_replicas=False).changes_traffic
    for name in ("vllm-agrs", "deepspeed", "transformers-a2a", "sglang-deepep-ll"):
        effect = Engine.named(name).effect("fixed", has_replicas=False)
        assert not effect.changes_traffic, name


def test_the_data_file_is_plain_toml():
    from importlib import resources

    text = (resources.files("placer.target") / "engines.toml").read_text(encoding="utf-8")
    assert set(tomllib.loads(text)) == set(ENGINES)
