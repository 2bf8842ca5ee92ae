#!/usr/bin/env python3
"""An independent referee: it scores a placement on a router trace.

It shares no code with placer and needs only NumPy and safetensors. It reads the files that
placer writes: a trace, a plan, a token-shuffle table. Tests compare placer's figures with
its own, and it is a command too::

    python tests/referee.py traces/gpt-oss-20b --plan plan.json --fold 1/2
    python tests/referee.py traces/gpt-oss-20b --baseline contiguous --ranks 8

A trace is a directory, or an ``.npz`` with ``experts`` [T, L, k] by descending router
weight, ``sequence_ids`` [T] and, for ``--table``, ``token_ids`` [T], -1 where unknown. It
prints one JSON object. The definitions are those of ``docs/concepts.md`` and
``docs/formats.md``.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

BATCH_SIZE = 4096


def referee_result(
    placement: Any, tokens: Any, batch_size: int, table: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Score a ``Placement`` of placer on one of its chunks, by home policy."""
    return score(
        np.stack(tokens.experts, axis=1).astype(np.int64),
        tokens.sequence_ids.astype(np.int64),
        list(placement.physical_to_logical_map),
        placement.num_ranks,
        placement.num_nodes,
        batch_size,
        table,
        None if tokens.token_ids is None else tokens.token_ids.astype(np.int64),
        list(placement.num_experts),
    )


def load_trace(path, fold=None, domains=None):
    """Return experts [T, L, k], sequence_ids [T], and token_ids [T] or None."""
    if Path(path).is_dir():
        experts, sequence_ids, token_ids = load_directory(Path(path))
        keep = np.ones(len(experts), bool)
    else:
        with np.load(path, allow_pickle=False) as data:
            experts = data["experts"].astype(np.int64)
            sequence_ids = data["sequence_ids"].astype(np.int64)
            has_ids = "token_ids" in data.files
            token_ids = data["token_ids"].astype(np.int64) if has_ids else None
            keep = np.ones(len(experts), bool)
            if domains:
                names = data["domain_names"][data["domain_of_sequence"][sequence_ids]]
                keep &= np.isin(names, domains)
    if fold:
        part, parts = (int(v) for v in fold.split("/"))
        keep &= sequence_ids % parts == part
    return experts[keep], sequence_ids[keep], None if token_ids is None else token_ids[keep]


def load_directory(path):
    """Read all chunks of a trace directory (``traces/README.md``)."""
    chunks = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    layers = sum(key.startswith("experts.") for key in chunks[0])
    experts = [np.stack([c[f"experts.{n}"] for n in range(layers)], 1) for c in chunks]
    sequence_ids = np.concatenate([c["sequence_ids"] for c in chunks]).astype(np.int64)
    token_ids = None
    if "token_ids" in chunks[0]:
        token_ids = np.concatenate([c["token_ids"] for c in chunks]).astype(np.int64)
    return np.concatenate(experts).astype(np.int64), sequence_ids, token_ids


def load_plan(path):
    """Return the maps by layer, the ranks, the nodes, and the experts of each layer."""
    plan = json.loads(Path(path).read_text(encoding="utf-8"))
    maps = [np.asarray(row, dtype=np.int64) for row in plan["physical_to_logical_map"]]
    sizes = (plan.get("model") or {}).get("num_experts")
    sizes = sizes or [int(row.max()) + 1 for row in maps]
    return maps, plan["num_ranks"], plan["num_nodes"], sizes


def check(experts, maps, sizes, num_ranks, num_nodes):
    """Refuse what no runtime could load."""
    if len(experts) == 0:
        sys.exit("referee: no token is left after --fold or --domain")
    if num_ranks % num_nodes:
        sys.exit(f"referee: {num_ranks} ranks do not divide over {num_nodes} nodes")
    if not len(maps) == len(sizes) == experts.shape[1]:
        sys.exit(f"referee: the plan has {len(maps)} layers, the trace {experts.shape[1]}")
    for layer, (row, size) in enumerate(zip(maps, sizes, strict=True)):
        name = f"referee: layer {layer}"
        if len(row) % num_ranks:
            sys.exit(f"{name}: {len(row)} slots do not divide over {num_ranks} ranks")
        if row.min() < 0 or row.max() >= size or experts[:, layer].max() >= size:
            sys.exit(f"{name}: an expert id is outside 0..{size - 1}")
        for rank, held in enumerate(row.reshape(num_ranks, -1)):
            if len(set(held.tolist())) < len(held):
                sys.exit(f"{name}: rank {rank} holds one expert twice")


