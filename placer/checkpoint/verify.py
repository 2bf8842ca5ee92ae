"""Proving that an exported checkpoint computes the same function.

Three checks: every tensor by name against the permutation, logits on real text, and the
routers' choices on that text. They share with the exporter the rules that say what a
tensor is by its name (``TensorLayout``), and nothing that permutes or writes; logits and
choices do not depend on those rules. A fourth one finds changes of all other bytes.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from placer.arrays import BoolArray, Float32Array, IntArray
from placer.checkpoint.export import prepare_restore
from placer.checkpoint.named_experts import description_files
from placer.checkpoint.record import ExportRecord
from placer.checkpoint.served_files import served_files
from placer.checkpoint.source import RECORD_NAME, CheckpointSource
from placer.checkpoint.tensor_files import read_tensor, tensor_files
from placer.errors import PlacerError, VerificationError
from placer.model import Architecture, ModelSpec, read_config, require_same_model
from placer.model.tensor_layout import TensorKind, TensorLayout, has_columns, is_of_all
from placer.placement import Placement, Plan
from placer.placement.all_layers import plan_of
from placer.run.files import read_bytes, read_text, sha256_file
from placer.run.progress import Progress, Steps
from placer.trace.capture import RouterCapture
from placer.trace.corpus import token_windows
from placer.trace.loading import load_model, require_embedded

if TYPE_CHECKING:
    import torch


# Renumbered experts are summed in another order, which changes the last bits of float32
# (2**-24 each); over all layers that stays below 1e-4 of the largest logit.
RELATIVE_TOLERANCE = 1e-4
SEQUENCE_LENGTH = 256
# A dotted name with the number of an expert, in the lists of quantisers.
_WITH_EXPERT = re.compile(r"(?:\w+\.)+experts\.\d+(?:\.\w+)*")
_NOT_THE_SAME = "the exported model computes other results: do not serve it"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """What was compared, and the largest difference.

    Attributes
    ----------
    num_tensors, num_bytes
        Tensors found equal bit for bit under the permutation, and their bytes.
    num_tokens
        Tokens run through both models, in float32; 0 if none were requested.
    max_logit_difference
        Largest absolute difference of a logit, or ``None``.
    tolerance
        What it had to stay under: 1e-4 of the largest absolute logit.
    num_routed_pairs
        (token, layer, expert) choices found to be exactly the permuted ones.
    num_ties
        Tokens at or after a tie of experts that the two models broke differently;
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
    original: Path,
    exported: Path,
    plan_path: Path,
    texts: Sequence[str],
    max_tokens: int,
    progress: Progress | None = None,
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
    progress
        Gets a line for each tensor, and for each text that a model runs on.

    Raises
    ------
    VerificationError
        At the first difference.
    PlacerError
        If a directory cannot be read, or is of another model than the plan.
    """
    plan = Plan.read(plan_path)
    model = ModelSpec.from_checkpoint(original)
    plan, _ = plan_of(plan, plan_path, model, original)
    require_same_model(
        model, str(original), ModelSpec.from_checkpoint(exported), str(exported)
    )
    _require_plan(exported, plan_path)
    for layer in range(model.num_layers):
        plan.placement.permutation(layer)
    config = read_config(original)
    architecture = Architecture.of(config, original)
    if max_tokens:
        architecture.require_recorded(original)
    num_tensors, num_bytes = _compare_tensors(
        original, exported, architecture.require_layout(), model, plan.placement, progress
    )
    _compare_named_experts(
        original, exported, architecture.require_layout(), model, plan.placement
    )
    _require_same_files(original, exported)
    comparison = _Comparison(plan.placement)
    if max_tokens:
        runs = _Runs(architecture, model, texts, max_tokens, progress)
        before = runs.run(original, with_ties=True)
        comparison.compare(before, runs.run(exported, with_ties=False))
    return VerificationReport(
        num_tensors=num_tensors,
        num_bytes=num_bytes,
        num_tokens=comparison.num_tokens,
        max_logit_difference=comparison.max_difference if max_tokens else None,
        tolerance=comparison.tolerance if max_tokens else None,
        num_routed_pairs=comparison.num_routed_pairs,
        num_ties=comparison.num_ties,
    )


def _require_same_files(original: Path, exported: Path) -> None:
    """Check headers, indexes and configs against the record, other files with the original.

    The record says what makes the original's headers, sizes and configs of those here.
    """
    job = prepare_restore(exported)
    source = CheckpointSource.open(original)
    found, expected = job.source.file_sha256, source.file_sha256
    for name in sorted((found.keys() ^ expected.keys()) - {RECORD_NAME}):
        raise VerificationError(
            f"{exported} {'lacks' if name in expected else 'has'} {name}, which {original} "
            f"{'has' if name in expected else 'does not have'}",
            _NOT_THE_SAME,
        )
    for name in sorted(expected.keys() - job.configs.keys()):
        if found[name] != expected[name]:
            raise VerificationError(
                f"{exported / name} is not that of {original}: SHA-256 {found[name][:12]} "
                f"against {expected[name][:12]}",
                _NOT_THE_SAME,
            )
    restored = {**{work.name: work.header for work in job.shards}, **job.configs}
    before = {shard.name: shard.header for shard in source.shards}
    before |= {name: read_bytes(original / name) for name in job.configs}
    for name, content in restored.items():
        if content != before.get(name):
            raise VerificationError(
                f"{name} restored from {exported} is not that of {original}",
                f"{original} changed after it was exported: export it again",
            )


def _require_plan(exported: Path, plan_path: Path) -> None:
    record, found = ExportRecord.read(exported), sha256_file(plan_path)
    if record.plan_sha256 != found:
        raise VerificationError(
            f"{exported} was exported from another plan than {plan_path}: SHA-256 "
            f"{record.plan_sha256[:12]} against {found[:12]}",
            f"export it again: placer export checkpoint {plan_path} ORIGINAL --out NEW",
        )


def _compare_tensors(
    original: Path,
    exported: Path,
    layout: TensorLayout,
    model: ModelSpec,
    placement: Placement,
    progress: Progress | None,
) -> tuple[int, int]:
    again = f"export it again: placer export checkpoint PLAN {original} --out NEW"
    where, unheld = tensor_files(exported, VerificationError)
    files, unheld_before = tensor_files(original, PlacerError)
    if unheld != unheld_before:
        raise VerificationError(
            f"{exported} and {original} have different names that only the index lists: "
            f"{min(unheld ^ unheld_before)} is in no file",
            again,
        )
    rows = {
        layer: (row, np.argsort(row).tolist())
        for layer, row in zip(
            model.layer_ids or (), placement.physical_to_logical_map, strict=True
        )
    }
    num_tensors, num_bytes = 0, 0
    steps = Steps(tell=progress, total=len(files), unit="tensor")
    for name, path in steps.each(files.items()):
        counterpart, kind, row = _counterpart(name, layout, rows)
        if counterpart not in where:
            raise VerificationError(
                f"{exported} lacks {counterpart}, which is {name} of {original}", again
            )
        old = read_tensor(path, name)
        new = read_tensor(where.pop(counterpart), counterpart)
        if row is not None and kind is TensorKind.ROUTER and has_columns(name, files):
            expected = _ordered_columns(old, row)
        else:
            alike = is_of_all(kind, name, old.shape)
            expected = _expected(old, kind, None if alike else row)
        if difference := _difference(expected, new):
            raise VerificationError(
                f"{counterpart} of {exported} differs from {name} of {original}: "
                + difference,
                again,
            )
        num_tensors, num_bytes = num_tensors + 1, num_bytes + old.nbytes
    if where:
        raise VerificationError(
            f"{exported} holds {min(where)}, which {original} does not have", again
        )
    return num_tensors, num_bytes


def _counterpart(
    name: str, layout: TensorLayout, rows: Mapping[int, tuple[IntArray, list[int]]]
) -> tuple[str, TensorKind | None, IntArray | None]:
    """Return the new name of a tensor, its kind, and the map row of its layer.

    ``rows`` has, by layer, the row and the new number of each expert.
    """
    place = layout.classify(name)
    if place is None or place.layer is None or place.layer not in rows:
        return name, None, None
    row, numbers = rows[place.layer]
    if place.expert is None:
        return name, place.kind, row
    number = str(numbers[place.expert]) if place.expert < len(numbers) else "?"
    return place.template.replace("{expert}", number), place.kind, row


def _expected(
    old: "torch.Tensor", kind: TensorKind | None, row: IntArray | None
) -> "torch.Tensor":
    """Return what the tensor must be, if new expert e is old expert ``row[e]``."""
    import torch

    if row is None or kind in (None, TensorKind.EXPERT, TensorKind.REST):
        return old
    if kind is TensorKind.TABLE:
        return torch.from_numpy(np.argsort(row))[old.long()].to(old.dtype)
    blocks = old.contiguous().view(-1).view(torch.uint8).reshape(len(row), -1)
    return blocks[row].reshape(-1).view(old.dtype).reshape(old.shape)


def _ordered_columns(old: "torch.Tensor", row: IntArray) -> "torch.Tensor":
    """Return a router of GPTQ with its columns in the order of the map row.

    Column e of ``qzeros`` is the e-th group of bits of a row, the lowest first.
    """
    import torch

    if old.shape[1] == len(row):
        return old[:, torch.from_numpy(row)]
    width = 32 * old.shape[1] // len(row)
    places = torch.arange(len(row)) * width
    words = old.long() & 0xFFFFFFFF
    fields = (words[:, places // 32] >> (places % 32)) & (2**width - 1)
    moved = fields[:, torch.from_numpy(row)] << (places % 32)
    packed = moved.reshape(len(old), old.shape[1], -1).sum(dim=2)
    return torch.where(packed < 2**31, packed, packed - 2**32).to(old.dtype)


def _compare_named_experts(
    original: Path,
    exported: Path,
    layout: TensorLayout,
    model: ModelSpec,
    placement: Placement,
) -> None:
    """Check that configs which name single experts name the same ones of the original."""
    row_of = dict(
        zip(model.layer_ids or (), placement.physical_to_logical_map, strict=True)
    )
    served, _ = served_files(original, set())
    for name in description_files(served):
        found = []
        for directory in (original, exported):
            path = directory / name
            text = read_text(path) if path.is_file() else ""
            experts: Counter[tuple[str, int]] = Counter()
            for word in _WITH_EXPERT.findall(text):
                place = layout.classify(word + ".weight") or layout.classify(
                    f"model.{word}.weight"
                )
                if place is None or place.expert is None or place.layer not in row_of:
                    continue
                logical = place.expert
                if directory == exported and logical < len(row_of[place.layer]):
                    logical = int(row_of[place.layer][logical])
                experts[place.template, logical] += 1
            found.append(experts)
        if odd := (found[0] - found[1]) + (found[1] - found[0]):
            template, logical = min(odd)
            raise VerificationError(
                f"{exported / name} and {original / name} differ for "
                f"{template.replace('{expert}', str(logical))} of the original",
                f"export it again: placer export checkpoint PLAN {original} --out NEW",
            )


def _difference(old: "torch.Tensor", new: "torch.Tensor") -> str | None:
    """Say how ``new`` differs from what it must be, ``None`` if it does not."""
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return f"{new.dtype} {list(new.shape)} against {old.dtype} {list(old.shape)}"
    different = (_bytes(old) != _bytes(new)).nonzero()
    return f"first at byte {int(different[0])}" if len(different) else None


def _bytes(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return the bytes of a tensor: NaN is then equal to itself, in any dtype."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Output:
    """What a model makes of one window of T tokens.

    Attributes
    ----------
    logits
        ``[T, V]`` float32.
    chosen
        Per MoE layer ``[T, k]``: ids of the chosen experts.
    shares
        Per MoE layer ``[T, E]`` float32: in which share of nudges an expert is chosen
        (see :class:`~placer.trace.capture.RouterOutput`); empty where not requested.
    """

    logits: Float32Array
    chosen: tuple[IntArray, ...]
    shares: tuple[Float32Array, ...]


class _Runs:
    """The same text through one model after the other, never two in memory at once."""

    def __init__(
        self,
        architecture: Architecture,
        spec: ModelSpec,
        texts: Sequence[str],
        max_tokens: int,
        progress: Progress | None,
    ) -> None:
        self.architecture, self.spec = architecture, spec
        self.texts, self.max_tokens = texts, max_tokens
        self.progress = progress
        self.windows: list[list[int]] | None = None

    def run(self, directory: Path, *, with_ties: bool) -> list[_Output]:
        """Run a model in float32 over windows that the first model's tokenizer cuts."""
        import torch

        model, tokenizer = load_model(directory, dtype="float32", device="cpu")
        if self.windows is None:
            self.windows = list(
                token_windows(tokenizer, self.texts, self.max_tokens, SEQUENCE_LENGTH)
            )
        outputs = []
        steps = Steps(tell=self.progress, total=len(self.windows), unit="text")
        with (
            torch.inference_mode(),
            RouterCapture(
                model, self.architecture, self.spec, with_ties=with_ties
            ) as routers,
        ):
            for ids in steps.each(self.windows, lambda _: f"run {directory}"):
                require_embedded(ids, model, directory)
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
                taken = routers.take()
                outputs.append(
                    _Output(
                        logits=logits.numpy(),
                        chosen=tuple(one.ids.numpy() for one in taken),
                        shares=tuple(
                            one.shares.numpy() for one in taken if one.shares is not None
                        ),
                    )
                )
        return outputs


