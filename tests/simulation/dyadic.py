"""Tables with values of which float32 holds every sum, whatever its order."""

import dataclasses

import numpy as np

from placer.shuffle import CombinedRule


def dyadic(table):
    """The table, its scores and its combined rule in sixty-fourths."""

    def rounded(values):
        return (values.astype(np.float32) * 64).round().astype(np.float32) / 64

    rule = {
        one.name: rounded(getattr(table.combined, one.name))
        for one in dataclasses.fields(CombinedRule)
    }
    return dataclasses.replace(
        table,
        token_score=rounded(table.token_score).astype(np.float16),
        combined=CombinedRule(**rule),
    )
