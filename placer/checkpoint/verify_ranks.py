"""Proof that the directories of an export by ranks hold what the plan gives each rank."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from placer.checkpoint.ranks import (
    RANK_NAME,
    RankRecord,
    RanksJob,
    RoutedTensors,
    index_text,
    prepare_ranks,
    rank_folder,
)
from placer.checkpoint.served_files import served_files
from placer.checkpoint.source import INDEX_NAME, CheckpointSource
from placer.checkpoint.tensor_files import read_tensor
from placer.errors import VerificationError
from placer.model import ModelSpec
from placer.placement import Plan
from placer.placement.all_layers import plan_of
from placer.run.documents import read_json, shown
from placer.run.files import open_regular, read_text, require_file, sha256_file
from placer.run.progress import Progress, Steps

if TYPE_CHECKING:
    import torch

_Difference = tuple[str, Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksVerification:
    """What was found in the directories of all ranks.

    Attributes
    ----------
    num_ranks
        Directories.
    num_tensors, num_bytes
        Tensors in them, equal bit for bit, and their bytes.
    num_experts
        Routed experts in them, replicas included, over all layers.
    """

    num_ranks: int
    num_tensors: int
    num_bytes: int
    num_experts: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def is_ranks(path: Path) -> bool:
    """Return whether a directory looks like an export by ranks."""
    return (path / rank_folder(0) / RANK_NAME).is_file()


def verify_ranks(
    original: Path, exported: Path, plan_path: Path, progress: Progress | None = None
) -> RanksVerification:
    """Compare every byte of every rank with the original and the plan.

    ``progress`` gets a line for each tensor.

    Raises
    ------
    VerificationError
        At the first tensor or file that is missing, too many or different, and at the first
        field of ``placement.json`` that is not what plan and model say.
    PlacerError
        If plan or original cannot be read.
    """
    plan = Plan.read(plan_path)
    model = ModelSpec.from_checkpoint(original)
    plan, _ = plan_of(plan, plan_path, model, original)
    source = CheckpointSource.open(original)
    where = {name: shard.path for shard in source.shards for name in shard.tensors}
    routed = RoutedTensors.of(source, model)
    placement = plan.placement
    experts_only = RankRecord.read(exported / rank_folder(0) / RANK_NAME).experts_only
    job = prepare_ranks(plan_path, original, experts_only=experts_only)
    known = {rank_folder(record.rank) for record in job.records}
    if further := sorted({path.name for path in exported.glob("rank-*")} - known):
        raise _wrong(exported, f"has {further[0]}, but the plan has {len(known)} ranks")
    num_tensors = num_bytes = 0
    for rank in range(placement.num_ranks):
        folder = exported / rank_folder(rank)
        _require_record(folder, job.records[rank])
        held = [
            row.reshape(placement.num_ranks, -1)[rank].tolist()
            for row in placement.physical_to_logical_map
        ]
        expected = {
            name for name in where if routed.has(name, held, experts_only=experts_only)
        }
        found = _tensors(folder)
        if other := min(set(found) ^ expected, default=None):
            raise _wrong(folder, f"{'lacks' if other in expected else 'has'} {other}")
        unit = f"rank {rank + 1} of {placement.num_ranks}, tensor"
        steps = Steps(tell=progress, total=len(expected), unit=unit)
        for name in steps.each(sorted(expected)):
            old, new = read_tensor(where[name], name), read_tensor(found[name], name)
            if name in routed.fused:
                layer = routed.fused[name]
                old = _held_blocks(old, model.num_experts[layer], held[layer])
            if (old.dtype, old.shape) != (new.dtype, new.shape) or not _same(old, new):
                raise _wrong(folder, f"{name} differs from that of {original}")
            num_tensors, num_bytes = num_tensors + 1, num_bytes + old.nbytes
        _require_headers(exported, rank, job)
        _require_other_files(original, folder, job)
    return RanksVerification(
        num_ranks=placement.num_ranks,
        num_tensors=num_tensors,
        num_bytes=num_bytes,
        num_experts=sum(len(row) for row in placement.physical_to_logical_map),
    )


def _held_blocks(old: "torch.Tensor", num_experts: int, held: list[int]) -> "torch.Tensor":
    """Return the blocks of the experts that a rank has, along the axis of all experts."""
    import torch

    axis = next((n for n, length in enumerate(old.shape) if length != 1), 0)
    shape = list(old.shape)
    shape[axis] = shape[axis] // num_experts * len(held)
    # torch indexes no float8 or other narrow types, but their bytes
    blocks = old.contiguous().reshape(-1).view(torch.uint8).reshape(num_experts, -1)
    return blocks[held].reshape(-1).view(old.dtype).reshape(shape)


def _require_record(folder: Path, expected: RankRecord) -> None:
    """Check every field of ``placement.json``."""
    found = RankRecord.read(folder / RANK_NAME).to_json()
    if (odd := _first_difference(found, expected.to_json())) is not None:
        name, value, wanted = odd
        raise _wrong(
            folder,
            f"has {RANK_NAME} with {name} {shown(value)}, but the plan and the model "
            f"require {shown(wanted)}",
        )


def _first_difference(found: Any, expected: Any, name: str = "") -> _Difference | None:
    """Return where two JSON values differ first, and the values there."""
    if isinstance(found, dict) and isinstance(expected, dict):
        steps = [(f"{name}{key}", found[key], expected[key]) for key in expected]
    elif isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            return name, found, expected
        pairs = enumerate(zip(found, expected, strict=True))
        steps = [(f"{name}[{place}]", one, other) for place, (one, other) in pairs]
    else:
        return None if found == expected else (name, found, expected)
    odd = (_first_difference(one, other, step) for step, one, other in steps)
    return next((one for one in odd if one is not None), None)


def _require_headers(exported: Path, rank: int, job: RanksJob) -> None:
    """Check what the files of a rank hold apart from the bytes of tensors."""
    folder = exported / rank_folder(rank)
    works = {
        exported / w.name: w for w in job.shards if Path(w.name).parts[0] == folder.name
    }
    if works.keys() != {*folder.glob("*.safetensors")}:
        return  # the original given has the same tensors in other shards
    for path, work in works.items():
        with open_regular(path, "shard") as stream:
            header = stream.read(len(work.header))
        if header != work.header or path.stat().st_size != work.num_bytes:
            raise _wrong(folder, f"has {path.name} with another header or size")
    if read_text(folder / INDEX_NAME) != index_text(job.indexes[rank]):
        raise _wrong(folder, f"has another {INDEX_NAME} than an export writes")


def _require_other_files(original: Path, folder: Path, job: RanksJob) -> None:
    """Check that the files next to the tensors are the original's."""
    weights = {path.name for path in folder.glob("*.safetensors")}
    found, _ = served_files(folder, weights | {RANK_NAME, INDEX_NAME})
    if odd := min({*found} ^ {*job.other_files}, default=None):
        raise _wrong(folder, f"{'lacks' if odd in job.other_files else 'has'} {odd}")
    for name in found:
        before, after = sha256_file(original / name), sha256_file(folder / name)
        if before != after:
            raise _wrong(
                folder,
                f"has another {name} than {original}: SHA-256 {after[:12]} against "
                f"{before[:12]}",
            )


def _tensors(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor; files and index must say the same."""
    weight_map = read_json(folder / INDEX_NAME, "index").get("weight_map")
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        require_file(path, "shard")
        try:
            with safe_open(path, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), path)
        except (SafetensorError, OSError) as error:
            raise _wrong(
                folder, f"has {path.name}, which cannot be read: {error}"
            ) from error
    if weight_map != {name: path.name for name, path in found.items()}:
        raise _wrong(folder, "has an index that does not match its files")
    return found


def _same(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    """Compare bytes: NaN is then equal to itself, in any dtype."""
    import torch

    return torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def _wrong(folder: Path, what: str) -> VerificationError:
    return VerificationError(
        f"{folder} {what}", "export it again: placer export ranks PLAN MODEL --out NEW"
    )
