"""DeepSpeed-MoE checkpoints: experts renumbered in file names and keys, rows in gates.

Facts from DeepSpeed, ``runtime/engine.py`` and ``moe``. Every expert has a file of its
own, ``layer_{ordinal}_expert_{id}_mp_rank_{mp}_model_states.pt``, whose keys hold the id
too; gates ``[E, hidden]`` are in ``mp_rank_{mp}_model_states.pt`` under ``module``. A rank
loads consecutive ids. Pyramid-residual models differ in experts from layer to layer; their
dense branch and its coefficient do not depend on the order of experts.
"""

import argparse
import codecs
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from placer.arrays import IntArray
from placer.checkpoint.deepspeed_record import DeepspeedRecord
from placer.checkpoint.permuted_rows import rows_without_replicas
from placer.checkpoint.source import (
    RECORD_NAME,
    FileState,
    file_state,
    require_states,
)
from placer.errors import PlacerError, VerificationError
from placer.placement import Plan
from placer.run.archives import load_torch
from placer.run.files import read_text, require_file, sha256_file
from placer.run.writing import atomic_directory, require_free_space

_EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_MAIN_FILE = re.compile(r"mp_rank_\d+_model_states\.pt")
_EXPERT_KEY = re.compile(
    r"((?:.*\.)?deepspeed_moe)\.experts\.deepspeed_experts\.(\d+)\.(.+)"
)
GATE = ".gate.wg.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepspeedReport:
    """What was written.

    Attributes
    ----------
    num_layers
        MoE layers.
    num_expert_files, num_gates
        Files of experts, and gates whose rows were reordered; both over all model-parallel
        ranks.
    unchecked
        Of a restored checkpoint, the files of the export that no recorded hash vouches for;
        ``None`` for an export.
    """

    num_layers: int
    num_expert_files: int
    num_gates: int
    unchecked: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what a table of the export shows."""
        return {
            "layers": self.num_layers,
            "expert_files": self.num_expert_files,
            "permuted_gates": self.num_gates,
            "contents_checked": None if self.unchecked is None else not self.unchecked,
            "unchecked_files": None if self.unchecked is None else list(self.unchecked),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepspeedCheckpoint:
    """The files of one DeepSpeed-MoE checkpoint.

    Attributes
    ----------
    directory
        Where they are: the folder of a tag.
    expert_files
        By MoE layer, expert and model-parallel rank.
    main_files
        Files with all other tensors, one per model-parallel rank.
    other_files
        Files that come along as they are.
    num_experts
        ``[L]``: experts of each MoE layer.
    states
        Size, time of the last change (ns) and inode of every file.
    """

    directory: Path
    expert_files: Mapping[tuple[int, int, str], Path]
    main_files: tuple[Path, ...]
    other_files: tuple[Path, ...]
    num_experts: tuple[int, ...]
    states: Mapping[Path, FileState]

    @property
    def files(self) -> tuple[Path, ...]:
        """All files but placer's record."""
        return (*self.expert_files.values(), *self.main_files, *self.other_files)

    def name_of(self, path: Path) -> str:
        """Return the name of a file in the directory."""
        return path.relative_to(self.directory).as_posix()

    @classmethod
    def open(cls, directory: Path) -> "DeepspeedCheckpoint":
        """Find and name all files.

        Parameters
        ----------
        directory
            The folder of a tag, or the one above, whose ``latest`` names it.

        Raises
        ------
        PlacerError
            If it is not a DeepSpeed-MoE checkpoint, holds optimizer states or files that
            cannot be classified, or experts are missing.
        """
        directory = _tag_folder(directory)
        experts: dict[tuple[int, int, str], Path] = {}
        main, others = [], []
        for path in sorted(directory.rglob("*")):
            if path.is_symlink():
                raise PlacerError(
                    f"{path} is a link", f"copy it with its files: cp -rL {directory} COPY"
                )
            if path.is_dir():
                continue
            if not path.is_file():
                raise PlacerError(
                    f"{path} is not a file: a pipe, a device or a socket",
                    "move it out of the directory",
                )
            if found := _EXPERT_FILE.fullmatch(path.name):
                experts[int(found[1]), int(found[2]), found[3]] = path
            elif _MAIN_FILE.fullmatch(path.name):
                main.append(path)
            elif path.suffix == ".pt" and not _is_empty_optimizer(path):
                raise _unclassified(path)
            elif path != directory / RECORD_NAME:
                others.append(path)
        if not experts or not main:
            raise PlacerError(
                f"{directory} is not a DeepSpeed-MoE checkpoint: it has {len(experts)} "
                f"files of experts and {len(main)} of everything else",
                "give the folder of a tag, with mp_rank_00_model_states.pt in it",
            )
        files = (*experts.values(), *main, *others)
        return cls(
            directory=directory,
            expert_files=experts,
            main_files=tuple(main),
            other_files=tuple(others),
            num_experts=_num_experts(directory, experts),
            states={path: file_state(path) for path in files},
        )


