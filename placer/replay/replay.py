"""Replaying a plan: the model runs expert-parallel, and its traffic is counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from placer.errors import PlacerError, UsageError, VerificationError, one_of
from placer.model import (
    Architecture,
    ModelSpec,
    read_config,
    require_same_model,
    require_same_tokenizer,
    tokenizer_of,
)
from placer.placement import Placement, Plan
from placer.placement.reference import contiguous
from placer.planning.tables import read_table_of
from placer.replay.kinds import EXCHANGE_KINDS, FOLLOW, PER_NODE, SHUFFLE
from placer.replay.outcome import ReplayedRun, ReplayOutcome, median_seconds
from placer.replay.predict import predict_copies, predict_seconds
from placer.replay.traffic import Collective
from placer.run.worker import Worker, together
from placer.serving.homes import fixed_homes
from placer.table.table import Table
from placer.target.hardware import Hardware
from placer.trace import EVERYTHING, Chunk, Selection, Trace
from placer.trace.loading import DTYPES, Dtype, load_causal_model

if TYPE_CHECKING:
    from placer.replay.session import WorkerRun

# Errors that rounding explains: experts are summed in another order, over many layers.
_TOLERANCES = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 0.1, "float16": 0.01}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """How to replay.

    Attributes
    ----------
    exchanges
        Names of exchanges; empty for all that the plan and its table allow.
    sequence_length
        Tokens of a sequence; the trace's shorter ones are left out, longer ones cut.
    sequences_per_rank
        Sequences of a rank in one forward pass.
    num_passes
        Forward passes of all ranks.
    repeats
        How often the passes are timed; 0 for counting only.
    dtype
        Of the weights; ``auto`` takes the checkpoint's own.
    device
        ``cpu`` (gloo) or ``cuda`` (NCCL).
    hardware
        The links that it runs on, measured.
    elsewhere
        Others, for which the time is predicted from that here.
    """

    exchanges: tuple[str, ...] = ()
    sequence_length: int = 128
    sequences_per_rank: int = 2
    num_passes: int = 4
    repeats: int = 3
    dtype: Dtype = "float32"
    device: str = "cpu"
    hardware: Hardware | None = None
    elsewhere: tuple[Hardware, ...] = ()

    def __post_init__(self) -> None:
        for option, number in {
            "--sequence-length": self.sequence_length,
            "--sequences-per-rank": self.sequences_per_rank,
            "--passes": self.num_passes,
        }.items():
            if number < 1:
                raise UsageError(
                    f"{option} must be positive, got {number}",
                    "leave it out for its default",
                )
        if self.repeats < 0:
            raise UsageError(
                f"--repeats must not be negative, got {self.repeats}",
                "count without timing: --repeats 0",
            )
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"--device {self.device} is not known", "choose cpu or cuda")
        one_of("--dtype", self.dtype, DTYPES)
        self._require_prediction()

    def _require_prediction(self) -> None:
        names = [other.name for other in self.elsewhere]
        if self.hardware is not None and not names:
            raise UsageError(
                f"--hardware {self.hardware.name} is only used with --elsewhere, which is "
                "missing",
                "name other links: --elsewhere FILE, or drop --hardware",
            )
        if names and self.hardware is None:
            raise UsageError(
                f"--elsewhere {names[0]} needs the links of this machine",
                "measure them: placer calibrate --out here.toml, then --hardware here.toml",
            )
        if names and not self.repeats:
            raise UsageError(
                f"--elsewhere {names[0]} is predicted from the measured time, but "
                "--repeats is 0",
                "time the passes: --repeats 3",
            )
        if len(set(names)) < len(names):
            raise UsageError(
                f"two of --elsewhere have one name: {', '.join(names)}",
                "rename a file: its name labels the predictions",
            )


def replay(
    plan_path: Path,
    directory: Path,
    trace: Trace,
    options: ReplayOptions,
    worker: Worker,
    *,
    selection: Selection = EVERYTHING,
    table_path: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> ReplayOutcome | None:
    """Run a model with its experts as planned, and contiguous.

    To be called by as many workers as the plan has ranks.

    Parameters
    ----------
    plan_path, directory
        The plan, and the original model: a Hugging Face directory.
    trace
        Whose tokens to run; what its routers chose is not used.
    options
        What to run.
    worker
        Which rank this is.
    selection
        Which tokens of the trace; not only decode tokens.
    table_path
        The plan's token-shuffle table, for ``placer-shuffle``.
    say
        Called with what runs, on the first rank.

    Returns
    -------
    ReplayOutcome or None
        What all ranks found, on the first; ``None`` on the others.

    Raises
    ------
    PlacerError
        If plan, model, trace and table do not fit, or the model cannot be run so.
    UsageError
        If the workers are not as many as the ranks, there is one only, or an exchange is
        not known.
    """
    _require_workers(Plan.read(plan_path).placement, plan_path, worker)
    ready = prepared(plan_path, directory, trace, options, selection, table_path)
    plan, batches, tasks, warnings = ready.plan, ready.batches, ready.tasks, ready.warnings
    _require_engine()
    backend = "gloo" if options.device == "cpu" else "nccl"
    if options.device == "cuda":
        worker.use_own_gpu()
    with together(worker, backend):
        runner = _Runner(directory, ready.spec, batches, options, worker)
        reason = runner.session.why_not(FOLLOW)
        if reason is not None and not options.exchanges:
            warnings.append(f"{FOLLOW} is left out: {reason}")
            tasks = [task for task in tasks if task[2] != FOLLOW]
        runs = []
        for name, placement, exchange, its_table in tasks:
            if say is not None and worker.index == 0:
                say(f"{exchange}, {name} placement")
            runs.append(runner.run(name, placement, exchange, its_table))
        device = runner.device
    if worker.index:
        return None
    return ReplayOutcome(
        runs=tuple(run for run in runs if run is not None),
        num_passes=len(batches),
        batch_size=batches.shape[1],
        sequence_length=options.sequence_length,
        num_ranks=worker.number,
        num_nodes=plan.placement.num_nodes,
        dtype=runner.dtype,
        device=device,
        tolerance=_TOLERANCES[runner.dtype],
        warnings=tuple(warnings),
    )


Task = tuple[str, Placement, str, Table | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """What is replayed: ``batches`` are ``[passes, B, S]`` token ids."""

    plan: Plan
    spec: ModelSpec
    batches: npt.NDArray[np.integer]
    tasks: list[Task]
    warnings: list[str]


def prepared(
    plan_path: Path,
    directory: Path,
    trace: Trace,
    options: ReplayOptions,
    selection: Selection = EVERYTHING,
    table_path: Path | None = None,
) -> Prepared:
    """Return what is replayed. Parameters and errors are those of :func:`replay`."""
    plan = Plan.read(plan_path)
    num_ranks = plan.placement.num_ranks
    if num_ranks == 1:
        raise UsageError(
            f"{plan_path} has one rank, which sends nothing",
            "place the experts on more ranks: placer solve TRACE --gpus-per-node 4 --out "
            "PLAN",
        )
    if find_spec("transformers") is None:
        raise _no_engine("transformers is not installed")
    spec = ModelSpec.from_checkpoint(directory)
    matched = require_same_model(plan.model, str(plan_path), spec, str(directory))
    require_same_model(plan.model, str(plan_path), trace.model, str(trace.directory))
    table, assumed = read_table_of(table_path, plan_path, trace)
    of_other = require_same_tokenizer(
        trace.tokenizer_sha256,
        str(trace.directory),
        tokenizer_of(directory),
        str(directory),
    )
    tasks = _tasks(plan, table, options)
    batches = _batches(trace, selection, options, num_ranks)
    _require_vocabulary(batches, spec, trace, directory)
    warnings = [one for one in (matched, assumed, of_other) if one is not None]
    return Prepared(plan=plan, spec=spec, batches=batches, tasks=tasks, warnings=warnings)


def _tasks(plan: Plan, table: Table | None, options: ReplayOptions) -> list[Task]:
    """Return what to run: name, placement, exchange, and the table where it is needed."""
    unknown = sorted(set(options.exchanges) - set(EXCHANGE_KINDS))
    if unknown:
        raise UsageError(
            f"--exchange {unknown[0]} is not known",
            f"choose among {', '.join(EXCHANGE_KINDS)}",
        )
    refused = {}
    if plan.placement.num_nodes == 1:
        refused[PER_NODE] = "the plan has only one node"
    if table is None:
        refused[SHUFFLE] = "it needs the plan's table: --table TABLE"
    if plan.placement.has_replicas:
        reason = "an exchange that moves tokens cannot be replayed with redundant experts"
        refused |= {SHUFFLE: reason, FOLLOW: reason}
    for name in options.exchanges:
        if name in refused:
            raise UsageError(f"--exchange {name}: {refused[name]}")
    chosen = [name for name in options.exchanges or EXCHANGE_KINDS if name not in refused]
    tasks: list[Task] = []
    divisible = all(size % plan.placement.num_ranks == 0 for size in plan.model.num_experts)
    if divisible:
        by_default = contiguous(
            plan.model.num_experts, plan.placement.num_ranks, plan.placement.num_nodes
        )
        tasks += [("contiguous", by_default, one, None) for one in chosen if one != SHUFFLE]
    return tasks + [("plan", plan.placement, name, table) for name in chosen]


def _batches(
    trace: Trace, selection: Selection, options: ReplayOptions, num_ranks: int
) -> npt.NDArray[np.integer]:
    """Return ``[passes, B, S]`` token ids: the first sequences that are long enough."""
    if selection.phase == "decode":
        raise UsageError(
            "--phase decode: replay runs sequences from their start; without their "
            "prompt, generated tokens would be routed differently",
            "leave --phase out, or run only the prompts: --phase prefill",
        )
    tokens = trace.read(selection)
    if tokens.token_ids is None or (tokens.token_ids < 0).any():
        raise PlacerError(
            f"{trace.directory} has no token ids to run",
            "record one with them: placer record MODEL --corpus TEXT --out TRACE",
        )
    _, starts, lengths = np.unique(
        tokens.sequence_ids, return_index=True, return_counts=True
    )
    starts = starts[lengths >= options.sequence_length]
    size = num_ranks * options.sequences_per_rank
    num_passes = min(options.num_passes, len(starts) // size)
    if not num_passes:
        raise PlacerError(
            f"{len(starts)} sequences have {options.sequence_length} tokens or more, but "
            f"one forward pass of {num_ranks} ranks needs {size}",
            "take shorter ones, or fewer: --sequence-length 32 --sequences-per-rank 1",
        )
    taken = starts[: num_passes * size, None] + np.arange(options.sequence_length)
    batches: npt.NDArray[np.integer] = tokens.token_ids[taken]
    return batches.reshape(num_passes, size, -1)


def _require_workers(placement: Placement, plan_path: Path, worker: Worker) -> None:
    if worker.number != placement.num_ranks > 1:
        raise UsageError(
            f"{worker.number} workers were started for a plan of {placement.num_ranks} "
            "ranks",
            f"torchrun --nnodes {placement.num_nodes} --nproc-per-node "
            f"{placement.ranks_per_node} --no-python placer replay {plan_path} MODEL "
            "--trace TRACE",
        )


def _require_vocabulary(
    batches: npt.NDArray[np.integer], spec: ModelSpec, trace: Trace, directory: Path
) -> None:
    highest = int(batches.max())
    if spec.vocab_size is not None and highest >= spec.vocab_size:
        raise PlacerError(
            f"{trace.directory} has token id {highest}, but the vocabulary of {directory} "
            f"has {spec.vocab_size} ids",
            f"record a trace of this model: placer record {directory} --corpus TEXT --out "
            "TRACE",
        )


def _require_engine() -> None:
    try:
        import transformers.distributed.expert_parallel  # noqa: F401
    except ImportError as error:
        raise _no_engine(error) from error


def _no_engine(reason: object) -> PlacerError:
    return PlacerError(
        "replay needs a transformers whose exchange of experts can be replaced, as in "
        f"5.23: {reason}",
        "pip install --upgrade 'placer[record]' 'transformers>=5.23,<6'",
    )


def _collectives(found: Sequence["WorkerRun"]) -> tuple[Collective, ...]:
    """Put together what the ranks sent in each collective, in which all take part."""
    return tuple(
        Collective(
            operation=ranks[0].operation,
            num_bytes=np.stack([one.num_bytes for one in ranks]),
        )
        for ranks in zip(*(one.collectives for one in found), strict=True)
    )


class _Runner:
    """Runs placements on all ranks, and puts together what they saw."""

    def __init__(
        self,
        directory: Path,
        spec: ModelSpec,
        batches: npt.NDArray[np.integer],
        options: ReplayOptions,
        worker: Worker,
    ) -> None:
        architecture = Architecture.of(read_config(directory), directory)
        architecture.require_recorded(directory)
        model = load_causal_model(
            directory, dtype=options.dtype, device=worker.device(options.device)
        )
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.device = str(model.device)
        self.copy_bytes = model.dtype.itemsize * (spec.hidden_size or 0)
        self.worker, self.batches, self.options = worker, batches, options
        from placer.replay.session import ReplaySession

        self.session = ReplaySession(model, architecture, spec, batches, options.repeats)

    def run(
        self, name: str, placement: Placement, exchange: str, table: Table | None
    ) -> ReplayedRun | None:
        """Replay one placement under one exchange; the first rank gets the result."""
        found = self.session.run(placement, exchange, table)
        gathered: list[Any] = [None] * self.worker.number
        dist.all_gather_object(gathered, found)
        if self.worker.index:
            return None
        return self._result(name, placement, exchange, table, gathered)

    def _result(
        self,
        name: str,
        placement: Placement,
        exchange: str,
        table: Table | None,
        found: Sequence["WorkerRun"],
    ) -> ReplayedRun:
        kind = EXCHANGE_KINDS[exchange]
        tokens = self._routed(found)
        compared = sum(one.num_compared for one in found)
        expected = tokens.num_tokens * (len(found) if exchange == SHUFFLE else 1)
        if compared != expected:
            raise VerificationError(
                f"{exchange} with the {name} placement returned {compared} tokens, "
                f"expected {expected}"
            )
        predicted = predict_copies(
            placement,
            tokens,
            exchange=kind.exchange,
            policy=kind.policy,
            batch_size=self.batches[0].size,
            fixed=fixed_homes(tokens.sequence_ids, placement.num_ranks),
            table=table,
        )
        alone = self.session.routing
        sent = {
            part.name: np.stack([getattr(one.traffic, part.name) for one in found], axis=1)
            for part in fields(found[0].traffic)
        }
        return ReplayedRun(
            placement=name,
            exchange=exchange,
            **sent,
            predicted_dispatch=predicted.dispatch * self.copy_bytes,
            predicted_combine=predicted.combine * self.copy_bytes,
            # Unlike max(), this keeps NaN.
            error=float(np.max([one.error for one in found])),
            differently_routed=sum(
                int((np.sort(ids, axis=1) != np.sort(own, axis=1)).any(axis=1).sum())
                for ids, own in zip(tokens.experts, alone, strict=True)
            ),
            num_tokens=tokens.num_tokens,
            ranks_per_node=placement.ranks_per_node,
            seconds=(seconds := median_seconds(found[0].seconds)),
            elsewhere=self._elsewhere(seconds, found, placement.ranks_per_node),
        )

    def _elsewhere(
        self, seconds: float | None, found: Sequence["WorkerRun"], ranks_per_node: int
    ) -> dict[str, float]:
        """Predict the seconds of a pass with other links."""
        here = self.options.hardware
        if here is None or seconds is None:
            return {}
        collectives = _collectives(found)
        return {
            other.name: predict_seconds(
                seconds,
                collectives,
                num_passes=len(self.batches),
                ranks_per_node=ranks_per_node,
                here=here,
                elsewhere=other,
            )
            for other in self.options.elsewhere
        }

    def _routed(self, found: Sequence["WorkerRun"]) -> Chunk:
        """Put together what the routers of all ranks chose, in the order of the tokens."""
        num_sequences = self.batches.shape[0] * self.batches.shape[1]
        length = self.batches.shape[2]
        experts = []
        for layer in range(len(found[0].places)):
            places = np.concatenate([one.places[layer] for one in found])
            ids = np.concatenate([one.experts[layer] for one in found])
            if not np.array_equal(np.sort(places), np.arange(num_sequences * length)):
                raise PlacerError(
                    f"MoE layer {layer} routed {len(places)} tokens, "
                    f"expected each of {num_sequences * length} once"
                )
            experts.append(ids[places.argsort()])
        return Chunk(
            experts=tuple(experts),
            token_ids=self.batches.ravel().astype(np.int32),
            sequence_ids=np.repeat(np.arange(num_sequences, dtype=np.int32), length),
            positions=np.tile(np.arange(length, dtype=np.int32), num_sequences),
        )
