"""Outputs are whole or absent, and nothing of somebody else's is touched."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from placer.errors import PlacerError, UsageError
from placer.run import writing
from placer.run.resumable import resumable_directory
from placer.run.writing import (
    Claim,
    atomic_directory,
    atomic_file,
    claimed,
    lock_path,
    rename_directory,
    require_free_space,
    require_target,
    write_tensors,
)

HOLD = """
import sys
from pathlib import Path
from placer.run.writing import claimed
with claimed(Path(sys.argv[1]), directory=False):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_another_process_is_kept_out_until_the_first_ends(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for end in ("closed", "killed"):
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout.readline() == "claimed\n"
            for take in (
                lambda: claimed(out, directory=False),
                lambda: resumable_directory(out, "a"),
            ):
                with pytest.raises(PlacerError, match="another process is writing"), take():
                    pass
            if end == "killed":
                process.kill()
        with claimed(out, directory=False):
            pass
        assert names(tmp_path) == set()


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_file(out) as temporary:
        temporary.write_text("new")
        assert not out.exists()
        assert temporary.parent == tmp_path
    assert out.read_text() == "new"
    assert out.stat().st_mode & 0o777 == 0o666 & ~_umask()
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error), atomic_file(out) as temporary:
            temporary.write_text("half")
            raise error
    assert out.read_text() == "new"
    assert names(tmp_path) == {"out"}


def test_temporaries_have_names_that_nobody_can_guess(tmp_path: Path) -> None:
    """What lies at the names of before, a link out of the folder too, stays as it is."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out.partial").symlink_to(victim)
    (tmp_path / "out.journal").write_text("precious")
    seen = set()
    for _ in range(2):
        with atomic_file(tmp_path / "out") as temporary:
            seen.add(temporary)
    with atomic_directory(tmp_path / "folder") as temporary:
        seen.add(temporary)
    assert len(seen) == 3
    assert victim.read_text() == (tmp_path / "out.journal").read_text() == "precious"
    assert (tmp_path / "out.partial").is_symlink()
    assert names(tmp_path) == {"victim", "out.partial", "out.journal", "out", "folder"}


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        atomic_directory(tmp_path / "a" / "b") as temporary,
    ):
        (temporary / "file").touch()
        raise ZeroDivisionError
    assert names(tmp_path) == set(), "parents that were made for it go too"
    with atomic_directory(tmp_path / "a" / "b") as temporary:
        (temporary / "file").touch()
    assert names(tmp_path / "a") == {"b"}
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o777 & ~_umask()
    with (
        pytest.raises(PlacerError, match="already exists"),
        atomic_directory(tmp_path / "a" / "b"),
    ):
        pass


def test_force_replaces_only_what_placer_wrote(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for held in ({"trace.json", "chunk-00000.safetensors"}, {"frontier.csv"}, set()):
        for name in held:
            (out / name).touch()
        with (
            claimed(out, directory=True, force=True),
            atomic_directory(out) as temporary,
        ):
            (temporary / "new").touch()
        assert names(out) == {"new"}
        (out / "new").unlink()
    for held in ({"notes"}, {"trace.json", "notes"}):
        for name in held:
            (out / name).touch()
        with pytest.raises(PlacerError, match="holds notes, which placer did not write"):
            require_target(out, directory=True, force=True)
        assert names(out) == held
    assert names(tmp_path) == {"out"}


def test_a_failure_leaves_what_force_would_have_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "trace.json").write_text("old")
    with (
        pytest.raises(ZeroDivisionError),
        claimed(out, directory=True, force=True),
        atomic_directory(out),
    ):
        raise ZeroDivisionError
    assert (out / "trace.json").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_a_signal_after_the_new_output_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is older is removed all the same, and the error says what is there."""
    out, remove, calls = tmp_path / "out", shutil.rmtree, []

    def interrupted(path: Path, ignore_errors: bool) -> None:
        assert ignore_errors, "what cannot be removed would hide the signal"
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(path, ignore_errors=ignore_errors)

    out.mkdir()
    (out / "trace.json").write_text("old")
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        claimed(out, directory=True, force=True),
        atomic_directory(out) as temporary,
    ):
        (temporary / "trace.json").write_text("new")
    assert (out / "trace.json").read_text() == "new"
    assert names(tmp_path) == {"out"}
    assert caught.value.__notes__ == [f"{out} was written before this"]


Meeting = Callable[[Path, Path], Path]


def _hard_link(source: Path, folder: Path) -> Path:
    os.link(source / "config.json", folder / "hard")
    return folder / "hard"


def _link(source: Path, folder: Path) -> Path:
    (folder / "link").symlink_to(source)
    return folder / "link" / "new.json"


