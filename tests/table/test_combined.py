"""The combined rule: fitted as by least squares, looked up as by hand, in every reader."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from placer.errors import PlacerError
from placer.placement.reference import contiguous
from placer.serving.homes import Batches
from placer.shuffle import ShuffleTable
from placer.simulation import simulate
from placer.table import Table, build_table
from placer.table.calibration import Calibration, calibrated, fit_calibration
from placer.table.combined import past_layers
from placer.table.homes import TableHomes
from placer.trace import Chunk
from tests.simulation.dyadic import dyadic
from tests.simulation.test_referee import read_slice

PLACEMENT = contiguous((8,) * 3, 4)
RULE = ("combined_bias", "expert_score", "home_price", "token_weight", "unknown_score")


def build(tokens, **options):
    shape = {"vocab_size": 55, "lookback": 1, "with_combined": True}
    return build_table(PLACEMENT, tokens, **shape | options)


def scores_by_hand(table, layer, token_id, past):
    """One token: the formula of docs/formats.md in plain numbers."""
    rule = table.combined
    row = rule.unknown_score[layer]
    if 0 <= token_id < table.vocab_size:
        row = table.token_score[layer, token_id]
    scores = []
    for rank in range(table.num_ranks):
        score = float(rule.combined_bias[layer, rank])
        score += float(row[rank]) * float(rule.token_weight[layer])
        for back, experts in enumerate(reversed(past)):
            if back < rule.expert_score.shape[1]:
                score += sum(
                    float(rule.expert_score[layer, back, e, rank]) for e in experts
                )
        scores.append(score)
    return scores


def rates_without(tokens, layer, token, shrinkage):
    """Rates of a token's id, counted on all other tokens that have it."""
    ranks = tokens.experts[layer].astype(int) // 2
    prior = [(ranks == rank).mean() for rank in range(4)]
    if tokens.token_ids[token] < 0:
        return prior
    same = [
        n
        for n, token_id in enumerate(tokens.token_ids)
        if token_id == tokens.token_ids[token] and n != token
    ]
    weight = 2 * shrinkage
    return [
        (sum((ranks[n] == rank).sum() for n in same) + weight * prior[rank])
        / (2 * len(same) + weight)
        for rank in range(4)
    ]


@pytest.mark.parametrize("layer", [1, 2])
def test_the_fit_is_the_least_squares_one_with_a_penalty(make_chunk, layer):
    """A penalty of 40 is a row of sqrt(40) per coefficient, as lstsq solves it."""
    tokens = make_chunk(num_tokens=150, vocab_size=40)
    tokens.token_ids[7:12] = -1
    rule = build(tokens, shrinkage=1.5).combined
    experts, rows = [], []
    for token in range(150):
        chosen = [0.0] * 8 * layer
        for back in range(layer):
            for expert in tokens.experts[layer - 1 - back][token]:
                chosen[back * 8 + expert] = 1.0
        experts.append(chosen)
        rows.append(rates_without(tokens, layer, token, 1.5))
    experts, rows = np.array(experts), np.array(rows)
    ranks = tokens.experts[layer].astype(int) // 2
    served = np.stack([(ranks == rank).mean(axis=1) for rank in range(4)], axis=1)
    # Unknowns: what each expert adds to each home, home by home, and last the weight.
    centred = experts - experts.mean(axis=0)
    by_home = np.kron(np.eye(4), centred)
    row = (rows - rows.mean(axis=0)).T.reshape(-1, 1)
    equations = np.hstack([by_home, row])
    width = equations.shape[1]
    solved, *_ = np.linalg.lstsq(
        np.vstack([equations, np.sqrt(40) * np.eye(width)]),
        np.concatenate([(served - served.mean(axis=0)).T.ravel(), np.zeros(width)]),
    )
    added = solved[:-1].reshape(4, -1).T
    found = rule.expert_score[layer, :layer].reshape(-1, 4)
    assert found == pytest.approx(added, abs=2e-4)
    assert rule.token_weight[layer] == pytest.approx(solved[-1], abs=1e-5)
    bias = served.mean(axis=0) - experts.mean(axis=0) @ added
    bias -= solved[-1] * rows.mean(axis=0)
    assert rule.combined_bias[layer] == pytest.approx(bias, abs=1e-5)
    assert rule.unknown_score[layer] == pytest.approx(served.mean(axis=0), abs=1e-3)
    assert not rule.expert_score[layer, layer:].any()
    assert not rule.home_price.any()


