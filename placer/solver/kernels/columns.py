"""Columns: the sets of experts that one rank may hold, and partitions into them.

All arithmetic is of whole numbers, so what is bounded here is proved. Legend of the shapes:
E logical experts, C experts of a rank, K columns, N rows of experts, k experts per token,
R ranks, S cuts, W words of 64 cuts.
"""

import numpy as np

from placer.solver.kernels.compiled import compiled


@compiled
def fill_columns(rows, weight, load, least_load, most_load, most_cost, columns, cost):
    """Fill ``[K, C]`` and ``[K]`` with all sets of C experts between the limits.

    Their cost is the tokens that use any of them: ``rows`` ``[N, k]`` of ``weight`` ``[N]``
    tokens each. Returns how many there are; those beyond K are only counted.
    """
    num_rows, top_k = rows.shape
    num_experts, size = load.shape[0], columns.shape[1]
    uses = np.zeros((num_experts, num_rows), dtype=np.bool_)
    for row in range(num_rows):
        for i in range(top_k):
            uses[rows[row, i], row] = True
    # Depth d: the rows that none of the first d experts serves.
    left = np.empty((size, num_rows), dtype=np.int64)
    left[0] = np.arange(num_rows)
    num_left = np.zeros(size, dtype=np.int64)
    num_left[0] = num_rows
    served = np.zeros(size, dtype=np.int64)
    carried = np.zeros(size, dtype=np.int64)
    more = np.zeros(num_experts, dtype=np.int64)
    chosen = np.zeros(size, dtype=np.int64)
    chosen[0] = -1
    found, depth = 0, 0
    while depth >= 0:
        if depth == size - 1:
            more[:] = 0
            for place in range(num_left[depth]):
                row = left[depth, place]
                for i in range(top_k):
                    more[rows[row, i]] += weight[row]
            first = chosen[depth - 1] + 1 if depth else 0
            for expert in range(first, num_experts):
                total = carried[depth] + load[expert]
                price = served[depth] + more[expert]
                if total < least_load or total > most_load or price > most_cost:
                    continue
                if found < columns.shape[0]:
                    columns[found, :depth] = chosen[:depth]
                    columns[found, depth] = expert
                    cost[found] = price
                found += 1
            depth -= 1
            continue
        chosen[depth] += 1
        expert = chosen[depth]
        if expert > num_experts - size + depth:
            depth -= 1
            continue
        kept, price = 0, served[depth]
        for place in range(num_left[depth]):
            row = left[depth, place]
            if uses[expert, row]:
                price += weight[row]
            else:
                left[depth + 1, kept] = row
                kept += 1
        num_left[depth + 1] = kept
        served[depth + 1] = price
        carried[depth + 1] = carried[depth] + load[expert]
        depth += 1
        chosen[depth] = expert
    return found


@compiled
def fill_reduced_costs(columns, cost, scale, prices, members, cut_prices, reduced):
    """Fill ``[K]``: ``scale`` x cost, less the prices of the experts and cuts of a column.

    ``members`` ``[E, W]`` uint64 has a bit for each cut that an expert is part of; a column
    pays for the cuts of which it has two experts.
    """
    for column in range(columns.shape[0]):
        total = scale * cost[column]
        for i in range(columns.shape[1]):
            total -= prices[columns[column, i]]
        for word in range(members.shape[1]):
            once, twice = np.uint64(0), np.uint64(0)
            for i in range(columns.shape[1]):
                member = members[columns[column, i], word]
                twice |= once & member
                once |= member
            cut = 64 * word
            while twice:
                if twice & np.uint64(1):
                    total -= cut_prices[cut]
                twice >>= np.uint64(1)
                cut += 1
        reduced[column] = total


@compiled
def fill_triples(columns, value, held):
    """Fill ``[E, E, E]``, i < j < k: the value of the columns with two of the three."""
    num_experts, size = held.shape[0], columns.shape[1]
    inside = np.zeros(num_experts, dtype=np.bool_)
    held[:] = 0.0
    for column in range(columns.shape[0]):
        inside[:] = False
        for i in range(size):
            inside[columns[column, i]] = True
        for i in range(num_experts):
            for j in range(i + 1, num_experts):
                both = inside[i] + inside[j]
                if both == 0:
                    continue
                for k in range(j + 1, num_experts):
                    if both + inside[k] >= 2:
                        held[i, j, k] += value[column]


@compiled
def search_partitions(columns, cost, reduced, starts, scale, base, limit, most, chosen):
    """Look for a partition into columns that costs less than ``limit``.

    Parameters
    ----------
    columns, cost, reduced
        ``[K, C]`` experts, ``[K]`` costs and reduced costs, none negative; ordered by the
        first expert, then by reduced cost.
    starts
        ``[E + 1]``: where the columns of each first expert begin.
    scale, base
        ``scale`` x the cost of a partition is at least ``base`` and its reduced costs.
    limit, most
        Cost to stay below, and steps to stop after.
    chosen
        ``[R]``, filled with the columns of the best partition found.

    Returns
    -------
    tuple
        Steps done, the least cost found or ``limit``, and whether all were looked at.
    """
    num_ranks, size = chosen.shape[0], columns.shape[1]
    used = np.zeros(starts.shape[0] - 1, dtype=np.bool_)
    place = np.zeros(num_ranks, dtype=np.int64)
    first = np.zeros(num_ranks, dtype=np.int64)
    paid = np.zeros(num_ranks + 1, dtype=np.int64)
    spent = np.zeros(num_ranks + 1, dtype=np.int64)
    held = np.zeros(num_ranks, dtype=np.int64)
    slack = scale * (limit - 1) - base
    steps, depth = 0, 0
    place[0] = starts[0]
    while depth >= 0:
        column = place[depth]
        last = starts[first[depth] + 1]
        if column >= last or paid[depth] + reduced[column] > slack:
            depth -= 1
            if depth >= 0:
                for i in range(size):
                    used[columns[held[depth], i]] = False
            continue
        place[depth] += 1
        steps += 1
        if steps > most:
            return steps, limit, False
        fits = True
        for i in range(size):
            if used[columns[column, i]]:
                fits = False
                break
        if not fits:
            continue
        held[depth] = column
        if depth == num_ranks - 1:
            total = spent[depth] + cost[column]
            if total < limit:
                limit = total
                slack = scale * (limit - 1) - base
                chosen[:] = held
            continue
        for i in range(size):
            used[columns[column, i]] = True
        paid[depth + 1] = paid[depth] + reduced[column]
        spent[depth + 1] = spent[depth] + cost[column]
        depth += 1
        expert = first[depth - 1] + 1
        while used[expert]:
            expert += 1
        first[depth] = expert
        place[depth] = starts[expert]
    return steps, limit, True
