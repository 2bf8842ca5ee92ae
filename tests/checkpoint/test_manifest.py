"""Every byte of an exported checkpoint is vouched for, and its source stays the same."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from placer.checkpoint.export import export_checkpoint, prepare_export, prepare_restore
from placer.checkpoint.ranks import prepare_ranks
from placer.checkpoint.verify import verify
from placer.checkpoint.writing import ExportOptions
from placer.errors import PlacerError, VerificationError
from tests.checkpoint.test_export_checkpoint import MakePlan, hashes

WITH_HASHES = ExportOptions(with_hashes=True)


def through_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel copy nothing, as between two file systems."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr("os.copy_file_range", refuse)


@pytest.fixture
def model(tiny_sharded_model: Path, tmp_path: Path) -> Path:
    """With files in a folder, as released checkpoints have them."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_sharded_model, copy)
    (copy / "assets").mkdir()
    (copy / "assets" / "logo.png").write_bytes(b"\x89PNG" + bytes(64))
    (copy / "generation_config.json").write_text('{"eos_token_id": 2}')
    return copy


def flips(directory: Path, seed: int, each: int) -> list[tuple[Path, bytes]]:
    """Every file, some times each, with one bit flipped."""
    rng, found = random.Random(seed), []
    for path in sorted(directory.rglob("*")):
        for _ in range(each if path.is_file() else 0):
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            found.append((path, bytes(content)))
    return found


def unnoticed(
    directory: Path, check: Callable[[], object], seed: int, each: int
) -> list[str]:
    """Names of the files in which a flipped bit passed the check."""
    passed = []
    for path, flipped in flips(directory, seed, each):
        content = path.read_bytes()
        path.write_bytes(flipped)
        try:
            check()
        except PlacerError:
            pass
        else:
            passed.append(path.name)
        path.write_bytes(content)
    return passed


def test_verify_finds_every_flipped_bit_of_every_file(
    model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan, out = make_plan(model), tmp_path / "out"
    export_checkpoint(plan, model, out)
    assert unnoticed(out, lambda: verify(model, out, plan, [], 0), seed=0, each=8) == []


@pytest.mark.parametrize("how", ["--hash", "copied by this process"])
def test_inverse_finds_every_flipped_bit_of_every_file(
    model: Path,
    make_plan: MakePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    plan, out = make_plan(model), tmp_path / "out"
    if how == "--hash":
        export_checkpoint(plan, model, out, WITH_HASHES)
    else:
        through_the_process(monkeypatch)
        export_checkpoint(plan, model, out)

    def restore() -> None:
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
        assert prepare_restore(out).write(tmp_path / "back").unchecked == ()

    assert unnoticed(out, restore, seed=1, each=4) == []
    restore()
    assert hashes(tmp_path / "back") == hashes(model)


def test_inverse_says_what_it_cannot_vouch_for(
    model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    """Shards that the kernel copied, files that came later; small files it always can."""
    plan, out = make_plan(model), tmp_path / "out"
    export_checkpoint(plan, model, out)
    record = json.loads((out / "placer.json").read_text())
    shards = {path.name for path in out.glob("*.safetensors")}
    (out / "NOTES.md").write_text("ours")
    back = prepare_restore(out).write(tmp_path / "back")
    assert set(back.unchecked) == {"NOTES.md", *(shards - record["file_sha256"].keys())}
    assert not back.to_json()["contents_checked"]
    (out / "generation_config.json").unlink()
    with pytest.raises(VerificationError, match=r"generation_config\.json .* is missing"):
        prepare_restore(out).write(tmp_path / "again")
    with pytest.raises(VerificationError, match=r"has NOTES\.md, which .* does not have"):
        (out / "generation_config.json").write_text('{"eos_token_id": 2}')
        verify(model, out, plan, [], 0)


def edit(path: Path) -> None:
    """Same size, other content, another time."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def edit_in_secret(path: Path) -> None:
    """Same size and time, other content."""
    before = path.stat()
    edit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(path: Path) -> None:
    """The same content, in another file of the same size and time."""
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


SHARD = "model-00002-of-"


@pytest.mark.parametrize("target", ["checkpoint", "inverse", "ranks"])
@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("config.json", edit, "changed while it was read"),
        ("config.json", edit_in_secret, "its content"),
        ("tokenizer.json", edit_in_secret, "its content"),
        ("tokenizer.json", Path.unlink, "removed"),
        ("assets/logo.png", swap, "inode"),
        (SHARD, edit, "time of the last change"),
        (SHARD, swap, "inode"),
        (SHARD, lambda path: path.write_bytes(path.read_bytes() + b" "), "size"),
        ("model.safetensors.index.json", edit, "time of the last change"),
    ],
)
def test_a_source_that_changes_during_the_command_ends_it(
    model: Path,
    make_plan: MakePlan,
    tmp_path: Path,
    target: str,
    name: str,
    change: Callable[[Path], object],
    match: str,
) -> None:
    plan, out, source = make_plan(model), tmp_path / "out", model
    if target == "inverse":
        source = tmp_path / "exported"
        export_checkpoint(plan, model, source)
    path = next(one for one in source.rglob("*") if name in str(one.relative_to(source)))
    job = {
        "checkpoint": lambda: prepare_export(plan, model),
        "inverse": lambda: prepare_restore(source),
        "ranks": lambda: prepare_ranks(plan, model, experts_only=False),
    }[target]()
    changed: list[str] = []

    def progress(_: str) -> None:
        if not changed:
            change(path)
            changed.append(name)

    with pytest.raises(PlacerError, match=match) as caught:
        job.write(out, ExportOptions(num_workers=1), progress)
    assert str(path.name) in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


def test_a_kept_shard_is_read_again(
    model: Path, make_plan: MakePlan, tmp_path: Path
) -> None:
    """One flipped bit in the weights of a shard that an interrupted run had finished."""

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    plan, out = make_plan(model), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare_export(plan, model).write(out, ExportOptions(num_workers=1), interrupt)
    shards = sorted((tmp_path / "out.placer-partial").glob("*.safetensors"))
    edit_in_secret(shards[0])
    assert prepare_export(plan, model).write(out).num_resumed == len(shards) - 1
    export_checkpoint(plan, model, tmp_path / "whole")
    assert hashes(out) == hashes(tmp_path / "whole")
