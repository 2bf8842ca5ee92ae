"""Several processes count what one counts; what goes wrong in one of them is told."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from placer.affinity import Affinity, count_affinity, from_traces
from placer.affinity.count import count_sources
from placer.affinity.from_traces import affinity_of_traces
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.trace import EVERYTHING, Chunk, Fold, Selection, Trace, TraceWriter

MODEL = ModelSpec(num_experts=(8, 8, 8), top_k=2)


def die() -> Iterator[Chunk]:
    os.kill(os.getpid(), signal.SIGKILL)
    return iter(())


def nothing() -> Iterator[Chunk]:
    return iter(())


def read(directory: Path) -> Iterator[Chunk]:
    return Trace(directory).chunks()


@pytest.fixture
def trace(
    make_chunk: Callable[..., Chunk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Trace:
    """A trace of five chunks, of which every token is worth a process."""
    monkeypatch.setattr(from_traces, "_WORTH_A_WORKER", 1)
    chunk = make_chunk(num_sequences=10)
    with TraceWriter(directory=tmp_path / "t", model=MODEL) as writer:
        for part in range(5):
            writer.append(chunk.select(chunk.sequence_ids // 2 == part))
        writer.finish()
    return Trace(tmp_path / "t")


def same(one: Affinity, other: Affinity) -> bool:
    return all(
        np.array_equal(counts, other.tensors()[name])
        for name, counts in one.tensors().items()
    )


@pytest.mark.parametrize("selection", [EVERYTHING, Selection(Fold(1, 9))])
def test_two_processes_write_the_same_bytes(
    trace: Trace, tmp_path: Path, selection: Selection
) -> None:
    for number in (1, 2):
        affinity_of_traces([trace], selection, number).write(
            tmp_path / f"{number}.safetensors"
        )
    one, two = ((tmp_path / f"{n}.safetensors").read_bytes() for n in (1, 2))
    assert one == two


@pytest.mark.parametrize("num_workers", [2, 3, 5, 99])
def test_runs_of_chunks_cover_the_trace_once(trace: Trace, num_workers: int) -> None:
    sources = from_traces._sources(trace, EVERYTHING, num_workers)
    assert len(sources) == min(num_workers, 5)
    parts = [count_affinity(source(), MODEL, {}) for source in sources]
    total = parts[0]
    for part in parts[1:]:
        total = total.add(part)
    assert same(total, count_affinity(trace.chunks(), MODEL, {}))


def test_small_traces_are_not_shared(make_trace: Callable[..., Trace]) -> None:
    assert from_traces._num_processes(make_trace(), 2) == 1


def test_a_sequence_cut_by_a_run_is_found(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    chunk = make_chunk(num_tokens=20, num_sequences=1)
    with TraceWriter(directory=tmp_path / "t", model=MODEL) as writer:
        for part in (np.arange(10), np.arange(10, 20)):
            writer.append(chunk.select(part))
        writer.finish()
    with pytest.raises(PlacerError, match=r"continues in .*chunk-00001"):
        list(Trace(tmp_path / "t").chunks(start=1))


def test_damage_found_by_a_process_is_told(trace: Trace) -> None:
    path = trace.directory / "chunk-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(PlacerError, match=r"chunk-00004\.safetensors is damaged") as caught:
        affinity_of_traces([trace], EVERYTHING, 2)
    assert "copy the trace again" in caught.value.hint


def test_a_killed_process_is_told(trace: Trace) -> None:
    with pytest.raises(PlacerError, match="process was killed") as caught:
        count_sources([partial(read, trace.directory), die], MODEL, {})
    assert "--workers 1" in caught.value.hint


def test_no_token_is_refused_and_an_empty_stream_adds_nothing(trace: Trace) -> None:
    with pytest.raises(PlacerError, match="no token is left"):
        count_sources([nothing], MODEL, {})
    both = count_sources([nothing, partial(read, trace.directory)], MODEL, {})
    assert same(both, count_affinity(trace.chunks(), MODEL, {}))
