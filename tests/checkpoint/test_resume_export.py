"""An export that is killed or fails goes on where it stopped, to the same bytes."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from placer.checkpoint.export import export_checkpoint, prepare_export, prepare_restore
from placer.checkpoint.writing import ExportOptions
from placer.cli.main import main
from placer.errors import PlacerError, UsageError
from placer.model import ModelSpec
from placer.placement import Placement
from placer.run.resumable import resumable_directory
from placer.run.writing import claimed

NUM_EXPERTS, NUM_SHARDS = 8, 12
CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "vocab_size": 128,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 8 experts in 12 shards; the last holds neither expert nor router."""
    folder = tmp_path_factory.mktemp("bulk") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(0)
    last = NUM_SHARDS - 1
    shards: list[dict[str, np.ndarray]] = [{} for _ in range(NUM_SHARDS)]
    shards[last]["model.embed_tokens.weight"] = rng.random((128, 64), np.float32)
    for layer in range(2):
        router = f"model.layers.{layer}.mlp.gate.weight"
        shards[layer][router] = rng.random((NUM_EXPERTS, 64), np.float32)
        for expert in range(NUM_EXPERTS):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            shard = shards[(layer * NUM_EXPERTS + expert) % last]
            shard[name] = rng.random((1 << 12, 64), np.float32)
    weight_map = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def plan(model: Path, write_plan: Callable[..., Path]) -> Path:
    """Every expert moves."""
    rows = [list(range(NUM_EXPERTS))[::-1]] * 2
    placement = Placement.from_json(rows, (NUM_EXPERTS,) * 2, num_ranks=4, num_nodes=1)
    return write_plan(ModelSpec.from_checkpoint(model), placement)


