"""Proof that an exported DeepSpeed-MoE checkpoint is the original under the plan."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from placer.checkpoint.deepspeed import (
    GATE,
    DeepspeedCheckpoint,
    load_states,
    moe_prefixes,
    other_shape,
    require_recorded,
)
from placer.checkpoint.deepspeed_record import DeepspeedRecord
from placer.checkpoint.source import RECORD_NAME
from placer.errors import VerificationError
from placer.placement import Plan
from placer.run.documents import shown
from placer.run.files import sha256_file
from placer.run.progress import Progress, Steps

_AGAIN = "export it again: placer export deepspeed PLAN ORIGINAL --out NEW"


def verify_deepspeed(
    original: Path, exported: Path, plan_path: Path, progress: Progress | None = None
) -> int:
    """Compare every tensor under the plan's permutation; return how many there are.

    ``progress`` gets a line for each file.

    Then compare all files with the hashes that were recorded when they were written.

    Raises
    ------
    VerificationError
        At the first difference.
    """
    plan = Plan.read(plan_path)
    old, new = (DeepspeedCheckpoint.open(one) for one in (original, exported))
    if old.num_experts != plan.model.num_experts:
        raise other_shape(plan, plan_path, old)
    record = _record_of(new, plan, plan_path)
    _require_same_names(old, new)
    count = 0
    number = len(new.expert_files) + len(new.main_files)
    steps = Steps(tell=progress, total=number, unit="file")
    for (layer, expert, rank), path in steps.each(new.expert_files.items()):
        moved = int(plan.placement.permutation(layer)[expert])
        theirs = old.expert_files[layer, moved, rank]
        expected = {
            key.replace(f"deepspeed_experts.{moved}.", f"deepspeed_experts.{expert}."): one
            for key, one in load_states(theirs).items()
        }
        count += _compare(path, load_states(path), expected)
    prefixes = {prefix: n for n, prefix in enumerate(moe_prefixes(old))}
    for ours, theirs in steps.each(zip(new.main_files, old.main_files, strict=True)):
        found, expected = load_states(ours), load_states(theirs)
        module = dict(expected.pop("module"))
        for prefix, layer in prefixes.items():
            module[prefix + GATE] = module[prefix + GATE][plan.placement.permutation(layer)]
        count += _compare(ours, found.pop("module", {}), module)
        _compare(ours, found, expected)
    for ours, theirs in zip(new.other_files, old.other_files, strict=True):
        if sha256_file(ours) != sha256_file(theirs):
            raise VerificationError(f"{ours} is not that of {original}", _AGAIN)
    unknown = require_recorded(new, record)
    if record.file_sha256 and unknown:
        raise VerificationError(
            f"{new.directory / RECORD_NAME} has no SHA-256 of {unknown[0]}", _AGAIN
        )
    return count


def _record_of(
    exported: DeepspeedCheckpoint, plan: Plan, plan_path: Path
) -> DeepspeedRecord:
    """Read ``placer.json``, which must name the plan, and the permutation that it gives."""
    path = exported.directory / RECORD_NAME
    if not path.is_file():
        raise VerificationError(f"{path.parent} has no {RECORD_NAME}", _AGAIN)
    read = DeepspeedRecord.read(path, plan.model.num_experts)
    found = sha256_file(plan_path)
    if read.plan_sha256 != found:
        raise VerificationError(
            f"{path} is of the plan with SHA-256 {read.plan_sha256[:12]}, but {plan_path} "
            f"has {found[:12]}",
            _AGAIN,
        )
    for layer, row in enumerate(read.permutation):
        if row != (planned := plan.placement.permutation(layer).tolist()):
            raise VerificationError(
                f"{path}: permutation[{layer}] is {shown(row)}, in the plan "
                f"{shown(planned)}",
                _AGAIN,
            )
    return read


def _require_same_names(old: DeepspeedCheckpoint, new: DeepspeedCheckpoint) -> None:
    """Check that both have the same files of experts, gates and others."""

    def names(one: DeepspeedCheckpoint) -> set[str]:
        return set(map(one.name_of, one.files))

    before, after = names(old), names(new)
    if odd := min(before ^ after, default=None):
        raise VerificationError(
            f"{new.directory} {'lacks' if odd in before else 'has'} {odd}, which "
            f"{old.directory} {'has' if odd in before else 'does not have'}",
            _AGAIN,
        )


def _compare(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> int:
    if odd := min(map(str, found.keys() ^ expected.keys()), default=None):
        state = "lacks" if odd in expected else "has the unexpected"
        raise VerificationError(f"{path} {state} key {odd}", _AGAIN)
    for key, value in expected.items():
        if not _same(found[key], value):
            raise VerificationError(
                f"{path}: {key} differs from the original under the plan", _AGAIN
            )
    return len(expected)


def _same(one: Any, other: Any) -> bool:
    """Compare values of a checkpoint; tensors byte by byte: NaN is then equal to itself."""
    import torch

    if type(one) is not type(other):
        return False
    if isinstance(one, argparse.Namespace):
        one, other = vars(one), vars(other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, np.ndarray):
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and one.tobytes() == other.tobytes()
    if not isinstance(one, torch.Tensor):
        return bool(one == other or (one != one and other != other))
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    left, right = (
        tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)
    )
    return torch.equal(left, right)
