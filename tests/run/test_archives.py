"""Archives unpack within bounds, hold arrays and plain values, and never run code."""

import gzip
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from placer.errors import PlacerError
from placer.run import archives
from placer.run.archives import (
    load_array,
    load_arrays,
    load_torch,
    require_fitting_archive,
    unreadable_reason,
    unzipped,
)

MEBIBYTE = 1 << 20


def archive(path: Path, unpacked: int, stored: int = 0) -> int:
    """Write an archive that claims to unpack to so many bytes, and return its own."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("junk", bytes(stored))
        file.writestr("claims", b"")
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2")  # in the directory: bytes 24 to 28 are the size
    struct.pack_into("<I", content, entry + 24, unpacked - stored)
    path.write_bytes(content)
    return len(content)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a setter of the bytes of memory that the machine has."""

    def has(number: int) -> None:
        monkeypatch.setattr(archives, "memory_bytes", lambda: number)

    has(1 << 40)
    return has


def test_what_unpacks_to_little_is_let_pass(tmp_path: Path, memory: Any) -> None:
    path = tmp_path / "a.npz"
    archive(path, 64 * MEBIBYTE)
    require_fitting_archive(path)
    archive(path, 64 * MEBIBYTE + 1)
    with pytest.raises(PlacerError, match="unpacks to 67,108,865; placer unpacks at most"):
        require_fitting_archive(path)


def test_an_archive_unpacks_to_a_hundred_times_its_size(
    tmp_path: Path, memory: Any
) -> None:
    path = tmp_path / "a.npz"
    size = archive(path, 200 * MEBIBYTE, stored=MEBIBYTE)
    archive(path, 100 * size, stored=MEBIBYTE)
    require_fitting_archive(path)
    archive(path, 100 * size + 1, stored=MEBIBYTE)
    with pytest.raises(PlacerError, match=f"has {size:,} bytes .* at most 100 times"):
        require_fitting_archive(path)


def test_an_archive_fits_the_memory(tmp_path: Path, memory: Any) -> None:
    path = tmp_path / "a.npz"
    archive(path, 5000)
    memory(5000)
    require_fitting_archive(path)
    memory(4999)
    with pytest.raises(PlacerError, match="4,999 bytes, the memory here"):
        require_fitting_archive(path)
    path.write_bytes(bytes(9000))
    require_fitting_archive(path)  # it is no archive


def packed(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(content))
    return path


def test_gzip_is_unpacked_up_to_the_memory(tmp_path: Path, memory: Any) -> None:
    content = np.random.default_rng(0).bytes(5000)
    for most, fits in ((5000, True), (4999, False)):
        memory(most)
        with packed(tmp_path, content).open("rb") as stream:
            unpacked = unzipped(stream)
            if fits:
                assert unpacked.read() == content
                assert unpacked.seek(7) == 7
                assert unpacked.read(3) == content[7:10]
            else:
                with pytest.raises(ValueError, match="more than 100 times its size"):
                    unpacked.read()


def test_gzip_is_unpacked_to_a_hundred_times_its_size(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_LITTLE_BYTES", 10)
    content = np.random.default_rng(0).bytes(500) + bytes(20_000)
    with packed(tmp_path, content).open("rb") as stream:
        assert unzipped(stream).read() == content
    bomb = bytes(100_000)  # in about 140 bytes
    with (
        packed(tmp_path, bomb).open("rb") as stream,
        pytest.raises(ValueError, match="more than 100 times its size"),
    ):
        unzipped(stream).read()


def test_what_is_not_packed_is_read_as_it_is() -> None:
    stream = io.BytesIO(b"\x1fplain")
    assert unzipped(stream) is stream
    assert stream.read() == b"\x1fplain"


def test_reasons_do_not_advise_to_unpickle() -> None:
    assert "placer never loads" in unreadable_reason(ValueError("set allow_pickle=True"))
    assert unreadable_reason(ValueError("damaged")) == "damaged"
    assert unreadable_reason(ValueError()) == "ValueError()"


def test_arrays_are_loaded_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, one=np.arange(3), two=np.arange(4))
    arrays, found = load_arrays(path)
    assert {name: one.tolist() for name, one in arrays.items()} == {
        "one": [0, 1, 2],
        "two": [0, 1, 2, 3],
    }
    arrays, found = load_arrays(path, ["two", "three"])
    assert list(arrays) == ["two"]
    assert found == ["one", "two"]
    np.save(tmp_path / "a.npy", np.arange(3))
    assert load_array(tmp_path / "a.npy").tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="one array, not an archive"):
        load_arrays(tmp_path / "a.npy")


class Planted:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path(self.folder),)


