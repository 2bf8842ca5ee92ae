"""A plan, as the API shows it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np

from placer.api.files import (
    AnyPath,
    UsedFile,
    require_unchanged,
    temporary_file,
    writing,
)
from placer.api.how import How
from placer.api.shown import Shape, Shown, TitledTable
from placer.arrays import IntArray
from placer.model import ModelSpec
from placer.placement import Plan as SolvedPlan
from placer.placement.plan import plan_sha256
from placer.run.verdict import Verdict

if TYPE_CHECKING:
    from pandas import DataFrame

    from placer.api.affinity import Affinity
    from placer.api.arguments import (
        ExportArguments,
        ProveArguments,
        ReplayArguments,
        SelectArguments,
        SimulateArguments,
        TableArguments,
    )
    from placer.api.checking import Checked
    from placer.api.exporting import Exported
    from placer.api.proving import Proved
    from placer.api.replaying import Replayed
    from placer.api.simulation import Simulation
    from placer.api.table import Table
    from placer.api.trace import Trace
    from placer.api.verifying import Verified


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Plan(Shown):
    """A plan: which physical slot of which rank holds which logical expert.

    :func:`placer.solve` makes one; :func:`placer.open` reads one.

    Attributes
    ----------
    contents
        What the rest of placer works with; not part of the stable API.
    path
        The file that it was read from, or ``None``.
    sha256
        SHA-256 of that file, or ``None``.
    how
        How it was solved; ``None`` of a plan that was read.
    """

    contents: SolvedPlan
    path: Path | None = None
    sha256: str | None = None
    how: How | None = None

    @classmethod
    def read(cls, path: AnyPath) -> Self:
        """Read a plan.

        Raises
        ------
        PlacerError
            If it is none, or is damaged.
        """
        file = Path(path)
        return cls(SolvedPlan.read(file), file, plan_sha256(file))

    @property
    def model(self) -> ModelSpec:
        """The model that it is for."""
        return self.contents.model

    @property
    def num_ranks(self) -> int:
        """Expert-parallel ranks, R."""
        return self.contents.placement.num_ranks

    @property
    def num_nodes(self) -> int:
        """Nodes; ranks are numbered node by node."""
        return self.contents.placement.num_nodes

    @property
    def redundant_experts(self) -> int:
        """Slots of a layer beyond one for each expert."""
        return self.contents.placement.redundant_experts

    @property
    def engine(self) -> str | None:
        """The engine that it was solved for, or ``None``."""
        return self.contents.provenance.get("engine")

    @property
    def policy(self) -> str:
        """The home policy that it was solved for."""
        return self.contents.policy

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What the plan records of itself: ``profile``, ``heldout`` and ``baselines``.

        With the figures of ``placer simulate --json``, by home policy.
        """
        return self.contents.metrics

    @property
    def physical_to_logical_map(self) -> IntArray:
        """``[L, P]`` int64: the logical expert in each physical slot.

        Slot p belongs to rank ``p // (P / num_ranks)``. Where layers have fewer slots than
        others, the places past them hold -1.
        """
        rows = self.contents.placement.physical_to_logical_map
        full = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
        for layer, row in enumerate(rows):
            full[layer, : len(row)] = row
        return full

    @property
    def verdict(self) -> Verdict:
        """What the plan changes against contiguous and EPLB, and what it costs."""
        from placer.report.verdicts import verdict_of_solve

        how = self.how or How(source=Path("TRACE"))
        path = self.path or Path("PLAN")
        return verdict_of_solve(
            self.contents, path, how.source, expert=how.expert, model=how.model
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What limits the plan's own figures, one sentence each."""
        from placer.report.comparison import plan_warnings

        return (*plan_warnings(self.contents), *self.closing_lines)

    @property
    def closing_lines(self) -> tuple[str, ...]:
        """Those of the warnings that the command prints last."""
        from placer.report.comparison import closing_lines

        return (*closing_lines(self.contents),)

    def notes(self, *, details: bool = True) -> list[str]:
        """Return what else to know of the plan, one sentence each."""
        from placer.report.comparison import plan_notes

        return [*plan_notes(self.contents, details=details)]

    def tables(self, *, details: bool = False) -> tuple[list[TitledTable], list[str]]:
        """Return what ``placer solve`` shows: figures, and sentences after them.

        ``details`` adds what proves them.
        """
        from placer.report.comparison import (
            certificate_lines,
            plan_table,
            plan_table_title,
            price_line,
        )

        plan, lines = self.contents, list[str]()
        columns, rows = plan_table(plan, per_batch=details)
        if details and (priced := price_line(plan)) is not None:
            lines.append(priced)
        if self.how is not None and self.how.start is not None:
            moved, slots = plan.provenance["moved_experts"], plan.placement.to_json()
            told = f"{moved} of {sum(map(len, slots))} slots changed from {self.how.start}"
            if moved and not plan.provenance["migration_cost"]:
                told += "; to change fewer, set a cost per move: --migration-cost"
            lines.append(told)
        lines += certificate_lines(plan) if details or not rows else []
        if self.how is not None:
            lines += self.how.time_lines
        if not rows:
            return [], lines
        return [(plan_table_title(plan), columns[1:], [row[1:] for row in rows])], lines

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that ``placer solve --json`` prints."""
        return {
            "verdict": self.verdict.to_json(),
            "out": None if self.path is None else str(self.path),
            "seconds": self.contents.solver.seconds,
            "warnings": [*self.warnings],
            "notes": self.notes(),
            **self.contents.to_json(),
        }

    def to_frame(self) -> "DataFrame":
        """Return one row for each MoE layer and slot.

        Columns: ``layer`` (from 0), ``slot``, ``rank``, ``node``, ``expert``.
        """
        from pandas import DataFrame

        placed = self.contents.placement
        rows = placed.physical_to_logical_map
        sizes = [len(row) for row in rows]
        slot = np.concatenate([np.arange(size) for size in sizes])
        layer = np.repeat(np.arange(len(rows)), sizes)
        rank = slot // (np.asarray(sizes) // placed.num_ranks)[layer]
        return DataFrame(
            {
                "layer": layer,
                "slot": slot,
                "rank": rank,
                "node": rank // placed.ranks_per_node,
                "expert": np.concatenate(rows),
            }
        )

    def simulate(
        self,
        trace: "Trace",
        *,
        progress: Callable[[str], None] | None = None,
        **options: Unpack["SimulateArguments"],
    ) -> "Simulation":
        """Measure the plan and baselines on a trace, as ``placer simulate`` does.

        Judge it on sequences that it was not solved on: ``not_fold="0/2"`` after
        ``fold="0/2"``.

        Parameters
        ----------
        trace
            What to measure on.
        progress
            Called with one line for each step.
        **options
            Those of ``placer simulate``: :class:`placer.SimulateArguments`.

        Raises
        ------
        PlacerError
            If plan and trace are of different models.
        UsageError
            If a baseline, an engine or a hardware is unknown, or no engine is run for the
            batches.
        """
        from placer.api.simulation import simulate

        return simulate(self, trace, progress=progress, **options)

    def export(
        self,
        target: str,
        model: AnyPath | None,
        out: AnyPath,
        **options: Unpack["ExportArguments"],
    ) -> "Exported":
        """Write the plan in the form that an engine loads, as ``placer export`` does.

        Parameters
        ----------
        target
            ``checkpoint``, ``ranks``, ``deepspeed``, or a map: ``sglang``, ``trtllm``,
            ``vllm-ascend``, ``vllm-pr49572``, ``vllm-das``, ``eplb``, ``csv``, ``json``.
        model
            The original model: a Hugging Face directory, for ``deepspeed`` the folder of a
            tag. ``None`` for ``eplb``, ``csv`` and ``json``, which need none.
        out
            The file or directory to write.
        **options
            Those of ``placer export``: :class:`placer.ExportArguments`.

        Raises
        ------
        PlacerError
            If plan and model differ, the target cannot hold the plan, or ``out`` exists
            and ``force`` is false.
        UsageError
            If the target is not known, or an option or a path is not for it.
        """
        from placer.api.exporting import export_plan

        return export_plan(self, target, model, out, **options)

    def verify(
        self,
        model: AnyPath,
        exported: AnyPath,
        *,
        corpus: Sequence[AnyPath] = (),
        max_tokens: int = 2048,
        progress: Callable[[str], None] | None = None,
    ) -> "Verified":
        """Check that an export of this plan computes what the original computes.

        Parameters
        ----------
        model
            The original.
        exported
            The checkpoint, ranks or map.
        corpus
            Text to run both models on; by default one that comes with placer.
        max_tokens
            Limit on the tokens to run; 0 compares tensors only.
        progress
            Called with one line for each tensor or text.

        Raises
        ------
        VerificationError
            If it differs from what the plan promises.
        PlacerError
            If a file cannot be read.
        """
        from placer.api.verifying import verify_export

        with self.as_file() as file:
            return verify_export(
                Path(model),
                Path(exported),
                file.path,
                corpus=[Path(one) for one in corpus],
                max_tokens=max_tokens,
                progress=progress,
            )

    def prove(
        self,
        trace: "Trace",
        *,
        progress: Callable[[str], None] | None = None,
        **options: Unpack["ProveArguments"],
    ) -> "Proved":
        """Say how far the plan is from the best placement, as ``placer prove`` does.

        Parameters
        ----------
        trace
            The trace that judges it.
        progress
            Called with one line for each step.
        **options
            Those of ``placer prove``: :class:`placer.ProveArguments`.

        Raises
        ------
        PlacerError
            If a file is damaged or exists, or the plan has redundant experts.
        UsageError
            If plan and trace are of different models, or options do not fit together.
        VerificationError
            If the certificate to check does not hold.
        """
        from placer.api.proving import prove

        return prove(self, trace, progress=progress, **options)

    def replay(
        self, model: AnyPath, trace: "Trace", **options: Unpack["ReplayArguments"]
    ) -> "Replayed | None":
        """Run a model expert-parallel and count every byte, as ``placer replay`` does.

        Every process of torchrun makes the call: one for each rank.

        Parameters
        ----------
        model
            The original model.
        trace
            The trace that contains the tokens to run.
        **options
            Those of ``placer replay``: :class:`placer.ReplayArguments`.

        Returns
        -------
        Replayed or None
            On the first process; ``None`` on the others.

        Raises
        ------
        PlacerError
            If plan, model, trace and table do not fit, or the model cannot be run so.
        UsageError
            If the processes are not as many as the ranks, or an option has no such value.
        """
        from placer.api.replaying import replay

        return replay(self, model, trace, **options)

    def check(
        self,
        source: "Trace | Affinity",
        *,
        tolerance: float = 0.02,
        **select: Unpack["SelectArguments"],
    ) -> "Checked":
        """Say whether traffic has drifted from the plan, as ``placer check`` does.

        Parameters
        ----------
        source
            Today's traffic: a trace, or counts, which only judge balance.
        tolerance
            How far a figure may rise: 0.02 allows 1.12 where the plan records 1.10.
        **select
            The tokens of a trace: :class:`placer.SelectArguments`.

        Raises
        ------
        PlacerError
            If plan and source are of different models, or there is nothing to compare.
        UsageError
            If ``tolerance`` is negative, or tokens of counts are selected.
        """
        from placer.api.checking import check

        return check(self, source, tolerance=tolerance, **select)

    def table(
        self,
        trace: "Trace",
        *,
        progress: Callable[[str], None] | None = None,
        **options: Unpack["TableArguments"],
    ) -> "Table":
        """Make the plan's token-shuffle table, as ``placer tables`` does.

        Parameters
        ----------
        trace
            A trace with token ids.
        progress
            Called with one line for each step.
        **options
            Those of ``placer tables``: :class:`placer.TableArguments`.

        Raises
        ------
        PlacerError
            If plan and trace are of different models, or the trace has no token ids.
        UsageError
            If an option is out of range.
        """
        from placer.api.table import make_table

        return make_table(self, trace, progress=progress, **options)

    def write(self, path: AnyPath, *, force: bool = False) -> Self:
        """Write ``plan.json``: the same plan gives the same bytes.

        Returns
        -------
        Plan
            The same plan, which has a path now.

        Raises
        ------
        PlacerError
            If the file exists and ``force`` is false.
        """
        file = Path(path)
        with writing(file, force=force, kinds=["plan"]):
            self.contents.write(file)
        return replace(self, path=file, sha256=plan_sha256(file))

    @contextmanager
    def as_file(self) -> Iterator[UsedFile]:
        """Yield its file, or a temporary one.

        Raises
        ------
        PlacerError
            If the file changed after it was opened.
        """
        if self.path is not None and self.sha256 is not None:
            require_unchanged(self.path, self.sha256)
            yield UsedFile(self.path)
            return
        with temporary_file("plan.json", self.contents.write, "PLAN") as file:
            yield file

    def _shape(self) -> Shape:
        from placer.api.plan_shape import shape_of_plan

        return shape_of_plan(self.contents, self.path)