def export_deepspeed(plan_path: Path, directory: Path, out: Path) -> DeepspeedReport:
    """Write the checkpoint whose expert e of layer l is old expert ``map[l][e]``.

    Parameters
    ----------
    plan_path
        A plan without replicas; its MoE layers are those of the checkpoint, in order.
    directory
        The original; it is only read.
    out
        The directory to write; it must not exist.

    Raises
    ------
    PlacerError
        If plan and checkpoint differ in shape, or the checkpoint cannot be permuted.
    """
    plan = Plan.read(plan_path)
    source = DeepspeedCheckpoint.open(directory)
    if source.num_experts != plan.model.num_experts:
        raise other_shape(plan, plan_path, source)
    if (source.directory / RECORD_NAME).exists():
        raise PlacerError(
            f"{directory} was already permuted by placer",
            f"restore it first: placer export deepspeed {directory} --inverse "
            "--out ORIGINAL",
        )
    rows = rows_without_replicas(plan)
    with _written(source, rows, out) as (partial, num_gates):
        names = [source.name_of(path) for path in source.files]
        record = DeepspeedRecord.of(
            plan_sha256=sha256_file(plan_path),
            permutation=[row.tolist() for row in rows],
            file_sha256={name: sha256_file(partial / name) for name in names},
        )
        record.write(partial / RECORD_NAME)
    return DeepspeedReport(
        num_layers=len(rows),
        num_expert_files=len(source.expert_files),
        num_gates=num_gates,
    )


def restore_deepspeed(directory: Path, out: Path) -> DeepspeedReport:
    """Write the original of an exported checkpoint: every tensor, bit for bit.

    Raises
    ------
    PlacerError
        If the directory holds no record, or one of another checkpoint.
    VerificationError
        If a file is not what was exported.
    """
    source = DeepspeedCheckpoint.open(directory)
    record = DeepspeedRecord.read(source.directory / RECORD_NAME, source.num_experts)
    unchecked = require_recorded(source, record)
    rows = [np.argsort(row) for row in record.permutation]
    with _written(source, rows, out) as (_, num_gates):
        pass
    return DeepspeedReport(
        num_layers=len(rows),
        num_expert_files=len(source.expert_files),
        num_gates=num_gates,
        unchecked=unchecked,
    )


def require_recorded(
    source: DeepspeedCheckpoint, record: DeepspeedRecord
) -> tuple[str, ...]:
    """Compare all files of an export with the hashes in its record.

    Returns
    -------
    tuple of str
        The files of which no hash is recorded.

    Raises
    ------
    VerificationError
        With the first file that is missing or another one.
    """
    names = {source.name_of(path) for path in source.files}
    for name, expected in sorted(record.file_sha256.items()):
        found = sha256_file(source.directory / name) if name in names else None
        if found != expected:
            state = "is missing" if found is None else f"has SHA-256 {found[:12]}"
            raise VerificationError(
                f"{source.directory / name} is not what was exported: it {state}, "
                f"{RECORD_NAME} says {expected[:12]}",
                "put the exported file back, or restore from an unchanged copy",
            )
    return tuple(sorted(names - record.file_sha256.keys()))