def baseline(kind, experts, num_experts, num_ranks, seed=0):
    """Return the maps of a baseline.

    contiguous: expert e on rank e // (E / R). random: a random even one. balanced: the
    busiest experts first, each to the rank with the least load that has a free slot.
    """
    rng = np.random.default_rng(seed)
    maps = []
    per_rank = num_experts // num_ranks
    for layer in range(experts.shape[1]):
        if kind == "contiguous":
            row = np.arange(num_experts)
        elif kind == "random":
            row = rng.permutation(num_experts)
        else:
            load = np.bincount(experts[:, layer].ravel(), minlength=num_experts)
            ranks, total = [[] for _ in range(num_ranks)], np.zeros(num_ranks)
            for expert in np.argsort(-load, kind="stable"):
                free = [r for r in range(num_ranks) if len(ranks[r]) < per_rank]
                rank = min(free, key=total.__getitem__)
                ranks[rank].append(expert)
                total[rank] += load[expert]
            row = np.concatenate(ranks)
        maps.append(row)
    return maps


def holders(row, num_experts, num_ranks):
    """Return bool [E, R]: whether a rank has a replica of an expert in this layer."""
    rank = np.arange(len(row)) // (len(row) // num_ranks)
    holds = np.zeros((num_experts, num_ranks), bool)
    holds[row, rank] = True
    if not holds.any(1).all():
        sys.exit("referee: an expert has no slot")
    return holds