class _Comparison:
    """Figures of the comparison, gathered window by window."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.num_tokens = 0
        self.num_routed_pairs = 0
        self.num_ties = 0
        self.max_difference = 0.0
        self.tolerance = 0.0

    def compare(self, before: list[_Output], after: list[_Output]) -> None:
        largest = max((float(np.abs(one.logits).max()) for one in before), default=None)
        if largest is None:
            raise PlacerError(
                "there is no text to compare the models on", "give --corpus FILE"
            )
        self.tolerance = RELATIVE_TOLERANCE * largest
        for old, new in zip(before, after, strict=True):
            flipped = self._compare_routing(old, new)
            self._compare_logits(old, new, flipped)
            self.num_tokens += len(flipped)
        if self.num_ties == self.num_tokens:
            raise PlacerError(
                f"nothing was compared: at or before each of the {self.num_tokens} tokens "
                "the two models chose differently between experts of equal router weight",
                "give other text with --corpus, or compare tensors only: --max-tokens 0",
            )

    def _compare_routing(self, before: _Output, after: _Output) -> BoolArray:
        """Return ``[T]``: whether a tie was broken differently at or before the token."""
        flipped = np.zeros(len(before.logits), dtype=np.bool_)
        for layer, shares in enumerate(before.shares):
            row = self.placement.physical_to_logical_map[layer]
            old, new = before.chosen[layer], row[after.chosen[layer]]
            differs = (np.sort(old, axis=1) != np.sort(new, axis=1)).any(axis=1)
            wrong = differs & ~_tied(shares, old, new) & ~flipped
            if wrong.any():
                token = int(wrong.argmax())
                raise VerificationError(
                    f"MoE layer {layer}: token {self.num_tokens + token} of the text is "
                    f"routed to logical experts {sorted(new[token].tolist())}, "
                    f"by the original to {sorted(old[token].tolist())}",
                    _NOT_THE_SAME,
                )
            flipped |= np.maximum.accumulate(differs)
            self.num_routed_pairs += int((~differs).sum()) * old.shape[1]
        self.num_ties += int(flipped.sum())
        return flipped

    def _compare_logits(self, before: _Output, after: _Output, flipped: BoolArray) -> None:
        difference = np.abs(before.logits - after.logits).max(axis=1)
        difference[flipped] = 0
        # Written so that NaN, which is not larger than anything, fails.
        wrong = ~(difference <= self.tolerance)
        if wrong.any():
            token = int(wrong.argmax())
            raise VerificationError(
                f"logits of token {self.num_tokens + token} of the text differ by "
                f"{difference[token]:.3g}, more than {self.tolerance:.3g}",
                _NOT_THE_SAME,
            )
        self.max_difference = max(self.max_difference, float(difference.max()))


def _tied(shares: Float32Array, old: IntArray, new: IntArray) -> BoolArray:
    """Return ``[T]``: whether choosing ``new`` instead of ``old`` is a matter of rounding.

    By nudges of the original's own router, no expert left out must be sure to be chosen,
    and no expert taken instead sure not to be.
    """
    in_old, in_new = (np.zeros(shares.shape, dtype=np.bool_) for _ in range(2))
    np.put_along_axis(in_old, old, True, axis=1)
    np.put_along_axis(in_new, new, True, axis=1)
    left_out_wrongly = in_old & ~in_new & ~(shares < 1)
    taken_wrongly = in_new & ~in_old & ~(shares > 0)
    tied: BoolArray = ~np.any(left_out_wrongly | taken_wrongly, axis=1)
    return tied
