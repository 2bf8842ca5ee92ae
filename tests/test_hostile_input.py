"""Readers refuse hostile files in one sentence, in bounded time and memory.

Each reader is given a pipe, a device, a directory, a broken link, a loop of links, a sparse
file of 64 GiB, and what is worst for its own format. Time is that of the processor, so that
other work on the machine does not count.
"""

import io
import json
import os
import resource
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from placer.affinity import Affinity
from placer.affinity.load_files import read_csv_loads, read_load_matrix
from placer.checkpoint.deepspeed import load_states
from placer.checkpoint.deepspeed_record import DeepspeedRecord
from placer.checkpoint.record import ExportRecord
from placer.checkpoint.shard import Shard
from placer.checkpoint.source import CheckpointSource
from placer.checkpoint.torch_shard import open_torch_shard
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement import Plan
from placer.placement.world import read_costs
from placer.planning.certificate_file import read_certificate
from placer.run.archives import load_arrays, load_torch
from placer.runtime_map.maps import RUNTIMES
from placer.solver.params import SolverParams
from placer.table import Table
from placer.target.hardware import Hardware
from placer.target.map_formats import MAPS
from placer.trace import Trace
from placer.trace.csv_rows import read_csv
from placer.trace.imported import import_file
from placer.trace.json_lines import json_values
from placer.trace.npz import read_exflow, read_npz
from placer.trace.sglang_dump import read_sglang_dump

SECONDS, MEGABYTES = 5, 700


def imported(read: Callable) -> Callable[[Path], Any]:
    def run(path: Path) -> Any:
        return import_file(read, "x", path, path.with_name("out"))

    return run


