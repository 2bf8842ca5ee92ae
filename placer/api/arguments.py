"""Options of the API's functions, by their names: those of the commands."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, get_type_hints

from placer.api.files import AnyPath
from placer.errors import UsageError, meant
from placer.trace.selection import Selection


class SizeArguments(TypedDict, total=False):
    """What sizes an expert, for predicted time and memory.

    Attributes
    ----------
    model
        Checkpoint whose ``config.json`` gives the sizes.
    hidden_size, expert_size
        Width of the hidden state and intermediate size of an expert, without ``model``.
    weight_bytes
        Bytes per weight: 2 for bf16, 1 for fp8, 0.5 for fp4.
    """

    model: AnyPath | None
    hidden_size: int | None
    expert_size: int | None
    weight_bytes: float | None


class SelectArguments(TypedDict, total=False):
    """Which tokens of a trace are used.

    Attributes
    ----------
    fold, not_fold
        Only sequences whose id mod N is K, or is not: ``"K/N"``.
    phase
        Only tokens of this phase: ``prefill``, ``decode`` or ``all``.
    """

    fold: str | None
    not_fold: str | None
    phase: str


class ReplayArguments(SelectArguments, total=False):
    """Options of ``placer replay``; ``docs/cli.md`` describes each.

    Attributes
    ----------
    table
        The plan's table, for ``placer-shuffle``.
    exchange
        Names of exchanges; all that fit the plan where it is empty.
    sequence_length, sequences_per_rank, passes
        Tokens to run of each sequence, sequences of a rank in one forward pass, and
        forward passes: 128, 2 and 4 by default.
    repeats
        How often each pass is timed, 3 by default; 0: not at all.
    dtype, device
        ``float32`` by default, and ``cpu`` or ``cuda``.
    hardware, elsewhere
        The links of this machine, and others on which the time is predicted.
    """

    table: AnyPath | None
    exchange: Sequence[str]
    sequence_length: int
    sequences_per_rank: int
    passes: int
    repeats: int
    dtype: str
    device: str
    hardware: str | None
    elsewhere: Sequence[str]


class ProveArguments(SelectArguments, total=False):
    """Options of ``placer prove``; ``docs/cli.md`` describes each.

    Attributes
    ----------
    max_imbalance
        The load cap; the plan's own by default.
    out
        Where to write the best placement found, as a plan.
    certificate
        Where to write what proves the bound.
    force
        Whether earlier files at both are replaced.
    check
        A certificate: only what it says is proved, without the solver.
    time_limit
        Seconds; any stop leaves a valid bound.
    """

    max_imbalance: float | None
    out: AnyPath | None
    certificate: AnyPath | None
    force: bool
    check: AnyPath | None
    time_limit: float | None


class TableArguments(TypedDict, total=False):
    """Options of ``placer tables``; ``docs/cli.md`` describes each.

    Attributes
    ----------
    fold, not_fold, phase
        The tokens to build it from; by default those that the plan was solved on.
    lookback
        Length of a history, in layers; up to 4 by default, fewer for many ranks.
    shrinkage
        Tokens of the layer's average that are added to every row: 4 by default.
    token_score, combined
        Whether it also holds second-best homes, and the combined rule.
    embeddings
        Checkpoint whose embedding predicts rows for ids that are not in the trace.
    max_home_imbalance
        Cap on the tokens of the fullest home rank over the mean.
    """

    fold: str | None
    not_fold: str | None
    phase: str | None
    lookback: int | None
    shrinkage: float
    token_score: bool
    combined: bool
    embeddings: AnyPath | None
    max_home_imbalance: float | None


class AffinityArguments(SelectArguments, total=False):
    """Options of ``placer affinity``; ``docs/cli.md`` describes each.

    Attributes
    ----------
    rows
        Also count experts by token id: ``none``, ``tokens`` or ``sequences``.
    workers
        Number of processes, 1 by default; ``None``: all cores, or 1 with a GPU.
    backend, ray_address
        ``processes`` or ``ray``, and the address of the Ray cluster.
    device
        ``cpu`` or ``cuda``.
    """

    rows: str
    workers: int | None
    backend: str
    ray_address: str | None
    device: str


class AdviseArguments(SizeArguments, total=False):
    """Options of ``placer advise``; ``docs/cli.md`` describes each.

    Attributes
    ----------
    engine
        An engine, or a family of engines; by default the usual exchanges.
    policy
        ``fixed`` or ``follow``.
    tokens_per_rank
        Sizes of batches: a list, or ``"64,256,4096"``.
    batching
        ``decode`` or ``prefill``: all batches are made so.
    hardware
        Name or ``.toml`` file of hardware: then predicted time decides.
    least_gain
        Smallest saving that is worth a change.
    phase
        Only tokens of this phase: ``prefill``, ``decode`` or ``all``.
    """

    engine: str | None
    policy: str
    tokens_per_rank: str | Sequence[int] | None
    batching: str | None
    hardware: AnyPath | None
    least_gain: float
    phase: str


class SolveArguments(SizeArguments, total=False):
    """Options of ``placer solve``; ``docs/cli.md`` describes each.

    Attributes
    ----------
    engine
        The engine to solve for (``docs/engines.md``).
    objective
        ``traffic`` (under the load cap), ``balance`` or ``time``.
    policy
        How the home of a token is chosen: ``fixed``, ``follow``, ``token`` or ``request``.
    redundant_experts
        Extra slots in each layer, for replicas; ``"auto"`` chooses their number.
    max_imbalance
        Cap on the load of the busiest rank over the mean, in every layer.
    fold, not_fold, phase
        The tokens to solve on, as in :meth:`placer.Trace.affinity`. The plan is judged on
        all other sequences.
    hardware
        Name or ``.toml`` file of the hardware whose time is predicted.
    exchange
        ``per-rank`` or ``per-node``; the engine's, or ``per-rank``.
    max_home_imbalance, max_received_copies
        Further caps, ratios to the mean.
    relax_cap
        Whether a layer that cannot meet a cap takes the lowest value that it can reach.
    inter_cost, intra_cost
        Cost of a copy between nodes and inside a node.
    topology
        File with the cost of a copy between each pair of ranks.
    ep_size, tensor_parallel_size, ep_groups
        The expert-parallel groups of a larger world.
    redundant_gain, redundant_memory
        With ``redundant_experts="auto"``: share that a step must save, and GiB per rank.
    replica_choice
        Which replica serves: ``local-first``, ``sglang-static`` or ``hash``.
    robust
        ``none``, ``bootstrap`` or ``domains``.
    overflow_price, receive_price
        Penalties, in copies.
    start
        File of the plan that is served now.
    migration_cost
        Cost of moving one expert to another rank, in copies.
    pin
        Experts that stay on a rank: ``"LAYER:EXPERT=RANK"``, all from 0.
    preserve_groups, ignore_groups
        Whether router groups stay together, or may be split where load is balanced.
    proof
        Effort on the bound: ``none``, ``quick`` or ``full``.
    num_sweeps, num_rounds
        Passes and rounds of the searches.
    params
        TOML file with parameters of the search.
    require_optimal
        Whether a plan without a proof of optimality is an error.
    """

    engine: str | None
    objective: str
    policy: str
    redundant_experts: int | str
    max_imbalance: float | None
    fold: str | None
    not_fold: str | None
    phase: str
    hardware: AnyPath | None
    exchange: str | None
    max_home_imbalance: float | None
    max_received_copies: float | None
    relax_cap: bool
    inter_cost: int | None
    intra_cost: int | None
    topology: AnyPath | None
    ep_size: int | None
    tensor_parallel_size: int
    ep_groups: str
    redundant_gain: float | None
    redundant_memory: float | None
    replica_choice: str | None
    robust: str
    overflow_price: float | None
    receive_price: float
    start: AnyPath | None
    migration_cost: float
    pin: Sequence[str] | None
    preserve_groups: bool
    ignore_groups: bool
    proof: str
    num_sweeps: int | None
    num_rounds: int | None
    params: AnyPath | None
    require_optimal: bool


class SimulateArguments(SizeArguments, total=False):
    """Options of ``placer simulate``; ``docs/cli.md`` describes each.

    Attributes
    ----------
    engine
        The engine that serves, or a family of engines; the one that the plan was solved
        for.
    table
        The plan's token-shuffle table, a file.
    tokens_per_rank
        Sizes of batches: a list, or ``"64,256,4096"``.
    batching
        ``decode`` or ``prefill``: all batches are made so.
    baseline
        Placements to compare with; ``contiguous``, ``balanced`` and ``eplb``.
    replica_choice
        Which replica serves; the engine's, else the plan's.
    hardware
        Name or ``.toml`` file of the hardware whose time is predicted.
    fold, not_fold, phase
        The tokens, as in :meth:`placer.Trace.affinity`.
    """

    engine: str | None
    table: AnyPath | None
    tokens_per_rank: str | Sequence[int] | None
    batching: str | None
    baseline: Sequence[str] | None
    replica_choice: str | None
    hardware: AnyPath | None
    fold: str | None
    not_fold: str | None
    phase: str


class ExportArguments(TypedDict, total=False):
    """Options of ``placer export``; ``docs/cli.md`` describes each.

    Attributes
    ----------
    link
        Whether unchanged shards are hard links instead of copies.
    hash
        Whether the SHA-256 of each original shard is recorded.
    workers
        Shards that are written at the same time.
    backend, ray_address
        ``processes`` or ``ray``, and the address of the Ray cluster.
    experts_only
        With target ``ranks``: whether only experts are written.
    force
        Whether an earlier result at the same path is replaced.
    """

    link: bool
    hash: bool
    workers: int | None
    backend: str | None
    ray_address: str | None
    experts_only: bool
    force: bool


def selected(options: Mapping[str, Any]) -> Selection:
    """Return the tokens that :class:`SelectArguments` ask for.

    Raises
    ------
    UsageError
        If one of them has no such value.
    """
    fold, not_fold = options.get("fold"), options.get("not_fold")
    return Selection.parse(fold, not_fold, options.get("phase", "all"))


def require_known(given: Mapping[str, object], arguments: type) -> None:
    """Refuse an option that a function does not have.

    Parameters
    ----------
    given
        Options by their names.
    arguments
        The ``TypedDict`` of the function's options.

    Raises
    ------
    UsageError
        If there is one.
    """
    known = get_type_hints(arguments)
    for name in given:
        if name not in known:
            raise UsageError(
                f"there is no option {name}",
                f"{meant(name, known)}see help(placer.{arguments.__name__})",
            )


def sizes_text(sizes: str | Sequence[int] | None) -> str | None:
    """Return sizes of batches as the command line has them: ``64,256,4096``."""
    return sizes if sizes is None or isinstance(sizes, str) else ",".join(map(str, sizes))
