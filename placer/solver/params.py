"""The effort and the constants of the search, all in one place.

Counts of steps, never seconds: the same parameters and seed give the same plan.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from placer.errors import PlacerError, UsageError
from placer.run.documents import parse_toml
from placer.run.files import read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverParams:
    """The effort and the constants of the search.

    Attributes
    ----------
    num_rounds
        Search over pairs: shakes after the first descent.
    tabu_steps
        Search over pairs: swaps tried in one visit of a layer.
    exact_operations
        Most operations of an exact solution before local search takes its place.
    num_sweeps
        Search over copies: visits of every layer while the temperature falls; 0 leaves the
        whole search over copies out.
    num_starts
        Under ``fixed``, where no layer's price depends on another's: most times to anneal
        from the start, each layer keeping its best; fewer where ``num_visited_tokens``
        would not let each of them try all moves. With replicas, which give many more
        moves to choose from, one annealing with so many times the sweeps, and tokens.
    num_tokens
        Most tokens to judge copies by; of longer profiles whole sequences are sampled.
    num_visited_tokens
        Most tokens that all proposals together may look at, except those that repair.
    first_temperature
        Of annealing, as a share of a layer's price.
    cooling
        The last temperature over the first.
    num_repairs
        Most visits of a layer that is above a cap after the search.
    share_of_repair
        Share of a time limit that is kept for these visits.
    num_resamples
        Resampled loads of ``--robust bootstrap``.
    home_price
        Copies that a token above ``--max-home-imbalance`` is worth. A swap moves thousands
        of copies to move hundreds of homes: at 4 copies a token, most layers of
        gpt-oss-20b stay above a cap that they meet at 30.
    num_alternations
        Times that homes and placement are improved in turn, where a table gives the homes.
    num_parts
        Parts of the sequences; the table of all parts but one gives that one its homes.
    served_price
        Copies that a pair served at home is worth when placements for tables are compared.
        Moves are not made for it: what that gains on the profile is lost on other
        sequences (``docs/tables_measured.md``).
    request_imbalance
        Cap on a rank's share of the requests that a placement for ``request`` is made for.
    num_hurried_tokens
        Tokens whose homes are found by tables once a time limit has passed.
    caution_of_tables
        What a replica counts at first of the load that it might serve beyond its share,
        where a table for ``token`` gives the homes.
    least_caution
        The smallest caution of a layer that was above its cap under none.
    cautions_of_draws
        The caution of each placement that is made for draws, one from the other; at the
        end each layer is taken from the best of them.
    cautions_of_repairs
        Of repairing under homes and draws that are known afterwards, one after the other.
    quick_proof, full_proof
        Steps of the certificate of pairs, and rounds of that of copies.
    """

    num_rounds: int = 30
    tabu_steps: int = 60
    exact_operations: float = 2e10
    num_sweeps: int = 16
    num_starts: int = 4
    num_tokens: int = 65_536
    num_visited_tokens: int = 2_000_000_000
    first_temperature: float = 2e-3
    cooling: float = 1 / 30
    num_repairs: int = 8
    share_of_repair: float = 0.2
    num_resamples: int = 64
    home_price: float = 30.0
    num_alternations: int = 4
    num_parts: int = 4
    served_price: float = 1.0
    request_imbalance: float = 1.1
    num_hurried_tokens: int = 2048
    caution_of_tables: float = 0.3
    least_caution: float = 0.1
    cautions_of_draws: tuple[float, ...] = (1.0, 0.5, 0.25, 0.12, 0.0)
    cautions_of_repairs: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4, 0.8, 1.0)
    quick_proof: tuple[int, ...] = (40, 20)
    full_proof: tuple[int, ...] = (300, 200)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            default: Any = field.default
            if isinstance(default, tuple):
                number: type = type(default[0])
                good = isinstance(value, tuple) and all(_is_a(number, v) for v in value)
                if field.name.endswith("_proof"):
                    good = good and len(value) == len(default)
            else:
                good = _is_a(type(default), value)
            if not good:
                raise UsageError(
                    f"parameter {field.name} is {value!r}, which is out of range",
                    "give a value that is not negative, of the kind of its default, "
                    f"{default!r}",
                )
        self._require_ranges()

    def _require_ranges(self) -> None:
        for name in ("num_starts", "num_tokens", "num_alternations", "num_parts"):
            if not getattr(self, name):
                raise UsageError(f"parameter {name} must be at least 1, got 0")
        shares = {
            "share_of_repair": self.share_of_repair,
            "caution_of_tables": self.caution_of_tables,
            "least_caution": self.least_caution,
            "cautions_of_draws": max(self.cautions_of_draws, default=0.0),
            "cautions_of_repairs": max(self.cautions_of_repairs, default=0.0),
        }
        for name, share in shares.items():
            if share > 1:
                raise UsageError(f"parameter {name} must be between 0 and 1, got {share:g}")
        for name in ("first_temperature", "cooling"):
            if not getattr(self, name):
                raise UsageError(f"parameter {name} must be above 0, got 0")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a TOML file of some of the parameters; the others keep their defaults.

        Raises
        ------
        PlacerError
            If the file is not valid TOML, or not there.
        UsageError
            If it names what is not a parameter, or gives it a value that cannot be meant.
        """
        where = f"parameter file {path}"
        try:
            given = parse_toml(read_bytes(path, what="parameter file"), where)
        except PlacerError as error:
            again = "write one parameter per line, for example: num_sweeps = 32"
            raise PlacerError(error.message, again) from error
        known = {field.name for field in fields(cls)}
        for name in given:
            if name not in known:
                raise UsageError(
                    f"parameter file {path} gives {name[:60]}, which is not a parameter",
                    f"choose among {', '.join(sorted(known))}",
                )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
        }
        return cls(**values)

    def with_given(self, values: Mapping[str, Any]) -> Self:
        """Return the same with other values, of those that are not ``None``."""
        return replace(self, **{n: v for n, v in values.items() if v is not None})

    def changed(self) -> dict[str, Any]:
        """Return the parameters that are not at their defaults."""
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        }


def _is_a(number: type, value: object) -> bool:
    """Return whether a value is a number of a type, finite and not negative."""
    kinds = (int,) if number is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        return False
    return math.isfinite(value) and value >= 0