def choose_ranks(holds, experts, home, ranks_per_node, token):
    """Return the rank [T, k] that serves each (token, expert).

    The home if it holds a replica, else a replica on the home's node, else any. Several
    take turns by the index of the token.
    """
    num_ranks = holds.shape[1]
    if (holds.sum(1) == 1).all():
        return holds.argmax(1)[experts]
    available = holds[experts]  # [T, k, R]
    node = np.arange(num_ranks)[None] // ranks_per_node
    near = available & (node == (home[:, None] // ranks_per_node))[:, None, :]
    available = np.where(near.any(-1, keepdims=True), near, available)
    turn = token[:, None] % available.sum(-1)  # which of the replicas
    rank = (available.cumsum(-1) > turn[..., None]).argmax(-1)
    here = home[:, None, None].repeat(experts.shape[1], 1)
    at_home = np.take_along_axis(holds[experts], here, 2)[..., 0]
    return np.where(at_home, home[:, None], rank)


class Tally:
    """The traffic and load of one home policy, layer by layer."""

    def __init__(self):
        self.local = self.copies_expert = self.copies_rank = self.copies_node = 0
        self.crossing = self.combine_rank = self.count = 0
        self.imbalance, self.straggler = [], []
        self.home_imbalance, self.bottleneck = [], []

    def add(self, rank, home, num_ranks, ranks_per_node, batch, turn, combine_home=None):
        num_tokens, top_k = rank.shape
        token = np.arange(num_tokens)
        per_rank = np.zeros((num_tokens, num_ranks), np.int16)
        np.add.at(per_rank, (token[:, None], rank), 1)
        present = per_rank > 0
        at_home = per_rank[token, home]
        self.local += int(at_home.sum())
        self.copies_expert += int(top_k * num_tokens - at_home.sum())
        self.copies_rank += int(present.sum() - (at_home > 0).sum())
        back = home if combine_home is None else combine_home(per_rank)
        self.combine_rank += int(present.sum() - present[token, back].sum())
        away = (
            np.arange(num_ranks)[None] // ranks_per_node != home[:, None] // ranks_per_node
        )
        self.crossing += int((present & away).sum())
        node = present.reshape(num_tokens, -1, ranks_per_node).any(-1)
        self.copies_node += int(node.sum() - node[token, home // ranks_per_node].sum())
        self.count += num_tokens
        load = per_rank.sum(0)
        self.imbalance.append(load.max() / load.mean())
        homes = np.bincount(home, minlength=num_ranks)
        self.home_imbalance.append(homes.max() / (num_tokens / num_ranks))
        full = num_tokens // batch * batch
        if full:
            step = per_rank[turn[:full]].reshape(-1, batch, num_ranks).sum(1)
            self.straggler.append(float((step.max(1) / step.mean(1)).mean()))
            received = present.copy()
            received[token, home] = False
            received = received[turn[:full]].reshape(-1, batch, num_ranks).sum(1)
            self.bottleneck.append(float(received.max(1).mean() * num_ranks / batch))
        return per_rank

    def result(self, top_k):
        count = self.count
        straggler, bottleneck = self.straggler, self.bottleneck
        return {
            "local_activation_rate": round(self.local / (count * top_k), 5),
            "remote_pairs_per_token": round(self.copies_expert / count, 5),
            "remote_rank_copies_per_token": round(self.copies_rank / count, 5),
            "combine_rank_copies_per_token": round(self.combine_rank / count, 5),
            "crossing_rank_copies_per_token": round(self.crossing / count, 5),
            "remote_node_copies_per_token": round(self.copies_node / count, 5),
            "load_imbalance_mean": round(float(np.mean(self.imbalance)), 4),
            "load_imbalance_max": round(float(np.max(self.imbalance)), 4),
            "straggler_mean": round(float(np.mean(straggler)), 4) if straggler else None,
            "bottleneck_rank_copies_per_token": (
                round(float(np.mean(bottleneck)), 5) if bottleneck else None
            ),
            "home_imbalance_max": round(float(np.max(self.home_imbalance)), 4),
        }


def majority_rank(per_rank, first_rank):
    """Return the rank with most experts of a token; of equals, the first by weight."""
    best = per_rank.max(1, keepdims=True)
    tied = np.take_along_axis(per_rank, first_rank, 1) == best
    return np.take_along_axis(first_rank, tied.argmax(1)[:, None], 1)[:, 0]


def score(
    experts,
    sequence_ids,
    maps,
    num_ranks,
    num_nodes,
    batch=BATCH_SIZE,
    table=None,
    token_ids=None,
    sizes=None,
):
    """Return the figures of every home policy, rounded, and the size of the trace."""
    num_tokens, num_layers, top_k = experts.shape
    batch = min(batch, num_tokens)
    sizes = sizes or [int(row.max()) + 1 for row in maps]
    check(experts, maps, sizes, num_ranks, num_nodes)
    ranks_per_node = num_ranks // num_nodes
    if table is not None:
        vocabulary = table["token_rank"].shape[1]
        if token_ids is None:
            token_ids = np.full(num_tokens, -1)
        token_ids = np.where(token_ids < vocabulary, token_ids, -1)
    _, ordinal = np.unique(sequence_ids, return_inverse=True)
    fixed_home = ordinal % num_ranks
    token = np.arange(num_tokens)
    starts = np.r_[0, np.flatnonzero(np.diff(sequence_ids)) + 1]
    position = token - np.repeat(starts, np.diff(np.r_[starts, num_tokens]))
    turn = np.argsort(position, kind="stable")  # a batch: a token of each sequence in turn
    tallies = {"fixed": Tally(), "follow": Tally(), "oracle": Tally()}
    if table is not None:
        tallies["token"], tallies["token_equal"] = Tally(), Tally()
        history = np.zeros((num_tokens, 0), np.int64)
        if "request_score" in table:
            tallies["request"] = Tally()
            scores = table["request_score"].astype(np.float32)
            sequence_home = request_homes(scores, sequence_ids, token_ids, num_ranks)
    follow_home = fixed_home
    common = (num_ranks, ranks_per_node, batch, turn)
    for layer in range(num_layers):
        chosen = experts[:, layer]
        holds = holders(maps[layer], sizes[layer], num_ranks)
        rank = choose_ranks(holds, chosen, fixed_home, ranks_per_node, token)
        tallies["fixed"].add(rank, fixed_home, *common)
        rank = choose_ranks(holds, chosen, follow_home, ranks_per_node, token)
        per_rank = tallies["follow"].add(
            rank,
            follow_home,
            *common,
            combine_home=lambda held, rank=rank: majority_rank(held, rank),
        )
        follow_home = majority_rank(per_rank, rank)
        held = holds[chosen].sum(1)  # [T, R] pairs that each rank could serve
        is_best = held[token, follow_home] == held.max(1)
        best = np.where(is_best, follow_home, held.argmax(1))
        rank = choose_ranks(holds, chosen, best, ranks_per_node, token)
        tallies["oracle"].add(rank, best, *common)
        if "request" in tallies:
            rank = choose_ranks(holds, chosen, sequence_home, ranks_per_node, token)
            tallies["request"].add(rank, sequence_home, *common)
        if table is not None:
            home, sure = table_home(table, layer, token_ids, history, num_ranks, fixed_home)
            rank = choose_ranks(holds, chosen, home, ranks_per_node, token)
            per_rank = tallies["token"].add(rank, home, *common)
            even = np.empty_like(home)
            second = None
            if "token_score" in table:
                rows = table["token_score"][layer][np.maximum(token_ids, 0)]
                second = rows.astype(np.float32)[turn]
            even[turn] = equal_homes(home[turn], sure[turn], num_ranks, batch, second)
            even_rank = choose_ranks(holds, chosen, even, ranks_per_node, token)
            tallies["token_equal"].add(even_rank, even, *common)
            lookback = table_lookback(table)
            served = majority_rank(per_rank, rank)[:, None]
            history = np.concatenate([history, served], 1)[:, -lookback or None :]
    found = {name: tally.result(top_k) for name, tally in tallies.items()}
    return found | {"tokens": num_tokens, "layers": num_layers, "top_k": top_k}


def request_homes(request_score, sequence_ids, token_ids, num_ranks, prefix=64):
    """Return one home per sequence, in order of sequence id.

    It is the rank with the best score over the first ``prefix`` tokens, among the ranks not
    taken since the last full turn. So ranks stay within one sequence of each other.
    """
    home = np.zeros(len(sequence_ids), np.int64)
    free = np.ones(num_ranks, bool)
    for sequence in np.unique(sequence_ids):
        where = np.flatnonzero(sequence_ids == sequence)
        ids = token_ids[where[:prefix]]
        total = request_score[ids[(ids >= 0) & (ids < len(request_score))]].sum(0)
        rank = int(np.where(free, total, -np.inf).argmax())
        home[where] = rank
        free[rank] = False
        if not free.any():
            free[:] = True
    return home


def table_lookback(table):
    return int(table["lookback"]) if "lookback" in table else 0


def table_home(table, layer, token_ids, history, num_ranks, fixed_home):
    """Return home and confidence [T]: the surer of the two tables names the home."""
    known = token_ids >= 0
    ids = np.where(known, token_ids, 0)
    home = np.where(known, table["token_rank"][layer][ids], fixed_home).astype(np.int64)
    confidence = table["token_confidence"][layer][ids].astype(np.float32)
    confidence = np.where(known, confidence, -1)
    lookback = table_lookback(table)
    if lookback and history.shape[1] >= lookback:
        index = np.zeros(len(home), np.int64)
        for column in range(history.shape[1] - lookback, history.shape[1]):
            index = index * num_ranks + history[:, column]
        sure = table["history_confidence"][layer][index].astype(np.float32)
        home = np.where(sure > confidence, table["history_rank"][layer][index], home)
        confidence = np.maximum(sure, confidence)
    return home, confidence


def equal_homes(home, confidence, num_ranks, batch, token_score=None):
    """Return homes of equal number in every batch: the surest tokens get theirs first.

    The others take the free rank that their row of ``token_score`` prefers, where the table
    has one; else free places in the order of ranks.
    """
    result = np.empty_like(home)
    for start in range(0, len(home), batch):
        part, sure = home[start : start + batch], confidence[start : start + batch]
        free = np.bincount(np.arange(len(part)) % num_ranks, minlength=num_ranks)
        out = np.full(len(part), -1)
        for rank in range(num_ranks):
            mine = np.flatnonzero(part == rank)
            out[mine[np.argsort(-sure[mine], kind="stable")[: free[rank]]]] = rank
        free = free - np.bincount(out[out >= 0], minlength=num_ranks)
        rest = np.flatnonzero(out < 0)
        if token_score is None:
            out[rest] = np.repeat(np.arange(num_ranks), free)
        else:
            prefer = token_score[start : start + batch][rest]
            for row in np.argsort(-prefer.max(1), kind="stable"):
                rank = int(np.where(free > 0, prefer[row], -np.inf).argmax())
                out[rest[row]], free[rank] = rank, free[rank] - 1
        result[start : start + batch] = out
    return result


def load_table(path):
    """Return the tensors of a table file, with its ``lookback``."""
    table = load_file(path)
    if "lookback" not in table:
        with safe_open(path, "np") as file:
            header = json.loads((file.metadata() or {}).get("placer", "{}"))
        table["lookback"] = header.get("lookback", 0)
    return table


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace")
    parser.add_argument("--plan")
    parser.add_argument("--table")
    parser.add_argument("--baseline", choices=["contiguous", "random", "balanced"])
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--fold", help="K/N: only sequences whose id modulo N is K")
    parser.add_argument("--profile-fold", help="what the balanced baseline may see")
    parser.add_argument("--domain", action="append", help="of an .npz: only this domain")
    parser.add_argument("--batch", type=int, default=BATCH_SIZE)
    args = parser.parse_args()
    experts, sequence_ids, token_ids = load_trace(args.trace, args.fold, args.domain)
    if args.plan:
        maps, num_ranks, num_nodes, sizes = load_plan(args.plan)
    else:
        num_ranks, num_nodes = args.ranks, args.nodes
        num_experts = int(load_trace(args.trace)[0].max()) + 1
        profile, _, _ = load_trace(args.trace, args.profile_fold)
        if num_ranks is None or num_experts % num_ranks:
            parser.error(f"--ranks must divide the {num_experts} experts")
        sizes = [num_experts] * experts.shape[1]
        maps = baseline(args.baseline or "contiguous", profile, num_experts, num_ranks)
    table = load_table(args.table) if args.table else None
    found = score(
        *(experts, sequence_ids, maps, num_ranks, num_nodes, args.batch),
        *(table, token_ids, sizes),
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