def test_no_pickle_is_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    odd = np.array([Planted(ran)], dtype=object)
    np.save(tmp_path / "a.npy", odd)
    np.savez(tmp_path / "a.npz", a=odd)
    for load, name in ((load_array, "a.npy"), (load_arrays, "a.npz")):
        with pytest.raises(ValueError, match="pickle"):
            load(tmp_path / name)
    torch.save(Planted(ran), tmp_path / "a.pt")
    with pytest.raises(PlacerError, match=r"it holds \S+, and placer runs no code"):
        load_torch(tmp_path / "a.pt")
    assert not ran.exists()


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("notes", "text")
    with pytest.raises(ValueError, match="notes is not an array"):
        load_arrays(path)


def test_many_rows_of_nothing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for shape, fits in (
        ((MEBIBYTE, 0), True),
        ((0, MEBIBYTE), True),
        ((MEBIBYTE + 1, 0), False),
        ((MEBIBYTE + 1, 1), True),
        ((), True),
    ):
        np.save(path, np.zeros(shape, dtype=np.uint8))
        if fits:
            assert load_array(path).shape == shape
            continue
        with pytest.raises(ValueError, match="holds nothing"):
            load_array(path)
        np.savez(tmp_path / "a.npz", a=np.zeros(shape))
        with pytest.raises(ValueError, match="holds nothing"):
            load_arrays(tmp_path / "a.npz")


def test_tensors_and_plain_values_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    value = {"a": torch.arange(6), "b": [1, (2, {3})], "c": torch.zeros(0, 5)}
    torch.save(value, path)
    for mapped in (False, True):
        found = load_torch(path, mapped=mapped)
        assert found["a"].tolist() == list(range(6))
        assert found["b"] == value["b"]
    torch.save(np.arange(3), path)
    with pytest.raises(PlacerError, match="and placer runs no code from files"):
        load_torch(path)


def test_older_files_of_torch_are_loaded_too(tmp_path: Path) -> None:
    torch.save(torch.arange(6), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert load_torch(tmp_path / "a.pt").tolist() == list(range(6))


def test_what_torch_does_not_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.arange(600), path)
    with zipfile.ZipFile(path) as file:
        members = {one.filename: file.read(one) for one in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    with pytest.raises(PlacerError, match="it is compressed, which torch"):
        load_torch(path)
    archive(path, 4000)
    with pytest.raises(PlacerError, match="its parts are larger than the file"):
        load_torch(path)
    size = archive(path, 100)
    archive(path, size)  # as large as the file: this is not why it is refused
    with pytest.raises(PlacerError, match="not a readable") as caught:
        load_torch(path)
    assert "larger" not in caught.value.message


def test_reasons_of_torch_are_one_line_without_its_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.arange(6), path)
    for raised, reason in (
        (RuntimeError("damaged\nsecond line"), "damaged"),
        (RuntimeError("damaged. In PyTorch 2.6 you may"), "damaged"),
        (RuntimeError(), "RuntimeError()"),
    ):

        def load(*_: Any, raised: Exception = raised, **__: Any) -> None:
            raise raised

        monkeypatch.setattr(torch, "load", load)
        with pytest.raises(PlacerError) as caught:
            load_torch(path)
        assert caught.value.message == (
            f"it is not a readable .pt file of tensors and plain values: {reason}"
        )


@pytest.mark.parametrize(
    "nest", [lambda one: one, lambda one: [one], lambda one: {"a": one}]
)
def test_a_tensor_has_bytes_for_all_its_elements(tmp_path: Path, nest: Any) -> None:
    path = tmp_path / "a.pt"
    torch.save(nest(torch.zeros(1).expand(2)), path)
    with pytest.raises(PlacerError, match=r"a tensor of shape \[2\] has too few bytes"):
        load_torch(path)
    torch.save(nest(torch.zeros(2)), path)
    load_torch(path)


def test_a_long_list_takes_as_many_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_FEW_VALUES", 1000)
    torch.save([0] * 5000, tmp_path / "a.pt")
    assert len(load_torch(tmp_path / "a.pt")) == 5000


def test_lists_are_counted_as_they_unroll(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_FEW_VALUES", 100_000)
    path = tmp_path / "a.pt"
    for fold in (list, tuple):
        bomb: Any = [0] * 10
        for _ in range(30):
            bomb = fold([bomb] * 10)
        torch.save(bomb, path)
        with pytest.raises(PlacerError, match="hold each other many times over"):
            load_torch(path)
    loop: Any = []
    loop.append(loop)
    with path.open("wb") as stream:
        pickle.dump(loop, stream)
    torch.save({"a": loop}, path)
    with pytest.raises(PlacerError, match="hold each other many times over"):
        load_torch(path)
    nothing: Any = {n: torch.zeros(0, 60_000) for n in range(4)}
    torch.save(nothing, path)
    with pytest.raises(PlacerError, match="hold each other many times over"):
        load_torch(path)
