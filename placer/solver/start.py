"""Where a solve starts, and what it must leave as it is."""

from dataclasses import dataclass
from typing import Any

from placer.errors import UsageError, require_amount
from placer.placement.pins import Pin, with_pins
from placer.placement.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The placement to start from, and what stays.

    Attributes
    ----------
    placement
        A placement to improve, or ``None``.
    migration_cost
        Copies, over the profile, that moving one expert from where it is in ``placement``
        is worth; where load is balanced, pairs of its layer's busiest rank.
    pins
        Experts that stay on a rank.
    preserve_groups
        Keep router groups whole: each on ranks of its own, or several on a rank. Without
        redundant experts a permuted checkpoint can express the plan.
    ignore_groups
        Split router groups over nodes where balancing would keep them whole.

    Raises
    ------
    UsageError
        If one of these excludes another.
    """

    placement: Placement | None = None
    migration_cost: float = 0.0
    pins: tuple[Pin, ...] = ()
    preserve_groups: bool = False
    ignore_groups: bool = False

    def __post_init__(self) -> None:
        require_amount("--migration-cost", self.migration_cost)
        if self.migration_cost and self.placement is None:
            raise UsageError(
                f"--migration-cost {self.migration_cost:g} is the cost of leaving a plan, "
                "but no plan is given",
                "give the plan that is served now: --start PLAN",
            )
        if self.preserve_groups and self.ignore_groups:
            raise UsageError(
                "--preserve-groups and --ignore-groups exclude each other",
                "give one of the two",
            )
        if self.preserve_groups and self.placement is not None:
            raise UsageError(
                "--preserve-groups makes a new placement, and --start improves an old one",
                "drop one of them",
            )
        if self.preserve_groups and self.pins:
            raise UsageError(
                "--pin may split the groups that --preserve-groups keeps whole",
                "drop one of them",
            )

    @property
    def constrains(self) -> bool:
        """Whether what is solved may start above the load cap."""
        return self.placement is not None or bool(self.pins) or self.preserve_groups

    def pinned(self, placement: Placement) -> Placement:
        """Return a placement with the pinned experts on their ranks.

        Raises
        ------
        UsageError
            If a pin cannot be met.
        """
        return with_pins(placement, self.pins)

    @property
    def pinned_placement(self) -> Placement | None:
        """The placement to improve, its pins met, or ``None``."""
        return None if self.placement is None else self.pinned(self.placement)

    def to_json(self) -> dict[str, Any]:
        """Return what a plan records of its start."""
        return {
            "pins": [str(pin) for pin in self.pins],
            "preserve_groups": self.preserve_groups,
            "ignore_groups": self.ignore_groups,
        }