def hashes(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# Exports in a child that kills itself at the n-th call that changes the disk (none if n is
# 0) or is killed after some seconds. Prints the calls, if it comes so far, and the exit.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from placer.checkpoint.export import prepare_export
from placer.checkpoint.writing import ExportOptions

plan, model, out = map(Path, sys.argv[1:])
for line in sys.stdin:
    die_at, seconds, calls = *map(float, line.split()), 0
    child = os.fork()
    if child == 0:
        def counted(function):
            def call(*args, **kwargs):
                global calls
                calls += 1
                if calls == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call

        for holder, name in (
            (os, "pwrite"), (os, "copy_file_range"), (os, "fsync"), (os, "rename"),
            (os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "link"),
        ):
            setattr(holder, name, counted(getattr(holder, name)))
        options = ExportOptions(num_workers=2, link=True, with_hashes=True)
        prepare_export(plan, model).write(out, options)
        # One call: a line that is cut off by a kill would never end.
        os.write(1, f"calls {calls}\\n".encode())
        os._exit(0)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(1, f"exit {exit_code}\\n".encode())
"""


Killer = Callable[..., dict[str, int]]


@pytest.fixture
def killer(plan: Path, model: Path, tmp_path: Path) -> Iterator[Killer]:
    """Runs exports to ``out`` in children of a process that has imported all they need."""
    words = [sys.executable, "-c", KILLED, plan, model, tmp_path / "out"]
    with subprocess.Popen(
        list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(die_at: int = 0, seconds: float = 0.0) -> dict[str, int]:
            process.stdin.write(f"{die_at} {seconds}\n")
            process.stdin.flush()
            said: dict[str, int] = {}
            while "exit" not in said:
                what, value = process.stdout.readline().split()
                said[what] = int(value)
            return said

        yield run
        process.stdin.close()


def export_whole(plan: Path, model: Path, out: Path) -> tuple[dict[str, str], int]:
    """Export with the options of the killed runs."""
    options = ExportOptions(link=True, with_hashes=True)
    report = prepare_export(plan, model).write(out, options)
    return hashes(out), report.num_resumed


def test_killed_at_any_call_it_goes_on_to_the_same_bytes(
    killer: Killer, plan: Path, model: Path, tmp_path: Path
) -> None:
    """At 20 calls out of all that change the disk, the last four among them."""
    out, before = tmp_path / "out", hashes(model)
    expected, _ = export_whole(plan, model, tmp_path / "whole")
    said = killer()
    assert said["exit"] == 0
    assert hashes(out) == expected
    last = said["calls"]
    moments = random.Random(0).sample(range(1, last - 3), 16)
    resumed = []
    for moment in (*moments, *range(last - 3, last + 1)):
        shutil.rmtree(out)
        assert killer(die_at=moment)["exit"] == -signal.SIGKILL
        assert out.exists() == (moment >= last - 1), "nothing looks complete that is not"
        found, num_resumed = export_whole(plan, model, out)
        assert found == expected
        resumed.append(num_resumed)
        assert {path.name for path in tmp_path.iterdir()} == {plan.name, "out", "whole"}
    assert resumed[-2:] == [NUM_SHARDS] * 2, "at the last calls everything was finished"
    assert len(set(resumed)) > 3
    assert hashes(model) == before


def test_killed_at_random_times_over_and_over_it_still_ends(
    killer: Killer, plan: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    expected, _ = export_whole(plan, model, tmp_path / "whole")
    killer()  # the first one waits for imports
    shutil.rmtree(out)
    began = time.perf_counter()
    killer()
    seconds = time.perf_counter() - began
    rng, exits = random.Random(0), set()
    for _ in range(20):
        if out.exists():
            shutil.rmtree(out)
        exits.add(killer(seconds=rng.random() * seconds)["exit"])
    assert -signal.SIGKILL in exits
    if not out.exists():
        assert killer()["exit"] == 0
    assert hashes(out) == expected


def test_what_another_export_left_is_not_used(
    plan: Path, model: Path, write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [[*range(1, NUM_EXPERTS), 0]] * 2
    placement = Placement.from_json(rows, (NUM_EXPERTS,) * 2, num_ranks=4, num_nodes=1)
    other = write_plan(ModelSpec.from_checkpoint(model), placement, "other.json")
    out = tmp_path / "out"
    interrupt(other, model, out)
    with pytest.raises(PlacerError, match="begun with other input or other options"):
        prepare_export(plan, model).write(out)
    with claimed(out, directory=True, force=True):
        assert prepare_export(plan, model).write(out).num_resumed == 0
    export_checkpoint(plan, model, tmp_path / "whole")
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_finished_shard_that_was_damaged_since_is_written_again(
    plan: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    num_finished = interrupt(plan, model, out)
    first, second, third, *_ = sorted(
        (tmp_path / "out.placer-partial").glob("*.safetensors")
    )
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    third.write_bytes(b"x" + third.read_bytes()[1:])
    report = prepare_export(plan, model).write(out)
    assert report.num_resumed == num_finished - 3
    export_checkpoint(plan, model, tmp_path / "whole")
    assert hashes(out) == hashes(tmp_path / "whole")


def interrupt(plan: Path, model: Path, out: Path) -> int:
    """Press Control-C when some shards are finished; return how many at least."""

    def progress(text: str) -> None:
        if int(text.split()[0]) >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        prepare_export(plan, model).write(out, ExportOptions(num_workers=1), progress)
    assert "to continue" in caught.value.__notes__[0]
    assert not out.exists()
    return len(list(out.with_name("out.placer-partial").glob("*.safetensors")))


def test_an_interrupted_inverse_goes_on(plan: Path, model: Path, tmp_path: Path) -> None:
    export_checkpoint(plan, model, tmp_path / "out")

    def progress(text: str) -> None:
        if int(text.split()[0]) >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device"):
        prepare_restore(tmp_path / "out").write(
            tmp_path / "back", ExportOptions(num_workers=1), progress
        )
    report = prepare_restore(tmp_path / "out").write(tmp_path / "back")
    assert report.num_resumed >= 3
    assert hashes(tmp_path / "back") == hashes(model)


def test_a_journal_that_was_cut_off_counts_whole_lines(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), resumable_directory(out, "a") as (_, journal):
        journal.add("one", {"linked": False})
        journal.add("two", {"linked": True})
        raise KeyboardInterrupt
    path = tmp_path / ".out.placer"
    path.write_text(path.read_text()[:-4])
    with resumable_directory(out, "a") as (_, journal):
        assert journal.finished == {"one": {"linked": False}}
        journal.add("two", {"linked": True})
        lines = path.read_text().splitlines()
        assert json.loads(lines[-1]) == {"linked": True, "part": "two"}
    assert out.is_dir()
    assert not path.exists()


def fails_with(number: int, plan: Path, model: Path, out: Path) -> None:
    before = hashes(model)
    with pytest.raises((OSError, PlacerError)) as caught:
        export_checkpoint(plan, model, out, ExportOptions(num_workers=1))
    assert os.strerror(number) in str(caught.value)
    assert not out.exists()
    assert hashes(model) == before


def test_a_file_that_may_not_grow_leaves_nothing(
    plan: Path, model: Path, tmp_path: Path
) -> None:
    """The system refuses in the middle of the first shard."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, old[1]))
    try:
        fails_with(errno.EFBIG, plan, model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [path.name for path in tmp_path.iterdir()] == [plan.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB; the model has 17 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)]
    try:
        done = subprocess.run(words, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_source_and_nothing_that_looks_complete(
    plan: Path, model: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small_disk / "out"
    with pytest.raises(PlacerError, match=r"needs 1\d+ bytes, but .* has 1\d+ bytes free"):
        export_checkpoint(plan, model, out)
    assert list(small_disk.iterdir()) == []
    # Somebody else fills the disk between the check and the end.
    monkeypatch.setattr("placer.checkpoint.writing.require_free_space", lambda *_: None)
    fails_with(errno.ENOSPC, plan, model, out)
    left = {path.name for path in small_disk.iterdir()}
    assert left == {"out.placer-partial", ".out.placer"}
    assert not (small_disk / "out.placer-partial" / "placer.json").exists()


def test_unchanged_shards_are_linked_and_only_they(
    plan: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = export_checkpoint(plan, model, out, ExportOptions(link=True))
    linked = [p.name for p in out.iterdir() if p.stat().st_nlink > 1]
    assert linked == [f"model-{NUM_SHARDS:05}-of-{NUM_SHARDS:05}.safetensors"]
    assert report.num_linked == 1
    assert (out / linked[0]).samefile(model / linked[0])
    export_checkpoint(plan, model, tmp_path / "copied")
    assert hashes(out) == hashes(tmp_path / "copied")
    prepare_restore(out).write(tmp_path / "back", ExportOptions(link=True))
    assert hashes(tmp_path / "back") == hashes(model)


def test_where_links_are_impossible_shards_are_copied(
    plan: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    report = export_checkpoint(plan, model, tmp_path / "out", ExportOptions(link=True))
    assert report.num_linked == 0
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "out").iterdir())


def test_a_dry_run_lists_every_shard_and_writes_nothing(
    plan: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "checkpoint", str(plan), str(model), "--dry-run"]
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--json", "--link"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, *more])
        assert ended.value.code == 0
        assert sorted(tmp_path.rglob("*")) == before
        printed = capsys.readouterr().out
    found = json.loads(printed)
    assert [one["bytes"] for one in found["shards"]] == [
        path.stat().st_size for path in sorted(model.glob("*.safetensors"))
    ]
    assert [one["how"] for one in found["shards"]] == ["write"] * 11 + ["link"]
    others = ("config.json", "model.safetensors.index.json")
    assert found["bytes_to_write"] == sum(
        one["bytes"] for one in found["shards"][:-1]
    ) + sum((model / name).stat().st_size for name in others)


def test_less_than_one_worker_is_refused(plan: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="workers must be at least 1, got 0"):
        export_checkpoint(plan, model, tmp_path / "out", ExportOptions(num_workers=0))


def test_a_source_that_shrinks_while_it_is_read_is_named(
    plan: Path, model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    job = prepare_export(plan, copy)
    shard = min(copy.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(PlacerError, match="changed while it was read: size"):
        job.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(PlacerError):
        prepare_export(plan, copy)
