"""Workers under torchrun write what one process writes, byte for byte."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from placer.errors import PlacerError, UsageError
from placer.run.worker import Worker
from placer.trace import Chunk, Trace, TraceWriter
from placer.trace.corpus import name_corpora
from placer.trace.parts import part_of, put_together
from placer.trace.record import RecordOptions, record

OPTIONS = ("--sequence-length", "24", "--batch-size", "3", "--chunk-tokens", "60")


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def torchrun(number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    return subprocess.run(
        [sys.executable, *command, "-m", "placer.cli.main", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The sum of two numbers. " * 40)
    return path


def test_two_workers_write_the_bytes_of_one(
    tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    options = RecordOptions(sequence_length=24, batch_size=3, chunk_tokens=60)
    corpora = name_corpora([text], [], None)
    header = record(tiny_model, corpora, tmp_path / "one", options)
    assert len(header.chunks) > 3
    out = tmp_path / "two"
    done = torchrun(
        2, "record", str(tiny_model), "--corpus", str(text), "--out", str(out), *OPTIONS
    )
    assert done.returncode == 0, done.stderr
    assert files(out) == files(tmp_path / "one")
    assert done.stdout.count("num_tokens") == 1, "one worker speaks"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "text.txt", "two"]


def parts(out: Path, trace: Trace, number: int) -> list[int]:
    """Deal the chunks of a trace out to workers, as they would have written them."""
    chunks = list(trace.chunks())
    counts = []
    for index in range(number):
        mine = chunks[index::number]
        counts.append(len(mine))
        if not mine:
            continue
        directory = part_of(Worker(index=index, number=number), out)
        with TraceWriter(directory=directory, model=trace.model) as writer:
            for chunk in mine:
                writer.append(chunk)
            writer.finish()
    return counts


@pytest.fixture
def trace(
    make_chunk: Callable[..., Chunk], make_trace: Callable[..., Trace], tmp_path: Path
) -> Trace:
    """A trace of five chunks."""
    chunk, model = make_chunk(num_sequences=10), make_trace().model
    with TraceWriter(directory=tmp_path / "five", model=model) as writer:
        for part in range(5):
            writer.append(chunk.select(chunk.sequence_ids // 2 == part))
        writer.finish()
    return Trace(tmp_path / "five")


@pytest.mark.parametrize("number", [2, 3, 5, 7])
def test_parts_are_put_together_in_order(number: int, trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    put_together(out, parts(out, trace, number))
    assert files(out) == files(trace.directory)
    assert not list(tmp_path.glob("out.part*"))


def test_a_part_that_is_not_there_is_told(trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    counts = parts(out, trace, 2)
    shutil.rmtree(tmp_path / "out.part-1-of-2")
    with pytest.raises(
        PlacerError, match=r"out\.part-1-of-2 that worker 1 wrote"
    ) as caught:
        put_together(out, counts)
    assert "share" in caught.value.hint
    assert not out.exists()
    assert (tmp_path / "out.part-0-of-2").is_dir(), "what is done is kept"


def test_a_part_of_other_options_is_refused(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpora = name_corpora([text], [], None)
    worker = Worker(index=0, number=2)
    record(tiny_model, corpora, part_of(worker, tmp_path / "out"), RecordOptions(seed=1))
    monkeypatch.setattr("placer.trace.record.together", nullcontext)
    with pytest.raises(PlacerError, match="recorded with another model, corpus or options"):
        record(tiny_model, corpora, tmp_path / "out", RecordOptions(seed=2), worker=worker)


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Worker.of_environment() == Worker()
    assert Worker().device("cuda") == "cuda"
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    worker = Worker.of_environment()
    assert (worker.index, worker.number) == (5, 8)
    assert worker.device("cuda") == "cuda:1"
    assert worker.device("cpu") == "cpu"
    assert [n for n in range(20) if worker.takes(n)] == [5, 13]
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UsageError, match="RANK is 5, WORLD_SIZE 5"):
        Worker.of_environment()


def test_standard_input_is_not_shared(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"some text")))
    corpora = name_corpora([Path("-")], [], None)
    with pytest.raises(UsageError, match="cannot share standard input"):
        record(
            tiny_model,
            corpora,
            tmp_path / "t",
            RecordOptions(),
            worker=Worker(index=0, number=2),
        )