@pytest.mark.parametrize(
    ("place", "relation"),
    [
        (lambda source, _: source, "is the input"),
        (lambda source, _: source / "config.json", "is inside the input"),
        (lambda source, _: source / "deep" / "new.json", "is inside the input"),
        (lambda source, _: source / ".." / "model" / "new.json", "is inside the input"),
        (lambda source, _: source.parent, "holds the input"),
        (_hard_link, "is a file in the input"),
        (_link, "is inside the input"),
    ],
)
@pytest.mark.parametrize("force", [True, False])
def test_an_input_is_never_written(
    place: Meeting, relation: str, force: bool, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=relation):
        require_target(place(source, tmp_path), [source], directory=False, force=force)


def test_what_lies_beside_an_input_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "plan.json").touch()
    inputs = [tmp_path / "model", tmp_path / "plan.json", tmp_path / "nowhere"]
    for name in ("model-2", "plan.json.2", "nowhere/plan.json"):
        require_target(tmp_path / name, inputs, directory=False)


@pytest.mark.parametrize("directory", [True, False])
def test_what_is_no_file_and_no_directory_is_never_replaced(
    tmp_path: Path, directory: bool
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    odd = ["pipe", "file" if directory else "folder"]
    for name in odd:
        with pytest.raises(PlacerError, match=r"but the command writes a (file|directory)"):
            require_target(tmp_path / name, directory=directory, force=True)


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    require_target(tmp_path / "link", directory=False, force=True)
    with atomic_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "old").read_text() == "old"
    assert (tmp_path / "link").read_text() == "new"


def test_a_directory_that_is_not_placers_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "out.placer-partial").mkdir()
    (tmp_path / "out.placer-partial" / "precious").touch()
    for force in (True, False):
        with (
            pytest.raises(PlacerError, match="placer did not make it"),
            claimed(tmp_path / "out", directory=True, force=force),
            resumable_directory(tmp_path / "out", "a"),
        ):
            pass
    assert names(tmp_path) == {"out.placer-partial"}
    assert names(tmp_path / "out.placer-partial") == {"precious"}


def test_only_the_owner_reads_what_is_half_written(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "out") as temporary:
        assert temporary.stat().st_mode & 0o777 == 0o600
    with atomic_directory(tmp_path / "a" / "b" / "folder") as temporary:
        assert temporary.stat().st_mode & 0o777 == 0o700
        lock = lock_path(tmp_path / "a" / "b" / "folder")
        assert lock.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert names(tmp_path / "a" / "b") == {"folder"}


def test_what_a_failed_block_removed_itself_is_no_other_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "out") as temporary:
        temporary.unlink()
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out") as temporary:
        temporary.rmdir()
        raise ZeroDivisionError
    with claimed(tmp_path / "out", directory=False):
        lock_path(tmp_path / "out").unlink()
    assert names(tmp_path) == set()


def test_a_journal_stays_for_the_run_that_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claimed(out, directory=True) as claim:
        claim.stream.write("begun")
        claim.stream.flush()
    assert lock_path(out).read_text() == "begun"
    with claimed(out, directory=True) as claim:
        claim.stream.truncate(0)
    assert names(tmp_path) == set()


def test_a_directory_that_its_journal_names_was_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    journal = {"inode": out.stat().st_ino}
    for text, complete in (
        (json.dumps(journal) + "\n{}", True),
        (json.dumps(journal | {"inode": 1}) + "\n{}", False),
        ("[]", False),
        ("{", False),
    ):
        lock_path(out).write_text(text)
        if complete:
            require_target(out, directory=True)
        else:
            with pytest.raises(PlacerError, match="already exists"):
                require_target(out, directory=True)


@pytest.mark.parametrize("name", ["", "..", "a/.."])
def test_a_target_has_a_name(name: str) -> None:
    with pytest.raises(UsageError, match="not the name of a file or directory"):
        require_target(Path(name), directory=True, force=True)


