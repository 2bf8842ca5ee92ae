"""Only regular files of a bounded size are read, as UTF-8, and nothing waits for a pipe."""

import os
import socket
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from placer.errors import PlacerError
from placer.run import archives, files
from placer.run.archives import require_fitting_archive
from placer.run.documents import read_json
from placer.run.files import (
    MAX_DOCUMENT_BYTES,
    canonical_json,
    memory_bytes,
    open_regular,
    read_bytes,
    read_text,
    sha256_file,
)
from placer.trace.npz import read_npz


@pytest.fixture
def odd_files(tmp_path: Path) -> dict[str, Path]:
    """Return paths that are no regular files, and one that is not there."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    return {
        "pipe": tmp_path / "pipe",
        "link": tmp_path / "link",
        "socket": tmp_path / "socket",
        "device": Path("/dev/zero"),
        "directory": tmp_path,
        "nothing": tmp_path / "nothing",
    }


@pytest.mark.parametrize(
    "kind", ["pipe", "link", "socket", "device", "directory", "nothing"]
)
def test_what_is_no_regular_file_is_refused_at_once(
    odd_files: dict[str, Path], kind: str
) -> None:
    for read in (read_bytes, read_text, open_regular, sha256_file):
        with pytest.raises(PlacerError, match=r"is not a file|does not exist"):
            read(odd_files[kind])
    with pytest.raises(PlacerError, match=r"plan .* is not a file|plan .* does not exist"):
        read_json(odd_files[kind], "plan")


def test_a_file_is_read_up_to_the_limit_and_no_further(tmp_path: Path) -> None:
    path = tmp_path / "ten"
    path.write_bytes(b"0123456789")
    assert read_bytes(path, 10) == b"0123456789"
    with pytest.raises(PlacerError, match=r"has 10 bytes, but placer reads at most 9"):
        read_bytes(path, 9)


def test_a_file_that_hides_its_size_is_bounded_too() -> None:
    path = Path("/proc/self/status")
    assert path.stat().st_size == 0
    assert b"Name:" in read_bytes(path)
    for limit in (8, 0):
        words = f"has {limit + 1} bytes, but placer reads at most {limit}"
        with pytest.raises(PlacerError, match=words):
            read_bytes(path, limit)


def test_a_read_takes_no_more_memory_than_the_file(tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    short.write_bytes(b"0123456789")
    long.touch()
    os.truncate(long, MAX_DOCUMENT_BYTES + 1)
    tracemalloc.start()
    try:
        assert read_bytes(short) == b"0123456789"
        with pytest.raises(PlacerError, match="placer reads at most"):
            read_bytes(long)
        assert tracemalloc.get_traced_memory()[1] < MAX_DOCUMENT_BYTES / 16
    finally:
        tracemalloc.stop()


def test_text_is_utf8_and_keeps_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("häuser\r\n".encode())
    assert read_text(path) == "häuser\r\n"
    path.write_bytes("häuser".encode("latin-1"))
    with pytest.raises(PlacerError, match="is not UTF-8: byte 1 is 0xe4") as refused:
        read_text(path)
    assert "iconv" in str(refused.value.hint)


def test_an_archive_beyond_the_memory_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(
        path, experts=np.zeros((1000, 1, 1), dtype=np.int64), sequence_ids=np.zeros(1000)
    )
    with zipfile.ZipFile(path) as archive:
        size = sum(one.file_size for one in archive.infolist())
    assert size > 16_000 > 8 * path.stat().st_size
    require_fitting_archive(path)
    monkeypatch.setattr(archives, "memory_bytes", lambda: size - 1)
    with pytest.raises(
        PlacerError, match=rf"unpacks to {size:,}; .* and {size - 1:,} bytes, the memory"
    ):
        read_npz(path, None)


def test_what_is_missing_and_what_is_no_file_are_told_apart(
    odd_files: dict[str, Path],
) -> None:
    for kind, words in (("nothing", "does not exist"), ("directory", "is not a file")):
        with pytest.raises(PlacerError, match=words):
            read_bytes(odd_files[kind])


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(
    odd_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the path and the opening, somebody replaces the file."""
    monkeypatch.setattr(files, "require_file", lambda path, what: None)
    with pytest.raises(PlacerError, match="is not a file"):
        open_regular(odd_files["pipe"])
    own = odd_files["directory"] / "own"
    own.touch()
    with open_regular(own) as stream:
        assert not os.get_inheritable(stream.fileno())


def test_a_document_has_at_most_64_mebibytes(tmp_path: Path) -> None:
    """A sparse file: nothing of it is read."""
    assert MAX_DOCUMENT_BYTES == 64 * 1024 * 1024
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, MAX_DOCUMENT_BYTES + 1)
    with pytest.raises(PlacerError, match="placer reads at most 67,108,864"):
        read_bytes(path)


def test_the_memory_is_that_of_this_machine() -> None:
    text = Path("/proc/meminfo").read_text().split()
    assert memory_bytes() == int(text[text.index("MemTotal:") + 1]) * 1024


def test_canonical_json_has_one_text() -> None:
    one = canonical_json({"b": [1, None, True], "a": "\u00e4"})
    assert one == '{"a":"\u00e4","b":[1,null,true]}'
