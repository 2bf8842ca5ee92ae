"""The caps of a goal: on rank load, on homes and on received copies."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np

from placer.errors import NoSolutionError, UsageError, require_amount

#: The cap on max/mean rank load where none is given.
MAX_IMBALANCE = 1.10

_TOLERANCE = 1e-9  # of a cap on max/mean

Layer = TypeVar("Layer", int, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """The caps that every layer of a plan keeps.

    Attributes
    ----------
    max_imbalance
        Cap on max/mean rank load; ``None`` for :data:`MAX_IMBALANCE`, or the best reachable
        in layers where that is out of reach.
    max_home_imbalance
        Cap on max/mean tokens per home rank, for ``follow`` and ``token``, or ``None``.
    max_received_copies
        Cap on R x the copies that a rank receives per token, for ``fixed`` and ``follow``,
        or ``None``.
    below_eplb
        Cap the load of every layer at what EPLB with as many slots has on the profile,
        where that is below ``max_imbalance``.
    relax
        Take the best reachable value in layers where a ``max_imbalance`` that is given, or
        ``max_received_copies``, is out of reach.

    Raises
    ------
    UsageError
        If a cap is out of range.
    """

    max_imbalance: float | None = None
    max_home_imbalance: float | None = None
    max_received_copies: float | None = None
    below_eplb: bool = False
    relax: bool = False

    def __post_init__(self) -> None:
        require_amount("--max-imbalance", self.load_cap)
        if self.load_cap < 1:
            raise UsageError(
                f"--max-imbalance is max/mean rank load, at least 1, got {self.load_cap:g}",
                "for example --max-imbalance 1.1",
            )
        homes, received = self.max_home_imbalance, self.max_received_copies
        if homes is not None and not 1 < homes < float("inf"):
            raise UsageError(
                f"--max-home-imbalance must be above 1, got {homes:g}",
                "choose for example --max-home-imbalance 1.5",
            )
        if received is not None and not 0 < received < float("inf"):
            raise UsageError(
                f"--max-received-copies must be above 0, got {received:g}",
                "choose it from the bottleneck_rank_copies_per_token of a plan without "
                "this cap",
            )

    def require_fit(self, policy: str) -> None:
        """Refuse caps that have no effect for a home policy.

        Raises
        ------
        UsageError
            If there is such a cap.
        """
        homes, received = self.max_home_imbalance, self.max_received_copies
        if homes is not None and policy not in ("follow", "token"):
            raise UsageError(
                f"--max-home-imbalance {homes:g} has no effect for --policy {policy}: "
                "the request router balances the homes of whole sequences",
                "drop it, or solve for --policy follow or token",
            )
        if received is not None and policy in ("token", "request"):
            raise UsageError(
                f"--max-received-copies {received:g} cannot be kept for --policy "
                f"{policy}: received copies depend on homes of a table that is built "
                "after the solve",
                "use --receive-price instead, or solve for --policy fixed or follow",
            )

    @property
    def load_cap(self) -> float:
        """The cap on max/mean rank load, given or not.

        Only what turns it into pairs of a layer and what records it read this number.
        """
        return MAX_IMBALANCE if self.max_imbalance is None else self.max_imbalance

    @property
    def gives_load_cap(self) -> bool:
        """Whether a cap on load is asked for."""
        return self.max_imbalance is not None

    @property
    def leaves_eplb(self) -> bool:
        """Whether no cap is given that EPLB does not know."""
        return not self.gives_load_cap and self.max_received_copies is None

    @property
    def relaxes_load_cap(self) -> bool:
        """Whether to use the best reachable if the load cap is out of reach."""
        return self.relax or not self.gives_load_cap

    def most_load(self, pairs: float, num_ranks: int) -> float:
        """Return the pairs that a rank may serve of a layer's ``pairs``."""
        return self.load_cap * pairs / num_ranks

    def most_homes(self, num_tokens: int, num_ranks: int) -> float | None:
        """Return the tokens that a rank may be home to, or ``None`` for any number."""
        if self.max_home_imbalance is None:
            return None
        return self.max_home_imbalance * num_tokens / num_ranks

    def tightened(self, share: float) -> float:
        """Return a load cap that allows a share of this one's imbalance; 1: this one."""
        if share == 1:
            return self.load_cap
        return round(1 + share * (self.load_cap - 1), 6)

    def under(self, load_cap: float, *, relax: bool = True) -> Self:
        """Return the same with another cap on load."""
        return replace(self, max_imbalance=load_cap, relax=relax)

    @property
    def without_homes(self) -> Self:
        """The same without the cap on homes."""
        return replace(self, max_home_imbalance=None)

    @property
    def without_received(self) -> Self:
        """The same without the cap on received copies."""
        return replace(self, max_received_copies=None)

    def require_no_load_cap(self, option: str) -> None:
        """Refuse a cap on load next to an option that has its own caps.

        Raises
        ------
        UsageError
            If one is given.
        """
        if self.max_imbalance is not None:
            raise UsageError(
                f"--max-imbalance {self.max_imbalance:g} is one load cap, {option} has its "
                "own",
                "drop one of them",
            )

    def require_no_receive_cap(self, company: str) -> None:
        """Refuse a cap on received copies; ``company`` names the option that lacks it.

        Raises
        ------
        UsageError
            If one is given.
        """
        if self.max_received_copies is not None:
            raise UsageError(
                f"--max-received-copies {self.max_received_copies:g} cannot be used with "
                f"{company}",
                "drop it, or solve with --objective traffic",
            )

    @property
    def given_for_tokens(self) -> dict[str, bool]:
        """The options of caps that need tokens, and whether each is given."""
        return {
            "--max-home-imbalance": self.max_home_imbalance is not None,
            "--max-received-copies": self.max_received_copies is not None,
        }

    def missed_load(self, imbalance: Mapping[Layer, float]) -> dict[Layer, float]:
        """Return the layers above the cap on load, with the imbalance that they reached."""
        return {
            layer: float(value)
            for layer, value in imbalance.items()
            if value > self.load_cap + _TOLERANCE
        }

    def excess(self, load: Collection[float], received: Collection[float]) -> float:
        """Return by what share layers exceed their caps, summed over layers and caps.

        ``load`` and ``received`` are what the layers reached that miss each cap.
        """
        total = sum(value / self.load_cap - 1 for value in load)
        if self.max_received_copies is not None:
            total += sum(value / self.max_received_copies - 1 for value in received)
        return total

    def require_load(
        self,
        reached: Collection[float],
        num_layers: int,
        *,
        company: str,
        other_way: str,
        stopped: bool = False,
    ) -> None:
        """Refuse layers above the cap on load, unless it may be relaxed.

        Parameters
        ----------
        reached
            The imbalance of the layers above the cap.
        num_layers
            Of the plan.
        company
            With what they reached it, in words.
        other_way
            What else would bring them under the cap, in words.
        stopped
            Whether the search was.

        Raises
        ------
        NoSolutionError
            If there are such layers.
        """
        if not reached or self.relaxes_load_cap:
            return
        option = f"--max-imbalance {self.load_cap}"
        raise NoSolutionError(
            _missed(option, reached, num_layers, company, stopped=stopped),
            f"take the best reached with --relax-cap, {other_way}, or ask for "
            f"--max-imbalance {_rounded_up(reached)}",
        )

    def require_received(
        self, reached: Collection[float], num_layers: int, *, stopped: bool
    ) -> None:
        """Refuse layers above the cap on received copies, unless it may be relaxed.

        Parameters and errors are those of :meth:`require_load`.
        """
        if not reached or self.relax:
            return
        option = f"--max-received-copies {self.max_received_copies:g}"
        company = f"under --max-imbalance {self.load_cap:g}"
        raise NoSolutionError(
            _missed(option, reached, num_layers, company, stopped=stopped),
            "take the best reached with --relax-cap, ask for --max-received-copies "
            f"{_rounded_up(reached)}, or allow a higher --max-imbalance",
        )

    @property
    def words(self) -> list[str]:
        """The cap on load as words of a command, if it is given."""
        if self.max_imbalance is None:
            return []
        return ["--max-imbalance", f"{self.max_imbalance:g}"]

    def to_json(self) -> dict[str, Any]:
        """Return what a plan records of its caps."""
        return {
            "relax_cap": self.relax,
            "max_imbalance_given": self.gives_load_cap,
            "max_home_imbalance": self.max_home_imbalance,
            "max_received_copies": self.max_received_copies,
        }


def _missed(
    option: str,
    reached: Collection[float],
    num_layers: int,
    company: str,
    *,
    stopped: bool,
) -> str:
    when = ", when the search was stopped" if stopped else ""
    return (
        f"{option} was not reached in {len(reached)} of {num_layers} MoE layers "
        f"{company}{when}; worst {max(reached):.4f}"
    )


def _rounded_up(reached: Collection[float]) -> str:
    """Return a cap in thousandths that the worst layer keeps."""
    return f"{np.ceil(max(reached) * 1000) / 1000:g}"
