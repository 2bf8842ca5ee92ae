"""What a placement does to tokens, counted one token at a time."""

import numpy as np
import pytest

from placer.placement import Placement
from placer.report.token_counts import count_tokens
from placer.trace import Chunk

LAYERS, EXPERTS, RANKS, NODES = 3, 8, 4, 2


def tokens_of(num_sequences: int) -> Chunk:
    rng = np.random.default_rng(0)
    number = 60
    return Chunk(
        experts=tuple(
            np.stack([rng.permutation(EXPERTS)[:3] for _ in range(number)])
            for _ in range(LAYERS)
        ),
        sequence_ids=np.sort(np.arange(number) % num_sequences),
        positions=np.arange(number),
    )


@pytest.mark.parametrize(
    ("policy", "num_sequences"), [("fixed", 4), ("fixed", 2), ("follow", 4)]
)
def test_traffic_is_counted_per_token_of_the_home(policy: str, num_sequences: int) -> None:
    rng = np.random.default_rng(1)
    rows = tuple(rng.permutation(EXPERTS) for _ in range(LAYERS))
    placement = Placement(
        physical_to_logical_map=rows,
        num_experts=(EXPERTS,) * LAYERS,
        num_ranks=RANKS,
        num_nodes=NODES,
    )
    tokens = tokens_of(num_sequences)
    found = count_tokens(placement, tokens, policy, None, None)
    sent = np.zeros((RANKS, RANKS))
    at_home = np.zeros(RANKS)
    node_sent = np.zeros((NODES, NODES))
    for token, sequence in enumerate(tokens.sequence_ids):
        home = int(sequence) % RANKS
        for layer, row in enumerate(rows):
            ranks = [
                int(np.flatnonzero(row == expert)[0]) // 2
                for expert in tokens.experts[layer][token]
            ]
            at_home[home] += 1
            for rank in set(ranks) - {home}:
                sent[home, rank] += 1
            for node in {rank // 2 for rank in ranks} - {home // 2}:
                node_sent[home // 2, node] += 1
            if policy == "follow":
                home = max(ranks, key=ranks.count)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found.traffic, sent / at_home[:, None])
        node_tokens = at_home.reshape(NODES, 2).sum(axis=1)
        np.testing.assert_allclose(found.node_traffic, node_sent / node_tokens[:, None])
    assert np.isnan(found.traffic).any() == (policy == "fixed" and num_sequences == 2)
    assert found.sent["remote_rank_copies_per_token"].mean() == pytest.approx(
        sent.sum() / at_home.sum()
    )
