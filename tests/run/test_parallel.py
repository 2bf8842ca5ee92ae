"""A real Ray cluster of several worker processes counts what one process counts."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from placer.affinity import from_traces
from placer.affinity.count import count_sources
from placer.affinity.from_traces import affinity_of_traces
from placer.errors import PlacerError, UsageError
from placer.model import ModelSpec
from placer.run.parallel import Backend
from placer.trace import EVERYTHING, Chunk, Trace, TraceWriter

MODEL = ModelSpec(num_experts=(8, 8, 8), top_k=2)
RAY = Backend(name="ray")


@pytest.fixture
def trace(
    make_chunk: Callable[..., Chunk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Trace:
    """A trace of five chunks, of which every token is worth a task."""
    monkeypatch.setattr(from_traces, "_WORTH_A_WORKER", 1)
    chunk = make_chunk(num_sequences=10)
    with TraceWriter(directory=tmp_path / "t", model=MODEL) as writer:
        for part in range(5):
            writer.append(chunk.select(chunk.sequence_ids // 2 == part))
        writer.finish()
    return Trace(tmp_path / "t")


def die_once(directory: Path, part: int, marker: Path) -> Iterator[Chunk]:
    """Kill the worker on the first call, read one chunk on the next."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Trace(directory).chunks(EVERYTHING, part, part + 1)


def test_tasks_write_the_same_bytes_as_one_process(
    ray_cluster: None, trace: Trace, tmp_path: Path
) -> None:
    affinity_of_traces([trace], EVERYTHING).write(tmp_path / "one")
    affinity_of_traces([trace], EVERYTHING, 5, RAY).write(tmp_path / "ray")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "ray").read_bytes()


def test_a_worker_killed_on_the_way_changes_nothing(
    ray_cluster: None, trace: Trace, tmp_path: Path
) -> None:
    markers = [tmp_path / f"killed-{part}" for part in range(5)]
    markers[0].touch()  # this one lives
    sources = [partial(die_once, trace.directory, n, m) for n, m in enumerate(markers)]
    count_sources(sources, MODEL, {}, backend=RAY).write(tmp_path / "ray")
    assert all(marker.exists() for marker in markers)
    whole = [partial(die_once, trace.directory, n, markers[0]) for n in range(5)]
    for part in whole[1:]:
        assert list(part())
    one = count_sources([partial(Trace(trace.directory).chunks)], MODEL, {})
    one.write(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "ray").read_bytes()


def die(number: int) -> int:
    """Kill the worker at every call."""
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_workers_that_are_always_lost_are_told(ray_cluster: None) -> None:
    with pytest.raises(PlacerError, match="a Ray worker was lost 4 times") as caught:
        list(RAY.map(die, [1]))
    assert "--backend processes" in caught.value.hint


def fail_first(number: int, directory: Path) -> None:
    """Fail at once as the first of the tasks, leave a file late as any other."""
    if number == 0:
        raise PlacerError("the first task failed")
    (directory / f"began-{number}").touch()
    time.sleep(0.3)
    (directory / f"ended-{number}").touch()


def test_a_failure_waits_for_what_runs_and_begins_nothing_more(
    ray_cluster: None, tmp_path: Path
) -> None:
    """What a task has begun to write is whole before the error is told."""
    with pytest.raises(PlacerError, match="the first task failed"):
        list(RAY.map(partial(fail_first, directory=tmp_path), range(40)))
    began = len(list(tmp_path.glob("began-*")))
    assert began == len(list(tmp_path.glob("ended-*")))
    assert 0 < began < 20


def test_damage_found_by_a_task_is_told(ray_cluster: None, trace: Trace) -> None:
    path = trace.directory / "chunk-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(PlacerError, match=r"chunk-00004\.safetensors is damaged") as caught:
        affinity_of_traces([trace], EVERYTHING, 5, RAY)
    assert "copy the trace again" in caught.value.hint


def test_wrong_backends_are_refused() -> None:
    with pytest.raises(UsageError, match="--backend dask is not known"):
        Backend(name="dask")
    with pytest.raises(UsageError, match="is for Ray"):
        Backend(address="10.0.0.1:6379")


def test_an_address_where_no_cluster_is_is_told_at_once() -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: placer[ray]")
    ray.shutdown()
    nowhere = Backend(name="ray", address="127.0.0.1:9")
    with pytest.raises(PlacerError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        list(nowhere.map(str, [1]))


def test_a_cluster_of_another_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: placer[ray]")
    ray.shutdown()

    def refuse(**_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster\n    Ray: 1.0\n    Python: 3.8")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(PlacerError, match="joined: Version mismatch: The cluster Ray") as e:
        list(RAY.map(str, [1]))
    assert "--backend processes" in e.value.hint
