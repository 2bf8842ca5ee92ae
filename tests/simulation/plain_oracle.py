"""The definitions in plain loops, one token at a time: the oracle of these tests."""

from collections import Counter


class PlainLayer:
    """One layer of a placement: which ranks hold which expert."""

    def __init__(self, slots, num_ranks, num_nodes):
        per_rank = len(slots) // num_ranks
        self.holders = {}
        for slot, expert in enumerate(slots):
            self.holders.setdefault(expert, []).append(slot // per_rank)
        self.per_node = num_ranks // num_nodes

    def serve(self, token, expert, home):
        """local-first: at home, else on the home's node, else any; equals take turns."""
        ranks = sorted(self.holders[expert])
        if home in ranks:
            return home
        near = [r for r in ranks if r // self.per_node == home // self.per_node]
        ranks = near or ranks
        return ranks[token % len(ranks)]

    def serve_by_hash(self, expert, row):
        """hash: Knuth's hash of the row among the tokens of one batch and home."""
        ranks = sorted(self.holders[expert])
        return ranks[(row * 2654435769 % 2**32) % len(ranks)]

    def serve_by_cover(self, token, experts, home):
        """cover: ranks visited anyway, then whichever rank holds most of what is left."""

        def node(rank):
            return rank // self.per_node

        def one_of(ranks):
            near = [r for r in ranks if r == home] or [
                r for r in ranks if node(r) == node(home)
            ]
            ranks = sorted(near or ranks)
            return ranks[token % len(ranks)]

        visited, served = {home}, {}
        for expert in experts:
            if len(self.holders[expert]) == 1:
                served[expert] = self.holders[expert][0]
                visited.add(served[expert])
        while True:
            for expert in experts:
                able = visited & set(self.holders[expert])
                if expert not in served and able:
                    served[expert] = one_of(able)
            waiting = [e for e in experts if e not in served]
            if not waiting:
                return [served[expert] for expert in experts]
            useful = {r for e in waiting for r in self.holders[e]}
            close = {r for r in useful if node(r) in {node(v) for v in visited}}
            held = {r: self.held(waiting, r) for r in close or useful}
            visited.add(one_of({r for r, n in held.items() if n == max(held.values())}))

    def held(self, experts, rank):
        return sum(rank in self.holders[expert] for expert in experts)


def majority(ranks):
    most = max(Counter(ranks).values())
    return next(rank for rank in ranks if ranks.count(rank) == most)


def batches_of(sequence_ids, batch_size):
    """One token of each sequence in turn, cut into batches; the last may be short."""
    batch_size = min(batch_size, len(sequence_ids))
    positions = [sequence_ids[:t].count(s) for t, s in enumerate(sequence_ids)]
    order = sorted(range(len(sequence_ids)), key=lambda t: (positions[t], t))
    return [order[n : n + batch_size] for n in range(0, len(order), batch_size)]


def rows_at_home(homes, batches):
    """Each token's row among the tokens of its batch and home, in batch order."""
    rows = {}
    for batch in batches:
        seen = Counter()
        for token in batch:
            rows[token] = seen[homes[token]]
            seen[homes[token]] += 1
    return rows


def fixed_homes(sequence_ids, num_ranks):
    ordinals = sorted(set(sequence_ids))
    return [ordinals.index(s) % num_ranks for s in sequence_ids]


def table_homes(table, layer, token_ids, history, fixed, num_ranks):
    """T or A, whichever is the more confident; a tie goes to T."""
    homes, sure = [], []
    for token, token_id in enumerate(token_ids):
        home, confidence = fixed[token], -1.0
        if 0 <= token_id < table.token_rank.shape[1]:
            home = int(table.token_rank[layer, token_id])
            confidence = float(table.token_confidence[layer, token_id])
        if table.lookback and len(history) >= table.lookback:
            index = 0
            for past in history[-table.lookback :]:
                index = index * num_ranks + past[token]
            if float(table.history_confidence[layer, index]) > confidence:
                home = int(table.history_rank[layer, index])
                confidence = float(table.history_confidence[layer, index])
        homes.append(home)
        sure.append(confidence)
    return homes, sure


def combined_homes(table, layer, token_ids, past, num_ranks):
    """Sums over the token's row and all experts of the past layers, number by number."""
    homes, sure, every = [], [], []
    rule = table.combined
    for token, token_id in enumerate(token_ids):
        row = rule.unknown_score[layer].tolist()
        if 0 <= token_id < table.token_rank.shape[1]:
            row = table.token_score[layer, token_id].tolist()
        scores = []
        for rank in range(num_ranks):
            score = float(rule.combined_bias[layer, rank])
            score += row[rank] * float(rule.token_weight[layer])
            for added, chosen in zip(rule.expert_score[layer], past[::-1], strict=False):
                score += sum(float(added[expert, rank]) for expert in chosen[token])
            scores.append(score)
        price = rule.home_price[layer].tolist()
        homes.append(max(range(num_ranks), key=lambda r: (scores[r] - price[r], -r)))
        sure.append(scores[homes[-1]])
        every.append(scores)
    return homes, sure, every


def equal_homes(homes, sure, num_ranks, batches, scores=None):
    result = [None] * len(homes)
    for batch in batches:
        free = [
            len([n for n in range(len(batch)) if n % num_ranks == r])
            for r in range(num_ranks)
        ]
        for rank in range(num_ranks):
            wanting = sorted((t for t in batch if homes[t] == rank), key=lambda t: -sure[t])
            for token in wanting[: free[rank]]:
                result[token] = rank
        for rank in range(num_ranks):
            free[rank] -= sum(result[t] == rank for t in batch)
        rest = [t for t in batch if result[t] is None]
        if scores is None:
            slots = [rank for rank in range(num_ranks) for _ in range(free[rank])]
            for token, rank in zip(rest, slots, strict=True):
                result[token] = rank
        else:
            for token in sorted(rest, key=lambda t: -max(scores[t])):
                open_ranks = [r for r in range(num_ranks) if free[r]]
                result[token] = max(open_ranks, key=lambda r: (scores[token][r], -r))
                free[result[token]] -= 1
    return result


def request_homes(request_score, sequence_ids, token_ids, num_ranks):
    chosen, free = {}, set(range(num_ranks))
    for sequence in sorted(set(sequence_ids)):
        prompt = [t for s, t in zip(sequence_ids, token_ids, strict=True) if s == sequence]
        known = [t for t in prompt[:64] if 0 <= t < len(request_score)]
        total = [sum(float(request_score[t, r]) for t in known) for r in range(num_ranks)]
        chosen[sequence] = max(free, key=lambda r: (total[r], -r))
        free.discard(chosen[sequence])
        free = free or set(range(num_ranks))
    return [chosen[s] for s in sequence_ids]


class PlainTally:
    def __init__(self, num_ranks, num_nodes, batches):
        self.num_ranks, self.per_node = num_ranks, num_ranks // num_nodes
        self.batches = batches
        self.sums = Counter()
        self.per_layer = {n: [] for n in ("load", "home", "straggler", "bottleneck")}

    def node(self, rank):
        return rank // self.per_node

    def add(self, served, homes, back):
        for ranks, home, target in zip(served, homes, back, strict=True):
            self.sums["tokens"] += 1
            self.sums["pairs"] += len(ranks)
            self.sums["local"] += ranks.count(home)
            self.sums["rank"] += len(set(ranks) - {home})
            self.sums["combine"] += len(set(ranks) - {target})
            self.sums["crossing"] += sum(
                self.node(r) != self.node(home) for r in set(ranks)
            )
            self.sums["node"] += len({self.node(r) for r in ranks} - {self.node(home)})
        load = [sum(ranks.count(r) for ranks in served) for r in range(self.num_ranks)]
        self.per_layer["load"].append(max(load) / (sum(load) / self.num_ranks))
        busiest_home = max(Counter(homes).values())
        self.per_layer["home"].append(busiest_home / (len(homes) / self.num_ranks))
        stragglers, bottlenecks = [], []
        for batch in self.batches:
            if len(batch) < len(self.batches[0]):
                continue
            load = [sum(served[t].count(r) for t in batch) for r in range(self.num_ranks)]
            stragglers.append(max(load) / (sum(load) / self.num_ranks))
            copies = [
                sum(r in served[t] and r != homes[t] for t in batch)
                for r in range(self.num_ranks)
            ]
            bottlenecks.append(max(copies) * self.num_ranks / len(batch))
        self.per_layer["straggler"].append(mean(stragglers))
        self.per_layer["bottleneck"].append(mean(bottlenecks))

    def metrics(self):
        tokens, pairs, local = (self.sums[n] for n in ("tokens", "pairs", "local"))
        return {
            "local_activation_rate": local / pairs,
            "remote_pairs_per_token": (pairs - local) / tokens,
            "remote_rank_copies_per_token": self.sums["rank"] / tokens,
            "combine_rank_copies_per_token": self.sums["combine"] / tokens,
            "crossing_rank_copies_per_token": self.sums["crossing"] / tokens,
            "remote_node_copies_per_token": self.sums["node"] / tokens,
            "load_imbalance_mean": mean(self.per_layer["load"]),
            "load_imbalance_max": max(self.per_layer["load"]),
            "straggler_mean": mean(self.per_layer["straggler"]),
            "bottleneck_rank_copies_per_token": mean(self.per_layer["bottleneck"]),
            "home_imbalance_max": max(self.per_layer["home"]),
        }


def mean(values):
    return sum(values) / len(values)


def plain_simulate(placement, tokens, batch_size, table=None, choice="local-first"):
    """Metrics by policy, from the definitions, for a Placement and a Chunk."""
    num_ranks, num_nodes = placement.num_ranks, placement.num_nodes
    sequence_ids = tokens.sequence_ids.tolist()
    batches = batches_of(sequence_ids, batch_size)
    fixed = fixed_homes(sequence_ids, num_ranks)
    names = ["fixed", "follow", "oracle"]
    if table is not None:
        names += ["token", "token_equal", "request"]
        if table.combined is not None:
            names += ["token_combined", "token_equal_combined"]
        unknown = [-1] * len(sequence_ids)
        ids = unknown if tokens.token_ids is None else tokens.token_ids.tolist()
        request = request_homes(table.request_score, sequence_ids, ids, num_ranks)
    tallies = {name: PlainTally(num_ranks, num_nodes, batches) for name in names}
    follow, history = fixed, []
    for number, slots in enumerate(placement.physical_to_logical_map):
        layer = PlainLayer(slots.tolist(), num_ranks, num_nodes)
        chosen = tokens.experts[number].tolist()

        def serve(homes, layer=layer, chosen=chosen):
            if choice == "cover":
                return [
                    layer.serve_by_cover(token, experts, home)
                    for token, (experts, home) in enumerate(zip(chosen, homes, strict=True))
                ]
            if choice == "hash":
                rows = rows_at_home(homes, batches)
                return [
                    [layer.serve_by_hash(expert, rows[token]) for expert in experts]
                    for token, experts in enumerate(chosen)
                ]
            return [
                [layer.serve(token, expert, home) for expert in experts]
                for token, (experts, home) in enumerate(zip(chosen, homes, strict=True))
            ]

        tallies["fixed"].add(serve(fixed), fixed, fixed)
        served = serve(follow)
        following = [majority(ranks) for ranks in served]
        tallies["follow"].add(served, follow, following)
        best = []
        for experts, preferred in zip(chosen, following, strict=True):
            held = [layer.held(experts, rank) for rank in range(num_ranks)]
            top = max(held)
            best.append(preferred if held[preferred] == top else held.index(top))
        tallies["oracle"].add(serve(best), best, best)
        follow = following
        if table is None:
            continue
        homes, sure = table_homes(table, number, ids, history, fixed, num_ranks)
        served = serve(homes)
        tallies["token"].add(served, homes, homes)
        history.append([majority(ranks) for ranks in served])
        scores = None
        if table.token_score is not None:
            known = [t if 0 <= t < table.vocab_size else 0 for t in ids]
            scores = [table.token_score[number, t].tolist() for t in known]
        even = equal_homes(homes, sure, num_ranks, batches, scores)
        tallies["token_equal"].add(serve(even), even, even)
        tallies["request"].add(serve(request), request, request)
        if table.combined is None:
            continue
        if number:
            past = [one.tolist() for one in tokens.experts[:number]]
            homes, sure, scores = combined_homes(table, number, ids, past, num_ranks)
        even = equal_homes(homes, sure, num_ranks, batches, scores)
        tallies["token_combined"].add(serve(homes), homes, homes)
        tallies["token_equal_combined"].add(serve(even), even, even)
    return {name: tally.metrics() for name, tally in tallies.items()}
