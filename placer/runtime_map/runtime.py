"""The input of every runtime map, and the interface of a map format."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from placer.errors import PlacerError
from placer.model import Architecture, ModelSpec, read_config
from placer.placement import Placement, Plan
from placer.placement.all_layers import plan_of


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSource:
    """A plan and the model that it is for.

    Attributes
    ----------
    plan_path, directory
        Where they are; the model is ``None`` for formats that need none.
    plan
        The plan.
    model
        Shape of the routing: the model's, or the plan's own where no model was given.
    architectures
        What the model's config names itself.
    num_hidden_layers, num_mtp_layers
        Hidden layers, dense ones included, and multi-token-prediction layers after them;
        0 without a model.
    warning
        A warning if only shapes were compared, or ``None``.
    any_integers
        Whether ids in arrays may be of any integer type: at import. Engines and programs
        that index with them need int64.
    """

    plan_path: Path
    directory: Path | None
    plan: Plan
    model: ModelSpec
    architectures: tuple[str, ...] = ()
    num_hidden_layers: int = 0
    num_mtp_layers: int = 0
    warning: str | None = None
    any_integers: bool = False

    @classmethod
    def read(cls, plan_path: Path, directory: Path | None) -> Self:
        """Read plan and config.

        Raises
        ------
        PlacerError
            If one of them cannot be read, or they are of different models.
        """
        return cls.of(plan_path, Plan.read(plan_path), directory)

    @classmethod
    def of(cls, plan_path: Path, plan: Plan, directory: Path | None) -> Self:
        """Return a plan that was read, and its model.

        Raises
        ------
        PlacerError
            If the config cannot be read, or is of another model.
        """
        if directory is None:
            return cls(
                plan_path=plan_path,
                directory=None,
                plan=plan,
                model=plan.model,
            )
        model = ModelSpec.from_checkpoint(directory)
        plan, warning = plan_of(plan, plan_path, model, directory)
        config = read_config(directory)
        architecture = Architecture.of(config, directory)
        return cls(
            plan_path=plan_path,
            directory=directory,
            plan=plan,
            model=model,
            architectures=tuple(config.get("architectures") or ()),
            num_hidden_layers=architecture.num_hidden_layers(config),
            num_mtp_layers=len(architecture.mtp_layers(config)),
            warning=warning,
        )

    @property
    def placement(self) -> Placement:
        """The plan's placement."""
        return self.plan.placement

    def checkpoint_command(self, plan: str | None = None) -> str:
        """Return the command that writes a permuted checkpoint, of ``plan`` if given."""
        path = self.plan_path if plan is None else plan
        words = ("checkpoint", path, self.directory or "MODEL", "--out", "DIR")
        return shlex.join(("placer", "export", *map(str, words)))

    def uniform_rows(self, runtime: str) -> list[list[int]]:
        """Return one row of slots per MoE layer, all of one length.

        Raises
        ------
        PlacerError
            If layers differ in slots or experts, which ``runtime`` cannot read.
        """
        rows = self.placement.to_json()
        widths = sorted({len(row) for row in rows})
        experts = sorted(set(self.placement.num_experts))
        if len(widths) > 1 or len(experts) > 1:
            raise PlacerError(
                f"{runtime}'s map needs the same number of slots in every layer, got "
                f"{widths} for {experts} experts",
                "solve with --redundant-experts 0. If layers have different numbers of "
                f"experts, serve a permuted checkpoint: {self.checkpoint_command()}",
            )
        return rows

    def filler(self) -> list[int]:
        """Return a valid row for a layer that the plan does not place."""
        row: list[int] = self.placement.filler_row().tolist()
        require_valid_rows([row], self.placement.num_experts[:1], self.placement.num_ranks)
        return row


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedMap:
    """The content of a map, without its plan.

    Attributes
    ----------
    rows
        Experts in the slots of each layer.
    layer_ids
        The model's own number of the layer of each row; ``None`` where it does not say.
    of_hidden_layers
        Whether there is a row for every hidden layer, dense ones included.
    num_experts
        Experts of each layer, or ``None``.
    model
        The model, or ``None``.
    """

    rows: Sequence[Sequence[int]]
    layer_ids: tuple[int, ...] | None = None
    of_hidden_layers: bool = False
    num_experts: tuple[int, ...] | None = None
    model: ModelSpec | None = None

    def placed_layers(self, model: ModelSpec) -> Sequence[int]:
        """Return the rows of the model's MoE layers.

        Raises
        ------
        PlacerError
            If one is missing.
        """
        ids = model.layer_ids or ()
        rows: Sequence[int] = range(len(self.rows))
        if self.of_hidden_layers:
            rows = ids
        elif self.layer_ids is not None:
            place = {layer: row for row, layer in enumerate(self.layer_ids)}
            rows = [place.get(layer, len(self.rows)) for layer in ids]
        if len(rows) != len(ids) or max(rows, default=0) >= len(self.rows):
            raise PlacerError(
                f"it has {len(self.rows)} layers, and the model's MoE layers are {[*ids]}"
            )
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One format of maps.

    Attributes
    ----------
    needs_model
        Whether it needs the model, and not only the plan.
    write
        Writes the map of a source to a path, in the format of a suffix.
    read
        Reads a map and checks it by the runtime's own rules; returns one row of slots per
        MoE layer. Raises :class:`PlacerError` where a rule is broken.
    parse
        Reads a map without a plan, from a path in the format of a suffix.
    family
        Name of the engine's family, ``None`` where the format belongs to no engine.
    status
        Who reads the file, where no released engine does; else ``None``.
    """

    needs_model: bool
    write: Callable[[MapSource, Path, str], None]
    read: Callable[[MapSource, Path, str], Sequence[Sequence[int]]]
    parse: Callable[[Path, str], ParsedMap]
    family: str | None = None
    status: str | None = None


def require_valid_rows(
    rows: Sequence[Sequence[int]], num_experts: Sequence[int], num_ranks: int
) -> Placement:
    """Return the rows as a placement.

    Raises
    ------
    PlacerError
        If slots do not divide over the ranks, an expert has no slot or does not exist, or
        a rank holds two replicas of one expert.
    """
    return Placement.from_json(rows, num_experts, num_ranks, 1)


def whole_number(value: Any) -> Any:
    """Return a text of up to nine digits as a number, anything else as it is."""
    is_text = isinstance(value, str) and value.isascii() and value.isdecimal()
    return int(value) if is_text and len(value) < 10 else value


def require_integers(values: Any, what: str) -> list[int]:
    """Return a list of integers that a file holds, or refuse it as ``what``.

    Raises
    ------
    PlacerError
        If the value is not a list of whole numbers of at most 31 bits.
    """
    if not isinstance(values, list) or not all(type(one) is int for one in values):
        raise PlacerError(f"{what} is not a list of whole numbers")
    if any(abs(one) >= 1 << 31 for one in values):
        raise PlacerError(f"{what} holds a number of more than 31 bits")
    return values


def require_rows(values: Any, what: str) -> list[list[int]]:
    """Return lists of integers that a file holds, or refuse them as ``what``.

    Raises
    ------
    PlacerError
        If the value is not a list of such lists.
    """
    if not isinstance(values, list) or not values:
        raise PlacerError(f"{what} is not a list of layers")
    return [require_integers(row, f"{what}, row {n}") for n, row in enumerate(values)]


def require_same_width(rows: Sequence[Sequence[int]], num_slots: int, what: str) -> None:
    """Refuse rows that do not all have ``num_slots`` slots.

    Raises
    ------
    PlacerError
        With the first row that has another number.
    """
    for number, row in enumerate(rows):
        if len(row) != num_slots:
            raise PlacerError(f"{what} {number} has {len(row)} slots, not {num_slots}")