def test_a_link_is_never_replaced_by_a_directory(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with pytest.raises(PlacerError, match="is a link, but the command writes a directory"):
        require_target(tmp_path / "link", directory=True, force=True)
    (tmp_path / "file").touch()
    reached = False
    with (
        pytest.raises(PlacerError, match="is a file, but the command writes a directory"),
        atomic_directory(tmp_path / "file"),
    ):
        reached = True
    assert not reached, "nothing is written before the target is looked at"


def claim(force: bool, folder: Path) -> Claim:
    return Claim(force=force, stream=(folder / "stream").open("w"))


def test_what_was_there_comes_back_where_the_new_cannot_have_its_name(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError):
        rename_directory(tmp_path / "nowhere", out, claim(True, tmp_path))
    assert not out.exists()
    out.mkdir()
    (out / "trace.json").write_text("old")
    with pytest.raises(FileNotFoundError):
        rename_directory(tmp_path / "nowhere", out, claim(True, tmp_path))
    assert (out / "trace.json").read_text() == "old"
    assert names(tmp_path) == {"out", "stream"}


def test_what_was_there_is_kept_where_it_cannot_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, new, rename = tmp_path / "out", tmp_path / "new", Path.rename
    for folder in (out, new):
        folder.mkdir()
        (folder / "trace.json").write_text(folder.name)

    def refuse(self: Path, target: Path) -> Path:
        if target == out:
            raise OSError(errno.EIO, "the disk failed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="the disk failed"):
        rename_directory(new, out, claim(True, tmp_path))
    (kept,) = tmp_path.glob(".out.*")
    assert (kept / "trace.json").read_text() == "out"
    assert names(tmp_path) == {kept.name, "new", "stream"}


def test_the_new_stays_where_only_the_flush_of_its_name_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, new = tmp_path / "out", tmp_path / "new"
    out.mkdir()
    (out / "trace.json").write_text("old")
    new.mkdir()
    (new / "trace.json").write_text("new")

    def flush(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "the disk failed")

    monkeypatch.setattr(writing, "flush_to_disk", flush)
    with pytest.raises(OSError, match="the disk failed"):
        rename_directory(new, out, claim(True, tmp_path))
    assert (out / "trace.json").read_text() == "new"
    assert names(tmp_path) == {"out", "stream"}


def test_an_old_directory_that_cannot_be_removed_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, new = tmp_path / "out", tmp_path / "new"
    for folder in (out, new):
        folder.mkdir()
        (folder / "trace.json").touch()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "unlink", refuse)
    rename_directory(new, out, claim(True, tmp_path))
    assert not new.exists()


def test_all_of_a_directory_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    with atomic_directory(tmp_path / "out") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_text("new")
        (temporary / "link").symlink_to("nowhere")  # it has no content to flush
        monkeypatch.setattr(os, "fsync", record)
    out = tmp_path / "out"
    inside = {path.stat().st_ino for path in (out, out / "deep", out / "deep" / "file")}
    assert set(flushed[:-1]) == inside
    assert flushed[-1] == tmp_path.stat().st_ino


def test_tensors_have_one_metadata_key_or_none(tmp_path: Path) -> None:
    tensors = {"a": np.arange(3)}
    for header, expected in (({"b": 1}, {"placer": '{"b":1}'}), (None, None)):
        write_tensors(tmp_path / "out", tensors, header)
        with safe_open(tmp_path / "out", "np") as file:
            assert file.metadata() == expected
            assert file.get_tensor("a").tolist() == [0, 1, 2]


def test_space_is_looked_for_where_the_file_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def usage(path: Path) -> object:
        asked.append(path)
        return shutil._ntuple_diskusage(5000, 4000, 1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    target = tmp_path / "a" / "b" / "out"
    require_free_space(target, 1000)
    with pytest.raises(PlacerError, match=r"needs 1001 bytes, but .* has 1000 bytes free"):
        require_free_space(target, 1001)
    assert asked == [tmp_path, tmp_path]


def test_a_lock_that_another_process_removed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had the lock, wrote the file, removed the lock and let go, all in between."""
    out, flock, times = tmp_path / "out", fcntl.flock, []

    def late(stream: object, flags: int) -> None:
        flock(stream, flags)
        times.append(flags)
        if len(times) == 1:
            lock_path(out).unlink()
            lock_path(out).touch()
        if len(times) == 2:
            lock_path(out).unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed(out, directory=False) as found:
        held = os.fstat(found.stream.fileno())
        assert os.path.samestat(held, lock_path(out).lstat())
    assert len(times) == 3


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with atomic_directory(tmp_path / "out") as temporary:
        (temporary / "file").touch()
    assert names(tmp_path) == {"out"}


ENDED = """
import os, signal, sys
from pathlib import Path
import placer.cli.main as cli
from placer.placement import Plan

# In the background of a shell Ctrl-C is ignored, and under nohup SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def write(self, path):
    from placer.run.writing import atomic_file
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), int(sys.argv[1]))
        signal.pause()

Plan.write = write
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_removes_what_is_half_written(
    number: signal.Signals, make_trace: Callable[..., object], tmp_path: Path
) -> None:
    make_trace()
    words = ["solve", tmp_path / "trace", "--gpus-per-node", 2, "--max-imbalance", 3]
    words += ["--num-rounds", 0, "--proof", "none", "--out", tmp_path / "plan.json"]
    done = subprocess.run(
        [sys.executable, "-c", ENDED, str(int(number)), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == {"trace"}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