def test_homes_are_those_of_the_sums_by_hand(make_chunk):
    table = dyadic(build(make_chunk(), max_home_imbalance=1.3))
    fresh = make_chunk(seed=5, vocab_size=58)
    fresh.token_ids[:9] = -1
    homes = TableHomes(table, fresh.token_ids, np.zeros(400, dtype=np.uint8))
    plain = TableHomes(table, fresh.token_ids, np.zeros(400, dtype=np.uint8))
    for layer, chosen in enumerate(fresh.experts):
        choice = homes.best(layer)
        if layer == 0:
            assert choice.home.tolist() == plain.plain(0).home.tolist()
        else:
            for token, token_id in enumerate(fresh.token_ids):
                past = [one[token] for one in fresh.experts[:layer]]
                scores = scores_by_hand(table, layer, token_id, past)
                price = table.combined.home_price[layer].tolist()
                best = [a - b for a, b in zip(scores, price, strict=True)]
                assert choice.scores[token].tolist() == scores
                assert choice.home[token] == best.index(max(best))
                assert choice.confidence[token] == scores[choice.home[token]]
        homes.served(chosen.T // 2, chosen.T)


def test_the_reader_to_take_along_says_the_same(make_chunk, tmp_path):
    table = build(make_chunk(), max_home_imbalance=1.3)
    table.write(tmp_path / "table")
    theirs = ShuffleTable.read(tmp_path / "table")
    fresh = make_chunk(seed=5, vocab_size=58)
    fallback = np.arange(400) % 4
    homes = TableHomes(table, fresh.token_ids, fallback)
    for layer, chosen in enumerate(fresh.experts):
        home, sure = theirs.combined_homes(
            layer, fresh.token_ids, fresh.experts[:layer], fallback
        )
        choice = homes.best(layer)
        assert home.tolist() == choice.home.tolist()
        assert sure.tolist() == choice.confidence.tolist()
        homes.served(chosen.T // 2, chosen.T)


def test_a_tokens_scores_do_not_depend_on_its_batch(make_chunk):
    table, fresh = build(make_chunk()), make_chunk(seed=5)

    def scores(part):
        past = [np.ascontiguousarray(one[part].T) for one in fresh.experts[:2]]
        return table.combined.scores(2, table.token_score[2], fresh.token_ids[part], past)

    whole = scores(slice(None))
    for part in (slice(0, 1), slice(3, 10), slice(100, 391)):
        assert np.array_equal(scores(part), whole[part])


def test_the_plain_rule_is_left_alone(make_chunk):
    tokens = make_chunk()
    plain = build(tokens, with_combined=False, with_token_score=True).tensors()
    found = build(tokens).tensors()
    assert set(found) - set(plain) == set(RULE)
    for name, values in plain.items():
        assert np.array_equal(values, found[name])


def test_it_beats_the_plain_rule_on_tokens_of_gpt_oss_not_seen(archive):
    """And a cap evens its homes; figures of both policies beside chance, 0.125."""
    tokens = read_slice(archive("gpt-oss-20b", with_token_ids=True), 12_000, 6)
    even = tokens.sequence_ids % 2 == 0
    placement = contiguous((32,) * 6, 8)
    rates = {}
    for cap in (None, 1.3):
        table = build_table(
            placement,
            tokens.select(even),
            vocab_size=201_088,
            with_combined=True,
            max_home_imbalance=cap,
        )
        rates[cap] = simulate(placement, tokens.select(~even), table=table)
    for found in rates.values():
        for name in ("token", "token_equal"):
            combined = found[f"{name}_combined"].local_activation_rate
            assert combined > found[name].local_activation_rate + 0.01
        best = found["oracle"].local_activation_rate
        assert found["token_combined"].local_activation_rate < best
        equal = found["token_equal_combined"]
        assert equal.home_imbalance_max == pytest.approx(1, abs=0.01)
    free, capped = (one["token_combined"].home_imbalance_max for one in rates.values())
    assert capped < 2 < free


def test_the_cap_holds_on_the_profile(make_chunk):
    tokens = make_chunk(num_tokens=3_000)
    table = build(tokens, max_home_imbalance=1.1)
    homes = TableHomes(table, tokens.token_ids, np.zeros(3_000, dtype=np.uint8))
    plain = build(tokens)
    for layer, chosen in enumerate(tokens.experts):
        choice = homes.best(layer)
        if layer:
            assert np.bincount(choice.home, minlength=4).max() < 1.2 * 750
            assert table.combined.home_price[layer].any()
        homes.served(chosen.T // 2, chosen.T)
    for name in set(RULE) - {"home_price"}:
        same = getattr(table.combined, name), getattr(plain.combined, name)
        assert np.array_equal(*same)


def test_equal_slices_use_the_combined_scores(make_chunk):
    """Every token that has to leave its home takes the free rank with the best sum."""
    tokens = make_chunk(num_tokens=40)
    homes = TableHomes(build(tokens), tokens.token_ids, np.zeros(40, dtype=np.uint8))
    for chosen in tokens.experts[:2]:
        homes.served(chosen.T // 2, chosen.T)
    choice = homes.best(2)
    batches = Batches.of(np.arange(40), 40)
    found = choice.equal(batches)
    free, expected = [10] * 4, [None] * 40
    for token in sorted(range(40), key=lambda t: -choice.confidence[t]):
        if free[choice.home[token]]:
            expected[token] = int(choice.home[token])
            free[choice.home[token]] -= 1
    left = [token for token in range(40) if expected[token] is None]
    for token in sorted(left, key=lambda t: -choice.scores[t].max()):
        open_ranks = [rank for rank in range(4) if free[rank]]
        expected[token] = max(open_ranks, key=lambda r: choice.scores[token, r])
        free[expected[token]] -= 1
    assert left
    assert found.tolist() == expected


def test_calibration_is_a_line_over_what_the_rule_promises(make_chunk):
    """Fitted here by polyfit on both halves; it moves every score along the line."""
    tokens = make_chunk(num_tokens=800, num_sequences=40)
    rank = np.unique(tokens.sequence_ids, return_inverse=True)[1]
    halves = tokens.select(rank % 2 == 0), tokens.select(rank % 2 == 1)
    pairs = []
    for own, other in (halves, halves[::-1]):
        table = build(own)
        for layer in (1, 2):
            for token, token_id in enumerate(other.token_ids):
                past = [one[token] for one in other.experts[:layer]]
                scores = scores_by_hand(table, layer, token_id, past)
                best = max(scores)
                ranks = (other.experts[layer][token] // 2).tolist()
                pairs.append((best, ranks.count(scores.index(best)) / 2))
    slope, offset = np.polyfit(*np.array(pairs).T, 1)
    found = fit_calibration(PLACEMENT, tokens, build)
    assert found.combined.slope == pytest.approx(slope, abs=1e-3)
    assert found.combined.offset == pytest.approx(offset, abs=1e-3)
    table = build(tokens, max_home_imbalance=1.3)
    better = calibrated(table, found, (2,))
    past = [np.ascontiguousarray(one.T) for one in tokens.experts]
    for layer, line in ((1, found.combined), (2, Calibration(slope=1.0, offset=0.0))):
        before, after = (
            one.combined.scores(
                layer, one.token_score[layer], tokens.token_ids, past[:layer]
            )
            for one in (table, better)
        )
        assert after == pytest.approx(line.offset + line.slope * before, abs=2e-3)
        homes = [
            one.combined.homes(layer, scores)[0]
            for one, scores in ((table, before), (better, after))
        ]
        assert (homes[0] != homes[1]).mean() < 0.01


def test_few_experts_look_further_back_than_many():
    assert past_layers((8, 32)) == 8
    assert past_layers((160,)) == 6
    assert past_layers((256,)) == 4
    assert past_layers((4096,)) == 1


def test_layers_of_different_sizes(make_chunk):
    """Experts past those of a smaller layer add nothing."""
    tokens = make_chunk(num_experts=(4, 8, 8))
    placement = contiguous((4, 8, 8), 4)
    table = build_table(placement, tokens, vocab_size=50, with_combined=True)
    assert table.combined.expert_score.shape == (3, 8, 8, 4)
    assert not table.combined.expert_score[1, 0, 4:].any()
    assert table.combined.expert_score[1, 0, :4].all()
    found = simulate(placement, tokens, table=table)
    chance = found["fixed"].local_activation_rate
    assert found["token_combined"].local_activation_rate > chance + 0.1


def test_exact_rows_need_no_other_token(make_chunk):
    """Where the id decides the experts, the rule finds them on tokens seen and not seen."""
    tokens = make_chunk()
    experts = np.array([[v % 8, (v + 1) % 8] for v in range(55)])
    rows = tuple(
        experts[tokens.token_ids].astype(np.uint8) if n == 1 else one
        for n, one in enumerate(tokens.experts)
    )
    tokens = dataclasses.replace(tokens, experts=rows)
    table = build(tokens, token_experts={1: experts})
    homes = TableHomes(table, np.arange(55), np.zeros(55, dtype=np.uint8))
    homes.served(np.zeros((2, 55), dtype=np.uint8), np.zeros((2, 55), dtype=np.uint8))
    home = homes.best(1).home
    served = [(experts[v] // 2 == home[v]).mean() for v in range(55)]
    best = [max(np.bincount(experts[v] // 2)) / 2 for v in range(55)]
    assert served == best


def test_round_trip_and_the_same_tokens_give_the_same_bytes(make_chunk, tmp_path):
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    build(make_chunk()).write(one)
    build(make_chunk()).write(two)
    Table.read(one).write(three)
    assert one.read_bytes() == two.read_bytes() == three.read_bytes()


def test_a_file_without_the_rule_is_read_as_ever(make_chunk, tmp_path):
    tokens = make_chunk()
    build(tokens, with_combined=False, with_token_score=True).write(tmp_path / "plain")
    table = Table.read(tmp_path / "plain")
    assert table.combined is None
    assert "token_combined" not in simulate(PLACEMENT, tokens, table=table)
    homes = TableHomes(table, tokens.token_ids, np.zeros(400, dtype=np.uint8))
    assert homes.best(1).home.tolist() == homes.plain(1).home.tolist()
    with pytest.raises(ValueError, match="--combined"):
        ShuffleTable.read(tmp_path / "plain").combined_homes(
            1, tokens.token_ids, tokens.experts[:1], np.zeros(400)
        )


def rewrite(path, changed, drop=()):
    """Write a table file again with other tensors, its header as it was."""
    from safetensors import safe_open

    with safe_open(path, "np") as opened:
        header = opened.metadata()
    named = load_file(path) | changed
    save_file({n: v for n, v in named.items() if n not in drop}, path, metadata=header)


@pytest.mark.parametrize("name", [*RULE, "token_score"])
def test_a_rule_of_which_a_tensor_is_missing_is_refused(make_chunk, tmp_path, name):
    build(make_chunk()).write(tmp_path / "table")
    rewrite(tmp_path / "table", {}, drop=(name,))
    with pytest.raises(PlacerError, match=name) as error:
        Table.read(tmp_path / "table")
    assert "placer tables" in error.value.hint


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("name", RULE)
def test_what_is_no_number_is_refused(make_chunk, tmp_path, name, wrong):
    table = build(make_chunk())
    table.write(tmp_path / "table")
    rewrite(tmp_path / "table", {name: np.full_like(getattr(table.combined, name), wrong)})
    with pytest.raises(PlacerError, match=f"{name} holds a value that is not a number"):
        Table.read(tmp_path / "table")


@pytest.mark.parametrize("name", RULE)
def test_other_shapes_are_refused(make_chunk, tmp_path, name):
    table = build(make_chunk())
    table.write(tmp_path / "table")
    short = np.ascontiguousarray(getattr(table.combined, name)[..., :2])
    rewrite(tmp_path / "table", {name: short})
    with pytest.raises(PlacerError, match=f"{name} has shape"):
        Table.read(tmp_path / "table")


def test_a_rule_that_looks_at_no_layer_is_refused(make_chunk, tmp_path):
    table = build(make_chunk())
    table.write(tmp_path / "table")
    rewrite(tmp_path / "table", {"expert_score": table.combined.expert_score[:, :0]})
    with pytest.raises(PlacerError, match="has 0 past layers"):
        Table.read(tmp_path / "table")


def test_a_trace_without_ids_has_the_experts_still(make_chunk):
    """All tokens unknown: what is left of the rule beats chance, 0.25."""
    tokens = make_chunk(num_tokens=2_000)
    table = build(tokens)
    bare = Chunk(
        experts=tokens.experts,
        sequence_ids=tokens.sequence_ids,
        positions=tokens.positions,
    )
    found = simulate(PLACEMENT, bare, table=table)["token_combined"]
    assert found.local_activation_rate > 0.27
