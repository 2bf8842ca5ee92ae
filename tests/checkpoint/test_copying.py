"""Ranges and blocks arrive where they should, whatever the kernel can do."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placer.checkpoint.copying import block_ranges, sha256_of_contents, write_contents
from placer.errors import PlacerError

CONTENT = np.random.default_rng(0).bytes(5000)
Opened = tuple[int, int, Path]


def refuse(number: int) -> Callable[..., int]:
    def call(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


def a_little(source: int, target: int, count: int, *offsets: int) -> int:
    """A kernel that copies a few bytes a call, as it may."""
    return KERNEL(source, target, min(count, 7), *offsets)


KERNEL = os.copy_file_range
KERNELS = {
    "as it is": KERNEL,
    "a little at a time": a_little,
    "across devices": refuse(errno.EXDEV),
    "not implemented": refuse(errno.ENOSYS),
    "says that there is nothing": lambda *_: 0,
}


@pytest.fixture(params=KERNELS)
def files(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Opened]:
    monkeypatch.setattr("os.copy_file_range", KERNELS[request.param])
    (tmp_path / "source").write_bytes(CONTENT)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb") as t:
        yield source.fileno(), t.fileno(), tmp_path / "target"


def test_a_range_goes_to_another_offset(files: Opened) -> None:
    source, target, path = files
    contents = [bytes(300), range(10, 4010)]
    sha256 = write_contents(source, target, contents)
    found = path.read_bytes()
    assert found == bytes(300) + CONTENT[10:4010]
    assert sha256_of_contents(source, contents) == hashlib.sha256(found).hexdigest()
    assert sha256 in (None, hashlib.sha256(found).hexdigest())
    assert (sha256 is None) == (os.copy_file_range in (KERNEL, a_little))


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(order=st.permutations(range(10)))
def test_blocks_are_reordered(files: Opened, order: list[int]) -> None:
    source, target, path = files
    write_contents(source, target, block_ranges(100, 100, np.asarray(order)))
    blocks = [CONTENT[100 + 100 * old : 200 + 100 * old] for old in order]
    assert path.read_bytes() == b"".join(blocks)


def test_a_source_that_ends_early_is_refused(files: Opened) -> None:
    source, target, _ = files
    with pytest.raises(PlacerError, match="ended at byte 5000 but 1 more"):
        write_contents(source, target, [range(4000, 5001)])


def test_a_failure_of_the_disk_is_not_taken_for_a_lack_of_support(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.copy_file_range", refuse(errno.ENOSPC))
    (tmp_path / "a").write_bytes(CONTENT)
    with (
        (tmp_path / "a").open("rb") as a,
        (tmp_path / "b").open("wb") as b,
        pytest.raises(OSError, match="No space left"),
    ):
        write_contents(a.fileno(), b.fileno(), [range(10)])
