"""The affinity file round-trips, adds up, and refuses what it is not."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from placer.affinity import Affinity, SparseCounts
from placer.affinity.from_traces import affinity_of_traces, merged_affinity
from placer.errors import PlacerError, UsageError
from placer.run.writing import write_tensors
from placer.trace import EVERYTHING, Fold, Selection, Trace


def test_round_trip_is_exact_and_bytes_are_stable(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    counted = affinity_of_traces([make_trace()], EVERYTHING, rows="sequences")
    counted.write(tmp_path / "one.safetensors")
    counted.write(tmp_path / "two.safetensors")
    again = Affinity.read(tmp_path / "one.safetensors")
    assert again.model == counted.model
    assert again.num_tokens == counted.num_tokens
    assert again.provenance == counted.provenance
    for name, counts in counted.tensors().items():
        assert np.array_equal(again.tensors()[name], counts), name
    assert (tmp_path / "one.safetensors").read_bytes() == (
        tmp_path / "two.safetensors"
    ).read_bytes()


def test_folds_add_up_to_the_whole(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace()
    even = affinity_of_traces([trace], Selection(Fold(0, 2)))
    odd = affinity_of_traces([trace], Selection(Fold(1, 2)))
    whole = affinity_of_traces([trace], EVERYTHING).tensors()
    for name, counts in even.add(odd).tensors().items():
        assert np.array_equal(counts, whole[name]), name


def test_rows_per_sequence_are_of_one_trace(make_trace: Callable[..., Trace]) -> None:
    traces = [make_trace("a", seed=1), make_trace("b", seed=2)]
    assert affinity_of_traces(traces, EVERYTHING).token_expert is None
    total = affinity_of_traces(traces, EVERYTHING, rows="tokens")
    assert total.num_tokens == 800
    assert total.sequence_expert is None
    assert total.token_expert is not None
    one = affinity_of_traces(traces[:1], EVERYTHING, rows="sequences")
    assert one.sequence_expert is not None
    assert one.sequence_expert[0].dense().sum() == one.load[0].sum()
    with pytest.raises(UsageError, match="--rows sequences takes one trace, got 2"):
        affinity_of_traces(traces, EVERYTHING, rows="sequences")
    with pytest.raises(UsageError, match="--rows words is not known"):
        affinity_of_traces(traces, EVERYTHING, rows="words")


def test_merging_files_is_counting_all_traces_in_any_order(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    traces = [make_trace(name, seed=seed) for seed, name in enumerate("abc")]
    paths = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for trace, path in zip(traces, paths, strict=True):
        affinity_of_traces([trace], EVERYTHING).write(path)
    whole = affinity_of_traces(traces, EVERYTHING).tensors()
    for order in itertools.permutations(paths):
        merged = merged_affinity(order)
        assert merged.num_tokens == 1200
        assert merged.tensors().keys() == whole.keys()
        for name, counts in merged.tensors().items():
            assert np.array_equal(counts, whole[name]), name
    with pytest.raises(UsageError, match="given twice"):
        merged_affinity([paths[0], paths[0]])


def test_one_trace_twice_is_refused(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace()
    with pytest.raises(UsageError, match="given twice"):
        affinity_of_traces([trace, trace], EVERYTHING)


def test_traces_of_two_models_are_refused(make_trace: Callable[..., Trace]) -> None:
    traces = [make_trace("a"), make_trace("b", num_experts=(6, 6, 6))]
    with pytest.raises(PlacerError, match="different models: num_experts 8 x 3 layers"):
        affinity_of_traces(traces, EVERYTHING)


def test_truncated_and_foreign_files_are_refused(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    path = tmp_path / "affinity.safetensors"
    affinity_of_traces([make_trace()], EVERYTHING).write(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PlacerError, match="cannot be read") as caught:
        Affinity.read(path)
    assert caught.value.hint.startswith("count again: placer affinity")
    with pytest.raises(PlacerError, match="is not an affinity file"):
        Affinity.read(tmp_path / "trace" / "chunk-00000.safetensors")


@pytest.mark.parametrize(
    ("header", "tensors", "match"),
    [
        ({"kind": "table"}, {}, "is a table, not an affinity file"),
        ({"schema_version": 3}, {}, "written by a newer placer"),
        ({"model": {}}, {}, "model lacks num_experts"),
        ({"model": "x"}, {}, 'model is "x", expected an object'),
        ({"surprise": 1}, {}, "it has the unknown field surprise"),
        ({}, {"load.9": np.zeros(3, np.int64)}, r"unknown tensors: load\.9"),
        ({}, {"load.0": np.zeros(3, np.int64)}, "load has shapes"),
        ({}, {"load.0": np.zeros(8)}, "load must hold int64 counts"),
        ({}, {"load.0": np.full(8, -1)}, "load must hold int64 counts, none negative"),
        ({}, {"token_expert.1.indptr": np.arange(3)}, "sparse counts are damaged"),
        ({}, {"token_expert.1.indptr": np.zeros(3)}, r"must be \[N\] int64"),
        ({"num_tokens": "400"}, {}, 'num_tokens is "400"'),
        ({"num_tokens": -1}, {}, "num_tokens is -1"),
        ({"provenance": []}, {}, "provenance is"),
    ],
)
def test_a_file_that_breaks_the_format_is_refused(
    make_trace: Callable[..., Trace],
    tmp_path: Path,
    header: dict[str, object],
    tensors: dict[str, np.ndarray],
    match: str,
) -> None:
    counted = affinity_of_traces([make_trace()], EVERYTHING, rows="tokens")
    path = tmp_path / "affinity.safetensors"
    counted.write(path)
    with safe_open(path, "np") as opened:
        written = json.loads(opened.metadata()["placer"])
    write_tensors(path, counted.tensors() | tensors, written | header)
    with pytest.raises(PlacerError, match=match):
        Affinity.read(path)


def test_damaged_sparse_counts_are_refused() -> None:
    with pytest.raises(PlacerError, match=r"outside 0\.\.2"):
        SparseCounts(
            indptr=np.asarray([0, 1]),
            indices=np.asarray([3]),
            counts=np.asarray([1]),
            num_columns=3,
        )


@pytest.mark.parametrize(("indices", "counts"), [([1, 0], [1, 1]), ([0, 1], [1, 0])])
def test_sparse_counts_of_a_file_are_ordered_and_positive(
    indices: list[int], counts: list[int]
) -> None:
    read = SparseCounts(
        indptr=np.asarray([0, 2]),
        indices=np.asarray(indices),
        counts=np.asarray(counts),
        num_columns=3,
    )
    with pytest.raises(PlacerError, match="columns must ascend, and counts be positive"):
        read.require_canonical()


def test_a_dtype_that_numpy_lacks_is_refused(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = tmp_path / "affinity.safetensors"
    affinity_of_traces([make_trace()], EVERYTHING).write(path)
    with safe_open(path, "np") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    tensors["load.0"] = tensors["load.0"].to(torch.bfloat16)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(PlacerError, match=r"cannot be read|load must hold int64"):
        Affinity.read(path)