def is_deepspeed(directory: Path) -> bool:
    """Return whether a directory holds a DeepSpeed checkpoint."""
    return (directory / "latest").is_file() or any(
        directory.glob("mp_rank_*_model_states.pt")
    )


def other_shape(plan: Plan, plan_path: Path, source: DeepspeedCheckpoint) -> PlacerError:
    """Return the error of a plan that has other numbers of experts."""
    return PlacerError(
        f"{plan_path} is for {list(plan.model.num_experts)} experts per MoE layer, "
        f"{source.directory} has {list(source.num_experts)}",
        f"solve a plan for this model; to see the plan: placer inspect {plan_path}",
    )


@contextmanager
def _written(
    source: DeepspeedCheckpoint, rows: Sequence[IntArray], out: Path
) -> Iterator[tuple[Path, int]]:
    """Write all files, then yield their directory and the number of permuted gates.

    The directory gets its name last, if the source is still what it was.
    """
    require_free_space(out, sum(size for size, _, _ in source.states.values()))
    prefixes = list(moe_prefixes(source))
    with atomic_directory(out) as partial:
        for (layer, expert, rank), path in source.expert_files.items():
            moved = int(rows[layer][expert])
            content = load_states(source.expert_files[layer, moved, rank])
            target = partial / source.name_of(path)
            _save(target, _renumbered(path, content, moved, expert))
        num_gates = 0
        for path in source.main_files:
            content = load_states(path)
            num_gates += _permute_gates(path, content, prefixes, rows)
            _save(partial / source.name_of(path), content)
        for path in source.other_files:
            target = partial / source.name_of(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        yield partial, num_gates
        require_states(source.states)


def _renumbered(
    path: Path, content: Mapping[str, Any], old: int, new: int
) -> dict[str, Any]:
    """Return an expert's tensors under the keys of another id."""
    found = {}
    for key, value in content.items():
        match = _EXPERT_KEY.fullmatch(key)
        if match is None or int(match[2]) != old:
            raise PlacerError(
                f"{path.name}: the key {key} does not belong to expert {old}",
                "report the checkpoint: its keys are not those of DeepSpeed-MoE",
            )
        found[f"{match[1]}.experts.deepspeed_experts.{new}.{match[3]}"] = value
    return found


def _permute_gates(
    path: Path,
    content: dict[str, Any],
    prefixes: Sequence[str],
    rows: Sequence[IntArray],
) -> int:
    """Reorder the rows of all gates in place; return how many there are."""
    module = content.get("module")
    if not isinstance(module, dict):
        raise PlacerError(f"{path} has no module", "give a checkpoint of DeepSpeed")
    if content.get("optimizer"):
        raise _optimizer(path)
    gates = {prefix + GATE: row for prefix, row in zip(prefixes, rows, strict=True)}
    for key in module:
        if "deepspeed_moe." in key and key not in gates:
            raise PlacerError(
                f"{path}: tensor {key} cannot be classified: it belongs to an MoE layer "
                "and is not a gate",
                "report the checkpoint",
            )
    for key, row in gates.items():
        gate = module.get(key)
        if gate is None or gate.ndim != 2 or len(gate) != len(row):
            raise PlacerError(
                f"{path}: gate {key} is missing, or its number of rows is not that of "
                f"the experts, {len(row)}",
                "fetch the checkpoint again",
            )
        module[key] = gate[row]
    return len(gates)


def moe_prefixes(source: DeepspeedCheckpoint) -> Iterator[str]:
    """Yield the module of each MoE layer, as the keys of its expert 0 name it.

    Raises
    ------
    PlacerError
        If the file holds no tensor of an expert.
    """
    for layer in range(len(source.num_experts)):
        path = next(
            path
            for (n, expert, _), path in source.expert_files.items()
            if (n, expert) == (layer, 0)
        )
        match = _EXPERT_KEY.fullmatch(next(iter(load_states(path)), ""))
        if match is None:
            raise PlacerError(
                f"{path} holds no tensor of an expert", "fetch the checkpoint again"
            )
        yield match[1]


def load_states(path: Path) -> dict[str, Any]:
    """Load one file; the bytes of tensors stay on disk until they are read.

    Raises
    ------
    PlacerError
        If it does not load with ``weights_only``, or holds no dict.
    """
    require_file(path, "file")
    try:
        value = load_torch(path, allowed=_client_state(), mapped=True)
    except PlacerError as error:
        raise PlacerError(
            f"{path} does not load with weights_only: {error}",
            "save it again without client state: engine.save_checkpoint(DIR)",
        ) from error
    if not isinstance(value, dict):
        raise PlacerError(f"{path} holds no dict", "give a checkpoint of DeepSpeed")
    return value


def _client_state() -> list[Any]:
    """Return what Megatron-DeepSpeed keeps next to tensors: arguments, and random states.

    Each only holds data: unpickling them runs no code of the file.
    """
    from numpy._core.multiarray import _reconstruct

    dtypes = {type(np.dtype(name)) for name in ("uint8", "uint32", "int64", "float64")}
    old_name = (_reconstruct, "numpy.core.multiarray._reconstruct")  # of NumPy 1
    arrays = [_reconstruct, old_name, np.ndarray, np.dtype, codecs.encode, *dtypes]
    return [argparse.Namespace, *arrays]


def _save(path: Path, value: Mapping[str, Any]) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    # Saved to a path, the archive would hold the name of that path.
    with path.open("wb") as stream:
        torch.save(value, stream)


def _tag_folder(directory: Path) -> Path:
    latest = directory / "latest"
    if not latest.is_file():
        return directory
    tag = read_text(latest).strip()
    if not tag or Path(tag).name != tag or tag == "..":
        raise PlacerError(
            f"{latest} names {tag!r}, which is not a folder next to it",
            "name the tag's folder",
        )
    return directory / tag


def _num_experts(
    directory: Path, experts: Mapping[tuple[int, int, str], Path]
) -> tuple[int, ...]:
    """Return the experts per layer; each must have a file for each model-parallel rank."""
    ranks = {rank for _, _, rank in experts}
    num_layers = 1 + max(layer for layer, _, _ in experts)
    sizes = [
        1 + max((e for n, e, _ in experts if n == layer), default=-1)
        for layer in range(num_layers)
    ]
    for layer, size in enumerate(sizes):
        for expert in range(max(size, 1)):
            for rank in sorted(ranks):
                if (layer, expert, rank) not in experts:
                    name = f"layer_{layer}_expert_{expert}_mp_rank_{rank}_model_states.pt"
                    raise PlacerError(
                        f"{directory} lacks {name}", "fetch the checkpoint again"
                    )
    return tuple(sizes)


def _is_empty_optimizer(path: Path) -> bool:
    """Return whether a file is one that DeepSpeed writes where there is no optimizer."""
    return "optim_states" in path.name and not any(load_states(path).values())


def _unclassified(path: Path) -> PlacerError:
    if "optim_states" in path.name:
        return _optimizer(path)
    if re.fullmatch(r"expert_\d+_mp_rank_\d+_model_states\.pt", path.name):
        return PlacerError(
            f"{path} is from an old DeepSpeed: one file holds all layers of an expert",
            "load and save the checkpoint with a later DeepSpeed",
        )
    if re.fullmatch(r"layer_\d+-model_(\d+-model_)?states\.pt", path.name):
        return PlacerError(
            f"{path} is of a pipeline-parallel checkpoint: its routers are apart by layer",
            "save it without pipeline parallelism: placer reads routers of mp_rank files",
        )
    return PlacerError(
        f"{path} belongs to no expert and to no model-parallel rank",
        "if it does not belong to the checkpoint, move it out of the directory",
    )


def _optimizer(path: Path) -> PlacerError:
    return PlacerError(
        f"{path} holds optimizer states that are flattened over experts, which placer "
        "cannot permute",
        "export a copy without *optim_states.pt, and load it with load_module_only=True",
    )
