"""Building a plan's table from the plan file and a trace."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from placer.errors import PlacerError
from placer.model import ModelSpec, require_same_model, require_same_tokenizer, tokenizer_of
from placer.placement import Plan
from placer.placement.plan import plan_sha256
from placer.planning.profile import layer_ids_of, num_seen_sequences, profile_of
from placer.run.progress import Progress, Steps
from placer.serving.replica_choice import unknown_dense_layers
from placer.simulation.metrics import PolicyMetrics
from placer.simulation.simulate import simulate
from placer.table.build import DEFAULT_SHRINKAGE, build_table
from placer.table.calibration import Calibration, calibrated, fit_calibration
from placer.table.embeddings import CheckpointEmbeddings
from placer.table.hash_routing import TokenExperts, read_token_experts
from placer.table.table import Table
from placer.trace import EVERYTHING, Chunk, Fold, Selection, Trace
from placer.trace.selection import parse_phase
from placer.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOptions:
    """Options of a table; see :func:`placer.table.build_table`.

    Attributes
    ----------
    lookback
        Number of past majority ranks that index A, or ``None`` for the default.
    shrinkage
        Tokens of the layer's prior that are added to every row.
    with_token_score
        Also hold the second choices of equal slices.
    with_combined
        Also hold the combined rule.
    embeddings
        Checkpoint whose embedding gives ids never seen a row, and whose hash-routed
        layers get exact rows; or ``None``.
    max_home_imbalance
        Cap on the tokens of the fullest home over the mean, or ``None``.
    """

    lookback: int | None = None
    shrinkage: float = DEFAULT_SHRINKAGE
    with_token_score: bool = False
    with_combined: bool = False
    embeddings: Path | None = None
    max_home_imbalance: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TableResult:
    """A table, and its figures on held-out sequences.

    Attributes
    ----------
    table
        The table.
    profile
        The tokens that it was built from.
    num_seen_ids
        Token ids that occur in the profile.
    exact_layers
        MoE layers, from 0, whose rows come from the checkpoint: hash-routed ones.
    heldout
        Metrics by home policy on the sequences outside the profile, ``None`` if there
        are none.
    warnings
        What limits the table.
    """

    table: Table
    profile: Selection
    num_seen_ids: int
    exact_layers: tuple[int, ...]
    heldout: dict[str, PolicyMetrics] | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``placer tables --json``."""
        return {
            "num_token_ids": self.table.vocab_size,
            "num_seen_ids": self.num_seen_ids,
            "exact_layers": list(self.exact_layers),
            "lookback": self.table.lookback,
            **self.profile.to_json(),
            "chance": 1 / self.table.num_ranks,
            "heldout": None
            if self.heldout is None
            else {policy: m.to_json() for policy, m in self.heldout.items()},
            "warnings": list(self.warnings),
        }


