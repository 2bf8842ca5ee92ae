"""The exchanges of a replay, in the words of the simulation."""

from dataclasses import dataclass

from placer.target.engine import Exchange

#: transformers' own exchange: a hidden state per expert.
ENGINE = "all_to_all"
#: DeepSpeed-MoE's: as many rows for every expert, full or not.
PADDED = "padded"
DEDUP, PER_NODE = "placer-dedup", "placer-per-node"
SHUFFLE, FOLLOW = "placer-shuffle", "placer-follow"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeKind:
    """The copies that an exchange sends, and their sender.

    Attributes
    ----------
    exchange
        What is sent.
    policy
        Home policy.
    shares_batch
        Whether all ranks are given the same tokens.
    """

    exchange: Exchange
    policy: str
    shares_batch: bool = False


EXCHANGE_KINDS = {
    ENGINE: ExchangeKind(exchange="per-expert", policy="fixed"),
    PADDED: ExchangeKind(exchange="padded", policy="fixed"),
    DEDUP: ExchangeKind(exchange="per-rank", policy="fixed"),
    PER_NODE: ExchangeKind(exchange="per-node", policy="fixed"),
    SHUFFLE: ExchangeKind(exchange="per-rank", policy="token_equal", shares_batch=True),
    FOLLOW: ExchangeKind(exchange="per-rank", policy="follow", shares_batch=True),
}
