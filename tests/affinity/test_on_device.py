"""Counts made with torch are those of NumPy, integer by integer, on every device."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from placer.affinity import Affinity, count_affinity, on_device
from placer.affinity.count import count_sources
from placer.affinity.from_traces import affinity_of_traces
from placer.affinity.on_device import DeviceCounts, count_on_device
from placer.affinity.sums import Rows
from placer.cli.main import app
from placer.errors import PlacerError, UsageError
from placer.model import ModelSpec
from placer.run.parallel import Backend
from placer.trace import EVERYTHING, Chunk, Trace

CPU = torch.device("cpu")
WITH_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no GPU on this machine"
)


def drawn(sizes: tuple[int, ...], top_k: int, num_tokens: int, seed: int) -> Chunk:
    """Draw experts of a token, each once; every ninth token id is unknown."""
    rng = np.random.default_rng(seed)
    dtypes = [np.uint8 if size <= 256 else np.uint16 for size in sizes]
    token_ids = rng.integers(40, size=num_tokens).astype(np.int32)
    token_ids[::9] = -1
    return Chunk(
        experts=tuple(
            rng.random((num_tokens, size)).argsort(axis=1)[:, :top_k].astype(dtype)
            for size, dtype in zip(sizes, dtypes, strict=True)
        ),
        sequence_ids=np.sort(rng.integers(9, size=num_tokens)).astype(np.int32),
        positions=np.arange(num_tokens, dtype=np.int32),
        token_ids=token_ids,
    )


def same(one: Affinity | None, other: Affinity) -> bool:
    assert one is not None
    found, expected = one.tensors(), other.tensors()
    return found.keys() == expected.keys() and all(
        found[name].dtype == counts.dtype and np.array_equal(found[name], counts)
        for name, counts in expected.items()
    )


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.sampled_from([3, 5, 8, 300]), min_size=1, max_size=3),
    top_k=st.integers(1, 3),
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    rows=st.sampled_from(["none", "tokens", "sequences"]),
    block=st.sampled_from([1, 7, 65_536]),
)
def test_the_integers_are_those_of_numpy(
    sizes: list[int], top_k: int, lengths: list[int], rows: Rows, block: int
) -> None:
    model = ModelSpec(num_experts=tuple(sizes), top_k=top_k)
    chunks = [drawn(tuple(sizes), top_k, n, seed) for seed, n in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_device, "_BLOCK_TOKENS", block)
        found = count_on_device(chunks, model, {}, device=CPU, rows=rows)
    expected = count_affinity(chunks, model, {}, rows=rows)
    assert same(found, expected)
    assert found is not None
    assert found.num_tokens == sum(lengths)


def test_a_chunk_without_token_ids_leaves_no_rows_of_tokens() -> None:
    model = ModelSpec(num_experts=(5,), top_k=2)
    one = drawn((5,), 2, 20, 0)
    bare = Chunk(
        experts=one.experts, sequence_ids=one.sequence_ids, positions=one.positions
    )
    for chunks in ([one, bare], [bare, one]):
        found = count_on_device(chunks, model, {}, device=CPU, rows="tokens")
        assert same(found, count_affinity(chunks, model, {}, rows="tokens"))


def test_no_chunk_gives_no_counts() -> None:
    assert count_on_device([], ModelSpec(num_experts=(2,), top_k=1), {}, device=CPU) is None


def test_counting_waits_for_no_device() -> None:
    """A meta tensor has no values: whatever asked for one would fail."""
    counts = DeviceCounts(ModelSpec(num_experts=(5, 8), top_k=2), torch.device("meta"))
    counts.add(drawn((5, 8), 2, 30, 0))
    assert all(one.is_meta for one in counts.load + counts.transition + counts.coactivation)
    with pytest.raises((NotImplementedError, RuntimeError)):
        counts.affinity({})


def test_ids_that_the_model_has_not_never_reach_the_device() -> None:
    wrong = drawn((8,), 2, 10, 0)
    with pytest.raises(PlacerError, match=r"outside 0\.\.2"):
        count_on_device([wrong], ModelSpec(num_experts=(3,), top_k=2), {}, device=CPU)


def test_sequences_numbered_with_large_gaps_are_refused() -> None:
    """By NumPy and by torch; the index of 2^31 rows would take 16 GiB a layer."""
    chunk = drawn((5,), 2, 4, 0)
    chunk.sequence_ids[-1] = 2**31 - 2
    model = ModelSpec(num_experts=(5,), top_k=2)
    for count in (count_affinity, partial(count_on_device, device=CPU)):
        with pytest.raises(PlacerError, match=r"go up to 2147483646.* 16\.0 GiB") as caught:
            count([chunk], model, {}, rows="sequences")
        assert "--rows" in str(caught.value.hint)
        assert count([chunk], model, {}, rows="tokens")


@WITH_GPU
@pytest.mark.parametrize("tf32", [False, True])
def test_a_gpu_counts_the_same(monkeypatch: pytest.MonkeyPatch, tf32: bool) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    sizes = (64, 300, 64)
    model = ModelSpec(num_experts=sizes, top_k=3)
    chunks = [drawn(sizes, 3, n, n) for n in (5000, 70_000)]
    found = count_affinity(chunks, model, {}, rows="sequences", device="cuda")
    assert same(found, count_affinity(chunks, model, {}, rows="sequences"))


@WITH_GPU
def test_on_a_gpu_nothing_waits_but_the_rows() -> None:
    counts = DeviceCounts(ModelSpec(num_experts=(5, 8), top_k=2), torch.device("cuda"))
    counts.add(drawn((5, 8), 2, 30, 0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        counts.add(drawn((5, 8), 2, 30, 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU on this machine")
def test_a_gpu_that_is_not_there_is_told(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    trace = make_trace()
    with pytest.raises(PlacerError, match=r"cuda needs a GPU.* finds 0") as caught:
        affinity_of_traces([trace], EVERYTHING, device="cuda")
    assert "--device cpu" in str(caught.value.hint)
    out = tmp_path / "out"
    arguments = ["affinity", str(trace.directory), "--out", str(out), "--device", "cuda"]
    assert isinstance(CliRunner().invoke(app, arguments).exception, PlacerError)
    assert not out.exists()


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", ""])
def test_other_devices_are_not_known(name: str) -> None:
    model = ModelSpec(num_experts=(3,), top_k=1)
    with pytest.raises(UsageError, match="is not known"):
        count_sources([lambda: iter([drawn((3,), 1, 5, 0)])], model, {}, device=name)


def test_several_processes_do_not_share_a_gpu(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace()
    with pytest.raises(UsageError, match="one process"):
        affinity_of_traces([trace], EVERYTHING, 2, device="cuda")
    with pytest.raises(UsageError, match="one process"):
        affinity_of_traces([trace], EVERYTHING, 1, Backend(name="ray"), device="cuda")
