"""Proving that an exported checkpoint computes the same function.

Three checks, none of which uses the exporter's code: every tensor by name against the
permutation, logits on real text, and the routers' choices on that text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from placer.checkpoint.source import INDEX_NAME, RECORD_NAME, SINGLE_NAME
from placer.errors import PlacerError, VerificationError
from placer.files import read_json, sha256_file
from placer.model import Architecture, ModelSpec, name_pattern, require_same_model
from placer.plan import Placement, Plan
from placer.trace.capture import RouterCapture, RouterOutput
from placer.trace.record import load_model

if TYPE_CHECKING:
    import torch

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

# Renumbered experts are summed in another order, which changes the last bits of float32
# (2**-24 each); over all layers that stays below 1e-4 of the largest logit.
RELATIVE_TOLERANCE = 1e-4
# Experts whose router logits are closer than this are a tie: rounding decides between them.
TIE_LOGIT = 1e-4
SEQUENCE_LENGTH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """What was compared, and how far apart it was.

    Attributes
    ----------
    num_tensors, num_bytes
        Tensors found equal bit for bit under the permutation, and their bytes.
    num_tokens
        Tokens run through both models, in float32; 0 if none were asked for.
    max_logit_difference
        Largest absolute difference of a logit, or ``None``.
    tolerance
        What it had to stay under: 1e-4 of the largest absolute logit.
    num_routed_pairs
        (token, layer, expert) choices found to be exactly the permuted ones.
    num_ties
        Tokens at or behind a tie of router logits that the two models broke differently;
        their logits are not compared.
    """

    num_tensors: int
    num_bytes: int
    num_tokens: int
    max_logit_difference: float | None
    tolerance: float | None
    num_routed_pairs: int
    num_ties: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def verify(
    original: Path, exported: Path, plan_path: Path, texts: Sequence[str], max_tokens: int
) -> VerificationReport:
    """Compare an exported checkpoint with its original.

    Parameters
    ----------
    original, exported
        The two directories.
    plan_path
        The plan that was exported.
    texts
        Text to run both models on.
    max_tokens
        Most tokens to run; 0 compares tensors only.

    Raises
    ------
    VerificationError
        At the first difference.
    PlacerError
        If a directory cannot be read, or is of another model than the plan.
    """
    plan = Plan.read(plan_path)
    model = ModelSpec.from_checkpoint(original)
    require_same_model(plan.model, str(plan_path), model, str(original))
    require_same_model(
        model, str(original), ModelSpec.from_checkpoint(exported), str(exported)
    )
    _require_plan(exported, plan_path)
    config = read_json(original / "config.json", "model config")
    architecture = Architecture.of(config, original)
    num_tensors, num_bytes = _compare_tensors(
        original, exported, architecture, model, plan.placement
    )
    comparison = _Comparison(model, architecture, plan.placement)
    if max_tokens:
        comparison.run(original, exported, texts, max_tokens)
    return VerificationReport(
        num_tensors=num_tensors,
        num_bytes=num_bytes,
        num_tokens=comparison.num_tokens,
        max_logit_difference=comparison.max_difference if max_tokens else None,
        tolerance=comparison.tolerance if max_tokens else None,
        num_routed_pairs=comparison.num_routed_pairs,
        num_ties=comparison.num_ties,
    )


def _require_plan(exported: Path, plan_path: Path) -> None:
    record = read_json(exported / RECORD_NAME, "export record")
    if record.get("plan_sha256") != sha256_file(plan_path):
        raise VerificationError(
            f"{exported} was exported from another plan than {plan_path}: SHA-256 "
            f"{str(record.get('plan_sha256'))[:12]} against {sha256_file(plan_path)[:12]}",
            f"export it again: placer export checkpoint {plan_path} ORIGINAL --out NEW",
        )


def _compare_tensors(
    original: Path,
    exported: Path,
    architecture: Architecture,
    model: ModelSpec,
    placement: Placement,
) -> tuple[int, int]:
    where = {name: path for path in _shards(exported) for name in _names(path)}
    num_tensors, num_bytes = 0, 0
    for path in _shards(original):
        for name in _names(path):
            counterpart, rows = _counterpart(name, architecture, model, placement)
            if counterpart not in where:
                raise VerificationError(f"{exported} lacks {counterpart}, which is {name}")
            old, new = _read(path, name), _read(where.pop(counterpart), counterpart)
            expected = old if rows is None else old[rows]
            if new.dtype != old.dtype or new.shape != old.shape or not _same(new, expected):
                raise VerificationError(
                    f"{counterpart} of {exported} differs from {name} of {original}",
                    f"export it again: placer export checkpoint PLAN {original} --out NEW",
                )
            num_tensors, num_bytes = num_tensors + 1, num_bytes + old.nbytes
    if where:
        raise VerificationError(
            f"{exported} holds {min(where)}, which {original} does not have"
        )
    return num_tensors, num_bytes


def _counterpart(
    name: str, architecture: Architecture, model: ModelSpec, placement: Placement
) -> tuple[str, IntArray | None]:
    """Return the new name of a tensor, and the old row of each new row of a router."""
    ordinal = {layer: n for n, layer in enumerate(model.layer_ids or ())}
    for template in architecture.router_tensors:
        if found := name_pattern(template).fullmatch(name):
            return name, placement.physical_to_logical_map[ordinal[int(found["layer"])]]
    for template in architecture.expert_tensors:
        if found := name_pattern(template).fullmatch(name):
            row = placement.physical_to_logical_map[ordinal[int(found["layer"])]]
            new = int(np.flatnonzero(row == int(found["expert"]))[0])
            fields = {"layer": found["layer"], "expert": new, "name": found["name"]}
            return template.format(**fields), None
    return name, None


def _shards(directory: Path) -> list[Path]:
    if (directory / INDEX_NAME).is_file():
        index = read_json(directory / INDEX_NAME, "index")
        return [directory / name for name in sorted(set(index["weight_map"].values()))]
    return [directory / SINGLE_NAME]


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as opened:
            return sorted(opened.keys())
    except (SafetensorError, OSError) as error:
        raise PlacerError(
            f"shard {path} cannot be read: {error}", "export or fetch it again"
        ) from error


def _read(path: Path, name: str) -> "torch.Tensor":
    with safe_open(path, "pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor


def _same(one: "torch.Tensor", two: "torch.Tensor") -> bool:
    """Compare bits, so that NaN equals itself and zero has a sign."""
    import torch

    return bool(
        torch.equal(
            one.contiguous().view(-1).view(torch.uint8),
            two.contiguous().view(-1).view(torch.uint8),
        )
    )


class _Comparison:
    """Both models on the same text: logits and choices of the routers."""

    def __init__(
        self, model: ModelSpec, architecture: Architecture, placement: Placement
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.placement = placement
        self.num_tokens = 0
        self.num_routed_pairs = 0
        self.num_ties = 0
        self.max_difference = 0.0
        self.tolerance = 0.0

    def run(
        self, original: Path, exported: Path, texts: Sequence[str], max_tokens: int
    ) -> None:
        import torch

        old, tokenizer = load_model(original, dtype="float32", device="cpu")
        new, _ = load_model(exported, dtype="float32", device="cpu")
        layer_ids = self.model.layer_ids or ()
        with (
            torch.inference_mode(),
            RouterCapture(old, self.architecture, layer_ids) as old_routers,
            RouterCapture(new, self.architecture, layer_ids) as new_routers,
        ):
            for ids in _token_windows(tokenizer, texts, max_tokens):
                batch = torch.tensor([ids])
                before = old(input_ids=batch).logits[0].numpy()
                after = new(input_ids=batch).logits[0].numpy()
                flipped = self._compare_routing(old_routers.take(), new_routers.take())
                self._compare_logits(before, after, flipped)
        if not self.num_tokens:
            raise PlacerError(
                "there is no text to compare the models on", "give --corpus FILE"
            )

    def _compare_routing(
        self, before: list[RouterOutput], after: list[RouterOutput]
    ) -> BoolArray:
        """Return ``[T]``: whether a tie was broken otherwise at the token or before it."""
        flipped = np.zeros(len(before[0].ids), dtype=np.bool_)
        for layer, (old, new) in enumerate(zip(before, after, strict=True)):
            row = self.placement.physical_to_logical_map[layer]
            old_set = np.sort(old.ids.numpy(), axis=1)
            new_set = np.sort(row[new.ids.numpy()], axis=1)
            differs = (old_set != new_set).any(axis=1)
            # The original's own scores say whether the other choice was as good.
            scores = old.logits.float().numpy()
            worst_chosen = np.take_along_axis(scores, old_set, axis=1).min(axis=1)
            worst_other = np.take_along_axis(scores, new_set, axis=1).min(axis=1)
            wrong = differs & (worst_chosen - worst_other > TIE_LOGIT) & ~flipped
            if wrong.any():
                token = int(wrong.argmax())
                raise VerificationError(
                    f"MoE layer {layer}: token {self.num_tokens + token} of the text is "
                    f"routed to logical experts {new_set[token].tolist()}, "
                    f"by the original to {old_set[token].tolist()}",
                    "the export is not the same function: do not serve it",
                )
            flipped |= np.maximum.accumulate(differs)
            self.num_routed_pairs += int((~differs).sum()) * old_set.shape[1]
        self.num_ties += int(flipped.sum())
        return flipped

    def _compare_logits(
        self, before: npt.NDArray[Any], after: npt.NDArray[Any], flipped: BoolArray
    ) -> None:
        difference = np.abs(before - after).max(axis=1)
        difference[flipped] = 0
        self.tolerance = max(
            self.tolerance, RELATIVE_TOLERANCE * float(np.abs(before).max())
        )
        self.max_difference = max(self.max_difference, float(difference.max()))
        if not self.max_difference <= self.tolerance:
            raise VerificationError(
                f"logits of token {self.num_tokens + int(difference.argmax())} of the text "
                f"differ by {self.max_difference:.3g}, more than {self.tolerance:.3g}",
                "the export is not the same function: do not serve it",
            )
        self.num_tokens += len(before)


def _token_windows(
    tokenizer: Any, texts: Sequence[str], max_tokens: int
) -> Iterator[list[int]]:
    left = max_tokens
    for text in texts:
        ids = list(tokenizer(text, verbose=False)["input_ids"])[:left]
        for start in range(0, len(ids), SEQUENCE_LENGTH):
            yield ids[start : start + SEQUENCE_LENGTH]
        left -= len(ids)
        if left <= 0:
            return