def make_table(
    plan_path: Path,
    trace: Trace,
    *,
    fold: Fold | None = None,
    phase: str | None = None,
    options: TableOptions,
    progress: Progress | None = None,
) -> TableResult:
    """Build a plan's table and try it on the held-out sequences.

    Without a ``fold`` or a ``phase``, that of the tokens that the plan was solved on is
    taken, where they are of this trace. ``progress`` gets a line for each step.

    Raises
    ------
    PlacerError
        If plan and trace (or checkpoint) are of different models, the trace has no token
        ids, or an option is out of range.
    UsageError
        If the plan has redundant experts and does not say which replica serves, or trace
        and checkpoint have different tokenizers.
    """
    plan = Plan.read(plan_path)
    choice, steps = plan.replica_choice, Steps(tell=progress, total=4)
    warning = require_same_model(
        plan.model, str(plan_path), trace.model, str(trace.directory)
    )
    own = profile_of(plan, trace) or EVERYTHING
    profile = Selection(
        fold or own.fold, own.phase if phase is None else parse_phase(phase)
    )
    steps.begin("read the tokens")
    tokens = trace.read(profile)
    known = _known_of_tokens(plan, trace, options.embeddings)
    layer_ids = layer_ids_of(plan, known.model)
    build = partial(
        build_table,
        plan.placement,
        vocab_size=known.model.vocab_size or _largest_id(tokens) + 1,
        lookback=options.lookback,
        shrinkage=options.shrinkage,
        with_combined=options.with_combined,
        max_home_imbalance=options.max_home_imbalance,
        replica_choice=choice,
        layer_ids=layer_ids,
    )
    steps.begin("count homes by token id and history")
    table = build(
        tokens,
        with_token_score=options.with_token_score,
        embeddings=None
        if options.embeddings is None
        else CheckpointEmbeddings(options.embeddings),
        token_experts=known.token_experts,
    )
    exact_layers = tuple(sorted(known.token_experts))
    steps.begin("measure the error of the counts")
    # Without the embedding: what is measured is the error of counts.
    calibration = fit_calibration(plan.placement, tokens, build, choice, layer_ids)
    if calibration is not None:
        table = calibrated(table, calibration, exact_layers)
    table = dataclasses.replace(
        table,
        model=known.model,
        plan_sha256=plan_sha256(plan_path),
        trace_sha256=trace.sha256,
        tokenizer_sha256=known.tokenizer_sha256,
        provenance=_provenance(profile, options, exact_layers, calibration),
    )
    steps.begin("try it on held-out sequences")
    heldout = _heldout(trace, profile)
    warnings = (
        warning,
        known.warning,
        unknown_dense_layers(plan.placement, choice, layer_ids),
        _seen_by_plan(plan, trace, heldout),
    )
    return TableResult(
        table=table,
        profile=profile,
        num_seen_ids=_num_ids(tokens),
        exact_layers=exact_layers,
        heldout=None
        if heldout is None
        else simulate(
            plan.placement,
            heldout,
            table=table,
            replica_choice=choice,
            layer_ids=layer_ids,
        ),
        warnings=tuple(one for one in warnings if one is not None),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _KnownOfTokens:
    """What is known of the model and its token ids.

    Attributes
    ----------
    model
        Of the trace, the plan or the checkpoint: the first that is bound.
    token_experts
        By hash-routed layer, the experts of every token id.
    tokenizer_sha256
        Of the trace, or else of the checkpoint.
    warning
        A warning where only one of the two says which tokenizer it has.
    """

    model: ModelSpec
    token_experts: TokenExperts
    tokenizer_sha256: str | None
    warning: str | None


def _known_of_tokens(plan: Plan, trace: Trace, embeddings: Path | None) -> _KnownOfTokens:
    model = trace.model if trace.model.bound else plan.model
    tokenizer = trace.tokenizer_sha256
    if embeddings is None:
        return _KnownOfTokens(
            model=model, token_experts={}, tokenizer_sha256=tokenizer, warning=None
        )
    checkpoint = ModelSpec.from_checkpoint(embeddings)
    require_same_model(model, "the trace", checkpoint, str(embeddings))
    token_experts = read_token_experts(embeddings, checkpoint)
    own = tokenizer_of(embeddings)
    warning = require_same_tokenizer(tokenizer, str(trace.directory), own, str(embeddings))
    return _KnownOfTokens(
        model=model if model.bound else checkpoint,
        token_experts=token_experts,
        tokenizer_sha256=tokenizer or own,
        warning=warning,
    )


def _provenance(
    profile: Selection,
    options: TableOptions,
    exact_layers: tuple[int, ...],
    calibration: Calibration | None,
) -> dict[str, Any]:
    return {
        "placer": __version__,
        **profile.to_json(),
        "shrinkage": options.shrinkage,
        "max_home_imbalance": options.max_home_imbalance,
        "unseen_ids": "prior" if options.embeddings is None else "regression",
        "exact_layers": list(exact_layers),
        "calibration": None if calibration is None else dataclasses.asdict(calibration),
    }


def _heldout(trace: Trace, profile: Selection) -> Chunk | None:
    """Return the tokens outside the profile, if there are any."""
    if profile.fold is None:
        return None
    chunks = list(trace.chunks(profile.complement()))
    return Chunk.concatenate(chunks) if chunks else None


def _seen_by_plan(plan: Plan, trace: Trace, heldout: Chunk | None) -> str | None:
    """Say how many of the sequences outside the profile the plan has seen, if any."""
    if heldout is None:
        return None
    seen = num_seen_sequences(plan, trace, heldout.sequence_ids)
    return (
        f"{seen} of the {len(np.unique(heldout.sequence_ids))} held-out sequences are in "
        "the plan's profile, so the figures are too good: solve, and build the table, "
        "with the same --fold"
        if seen
        else None
    )


def _largest_id(tokens: Chunk) -> int:
    return -1 if tokens.token_ids is None else int(tokens.token_ids.max())


def _num_ids(tokens: Chunk) -> int:
    return 0 if tokens.token_ids is None else len(set(tokens.token_ids.tolist()) - {-1})


def read_table_of(
    table_path: Path | None, plan_path: Path, trace: Trace
) -> tuple[Table | None, str | None]:
    """Read a table, and make sure that it is the plan's own and of the trace's tokenizer.

    Returns
    -------
    table, warning
        No table without a path; a warning where only one of table and trace says which
        tokenizer made its token ids.

    Raises
    ------
    PlacerError
        If the table was written for another plan file.
    UsageError
        If table and trace are of different tokenizers.
    """
    if table_path is None:
        return None, None
    table = Table.read(table_path)
    expected = plan_sha256(plan_path)
    if table.plan_sha256 != expected:
        raise PlacerError(
            f"table {table_path} was written for the plan with SHA-256 "
            f"{str(table.plan_sha256)[:12]}, but {plan_path} has {expected[:12]}",
            f"write the plan's own table: placer tables {plan_path} TRACE "
            f"--out {table_path} --force",
        )
    return table, require_same_tokenizer(
        table.tokenizer_sha256,
        str(table_path),
        trace.tokenizer_sha256,
        str(trace.directory),
    )
