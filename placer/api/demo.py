"""``placer.run_demo``: every step on the small model that comes with placer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placer.api.files import AnyPath, as_path, note, writing
from placer.api.shown import Shape, Shown, TitledTable
from placer.demo.road import NUM_RANKS, POLICIES, DemoReport, shipped_model
from placer.demo.road import run_demo as walk
from placer.report.comparison import comparison_table
from placer.simulation.sent import Wire


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Demo(Shown):
    """What the demo found: :func:`placer.run_demo` makes one.

    Attributes
    ----------
    out
        The directory.
    contents
        What the rest of placer works with; not part of the stable API.
    """

    out: Path
    contents: DemoReport

    @property
    def files(self) -> Mapping[str, str]:
        """What was written, by meaning."""
        found = self.contents.files.items()
        return {name: str(self.out / path) for name, path in found}

    @property
    def proof(self) -> str:
        """What was verified of the exported checkpoint."""
        found = self.contents.verification
        return (
            f"Verified: {found.num_tensors} tensors equal bit for bit, "
            f"{found.num_routed_pairs} routed pairs exactly permuted "
            f"({found.num_ties} tokens left out, at or after a tie of two experts), "
            f"largest difference of a logit {found.max_logit_difference:.1g} (allowed "
            f"{found.tolerance:.1g})."
        )

    def tables(self) -> list[TitledTable]:
        """Return what ``placer demo`` shows: figures on held-out text."""
        columns, rows = comparison_table(self.contents.figures, POLICIES, Wire())
        return [(f"\nHeld-out text, {NUM_RANKS} ranks:\n", columns, rows)]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that ``placer demo --json`` prints."""
        return {
            "figures": self.contents.figures,
            "verification": self.contents.verification.to_json(),
            "files": dict(self.files),
        }

    def _shape(self) -> Shape:
        ((title, columns, rows),) = self.tables()
        return Shape(
            title=str(title).strip(),
            facts=self.files,
            columns=columns,
            rows=rows,
            lines=[self.proof],
        )


def run_demo(
    out: AnyPath = "placer-demo", *, model: AnyPath | None = None, force: bool = False
) -> Demo:
    """Run every step on a small model, as ``placer demo`` does.

    Parameters
    ----------
    out
        The directory to write.
    model
        The model; by default the one that comes with placer.
    force
        Whether an earlier demo at ``out`` is replaced.

    Raises
    ------
    PlacerError
        If ``out`` exists, or the model cannot be run.
    VerificationError
        If the exported checkpoint is not the same function.
    """
    place, directory = Path(out), as_path(model) or shipped_model()
    with writing(place, [directory], force=force, kinds=[], directory=True):
        return Demo(place, walk(directory, place, note))