def within(name: str, read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Return a reader of a directory, given the one file in it that is hostile."""

    def run(path: Path) -> Any:
        folder = path.with_name("folder")
        folder.mkdir(exist_ok=True)
        target = folder / name
        if target.is_symlink() or target.exists():
            target.unlink()
        os.symlink(path, target)
        return read(folder)

    return run


READERS: dict[str, Callable[[Path], Any]] = {
    "plan": Plan.read,
    "affinity": Affinity.read,
    "table": Table.read,
    "trace header": within("trace.json", Trace),
    "export record": within("placer.json", ExportRecord.read),
    "config": within("config.json", ModelSpec.from_checkpoint),
    "checkpoint index": within("model.safetensors.index.json", CheckpointSource.open),
    "shard": Shard.open,
    "torch shard": lambda path: open_torch_shard(path, "x"),
    "deepspeed": load_states,
    "deepspeed record": lambda path: DeepspeedRecord.read(path, (8,)),
    "certificate": read_certificate,
    "sglang dump": imported(read_sglang_dump),
    "topology": read_costs,
    "hardware": lambda path: Hardware.named(str(path)),
    "parameters": SolverParams.read,
    "npz": imported(read_npz),
    "exflow": imported(read_exflow),
    "csv": imported(read_csv),
    "json lines": lambda path: list(json_values(path)),
    "csv loads": lambda path: read_csv_loads(path, None),
    **{
        f"{name} map {suffix}": lambda path, one=one, suffix=suffix: one.parse(path, suffix)
        for name, one in RUNTIMES.items()
        for suffix in MAPS[name].suffixes
    },
    **{
        f"matrix {suffix}": lambda path, suffix=suffix: read_load_matrix(
            path.rename(path.with_suffix(suffix)), None
        )
        for suffix in (".npy", ".json", ".pt")
    },
}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


def broken_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def link_loop(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 36)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@contextmanager
def bounded() -> Iterator[None]:
    """Fail where the processor worked for too long, or memory grew too much."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.process_time()
    yield
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert time.process_time() - began < SECONDS
    assert (after.ru_maxrss - before.ru_maxrss) / 1024 < MEGABYTES


def require_refused(read: Callable[[Path], Any], path: Path) -> None:
    with bounded(), pytest.raises(PlacerError) as raised:
        read(path)
    assert len(str(raised.value.message)) < 600
    assert "Traceback" not in str(raised.value.message)


@pytest.mark.parametrize(
    "make", [pipe, device, directory, broken_link, link_loop, sparse, empty]
)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_plain_file(name: str, make: Callable, tmp_path: Path) -> None:
    if make is empty and name in ("parameters", "json lines"):
        return  # no parameter and no value are fine
    make(tmp_path / "file")
    require_refused(READERS[name], tmp_path / "file")


def bomb(path: Path, member: str = "experts.npy", size: int = 1 << 29) -> Path:
    """An archive of half a megabyte that unpacks to 512 MiB of zeros."""
    block = b"\0" * (1 << 24)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(member, "w", force_zip64=True) as stream,
    ):
        header = io.BytesIO()
        about = {"descr": "<i8", "fortran_order": False, "shape": (size // 8,)}
        np.lib.format.write_array_header_2_0(header, about)
        stream.write(header.getvalue())
        for _ in range(size // len(block)):
            stream.write(block)
    return path


def test_archives_that_unpack_to_far_more(tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.npz")
    require_refused(load_arrays, path)
    require_refused(READERS["npz"], path)
    require_refused(READERS["eplb map .npz"], path)
    require_refused(load_torch, bomb(tmp_path / "bomb.pt", "archive/data/0"))


def test_what_compresses_well_is_still_read(tmp_path: Path) -> None:
    """Layers of zeros: 40 MB unpacked, a thousandth of it packed."""
    np.savez_compressed(tmp_path / "zeros.npz", experts=np.zeros((10_000, 64, 8)))
    arrays, _ = load_arrays(tmp_path / "zeros.npz")
    assert arrays["experts"].shape == (10_000, 64, 8)


def npy(shape: tuple[int, ...], content: bytes = b"") -> bytes:
    stream = io.BytesIO()
    about = {"descr": "<i8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(stream, about)
    return stream.getvalue() + content


@pytest.mark.parametrize("shape", [(10**9, 10**9), (10**12,), (2, 10**11), (10**9, 0)])
def test_arrays_of_a_shape_that_is_not_there(shape: tuple, tmp_path: Path) -> None:
    path = tmp_path / "file.npy"
    path.write_bytes(npy(shape, b"\1" * 64))
    require_refused(READERS["exflow"], path)
    require_refused(READERS["matrix .npy"], path)
    with zipfile.ZipFile(tmp_path / "file.npz", "w") as archive:
        for name in ("experts.npy", "sequence_ids.npy", "phy2log.npy", "logcnt.npy"):
            archive.writestr(name, npy(shape, b"\1" * 64))
    require_refused(READERS["npz"], tmp_path / "file.npz")
    require_refused(READERS["eplb map .npz"], tmp_path / "file.npz")


def test_tensors_of_one_element_repeated(tmp_path: Path) -> None:
    """A few bytes, 10^12 elements; and lists that hold each other."""
    row = [0] * 100
    for number, value in enumerate(
        [
            torch.zeros(1).expand(10**12),
            torch.zeros(1, dtype=torch.int64).expand(10**6, 10**6),
            torch.zeros((10**9, 0), dtype=torch.int64),
            [[[[row] * 100] * 100] * 100] * 100,
        ]
    ):
        path = tmp_path / f"{number}.pt"
        torch.save({"physical_to_logical_map": value, "logical_count": value}, path)
        require_refused(READERS["sglang map .pt"], path)
        require_refused(READERS["matrix .pt"], path)


def safetensors(header: dict[str, Any], data: bytes = b"\0" * 64) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "I64", "shape": shape, "data_offsets": [start, stop]}


HEADERS = {
    "overlap": {"a": entry(0, 64, [8]), "b": entry(32, 64, [4])},
    "hole": {"a": entry(0, 16, [2]), "b": entry(32, 64, [4])},
    "beyond": {"a": entry(0, 1 << 40, [1 << 37])},
    "negative": {"a": entry(-64, 0, [8])},
    "backwards": {"a": entry(64, 0, [8])},
    "huge shape": {"a": entry(0, 64, [1 << 62, 1 << 62])},
    "no rows": {"a": entry(0, 64, [8]), "load.0": entry(64, 64, [10**12, 0])},
    "text": {"a": "b"},
    "list": {"a": entry(0, 64, ["8"])},
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize(
    "reader", ["affinity", "table", "eplb map .safetensors", "shard", "checkpoint"]
)
def test_safetensors_whose_header_lies(name: str, reader: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(HEADERS[name]))
    if reader in ("shard", "checkpoint") and name == "no rows":
        return  # valid, and of no use
    read = READERS.get(reader, lambda path: CheckpointSource.open(path.parent))
    require_refused(read, path)


LOL = b"a: &a [1,1,1,1,1,1,1,1,1,1]\n" + b"".join(
    b"%c: &%c [%s]\n" % (one + 1, one + 1, b",".join([b"*%c" % one] * 10))
    for one in range(ord("a"), ord("j"))
)
DOCUMENTS = {
    "deep lists": b"[" * 10**6,
    "deep closed": b"[" * 10**5 + b"]" * 10**5,
    "deep objects": b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
    "huge number": b"9" * 10**6,
    "long number": b"[" + b"9" * 4000 + b"]",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "half a character": rb'{"a": "\ud800"}',
    "NaN": b'{"a": NaN, "b": Infinity, "c": -1e999}',
    "twice": b'{"schema_version": 2, "schema_version": 2}',
    "NUL": b"\0" * 1000,
    "aliases": LOL,
    "an alias of itself": b"&a [*a]",
    "tags": b'!!int ""',
    "code": b"!!python/object/apply:os.system [ls]",
    "long key": b"a." * 20_000 + b"b = 1",
    "many values": b"[" + b"0," * 10**6 + b"0]",
    "longest": b" " * ((1 << 26) + 1),
    "dates": b"a = 9999-99-99",
}


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize(
    "reader",
    [name for name in READERS if not any(x in name for x in ("npz", "npy", ".pt"))],
)
def test_documents(document: str, reader: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DOCUMENTS[document])
    if reader == "json lines":  # takes any JSON
        with bounded(), suppress(PlacerError):
            READERS[reader](tmp_path / "file")
        return
    require_refused(READERS[reader], tmp_path / "file")


def test_a_pipe_in_a_checkpoint_is_not_left_out(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    os.mkfifo(folder / "vocabulary.txt")
    with pytest.raises(PlacerError, match=r"vocabulary\.txt is a pipe"):
        CheckpointSource.open(folder)
