"""Tables, traces, counts and models of different tokenizers are never combined.

Where one does not say which tokenizer or model it is of, a warning names it.
"""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from placer.affinity import Affinity
from placer.affinity.from_traces import affinity_of_traces, merged_affinity
from placer.cli.main import app
from placer.errors import UsageError
from placer.model import ModelSpec, tokenizer_of
from placer.placement.reference import contiguous
from placer.planning.judge import judge_plan
from placer.planning.tables import TableOptions, make_table
from placer.shuffle import ShuffleTable
from placer.trace import EVERYTHING, Fold, Selection, Trace, TraceWriter
from placer.trace.rewrite import merge_traces, sample_trace, split_trace

ONE, OTHER = (hashlib.sha256(text).hexdigest() for text in (b"{}", b"{ }"))
TraceOf = Callable[..., Trace]


@pytest.fixture
def trace_of(tmp_path: Path, make_chunk: Callable) -> TraceOf:
    """Return a writer of traces of one model, by number, tokenizer and binding."""

    def write(seed: int, tokenizer: str | None = None, hidden_size: int = 0) -> Trace:
        model = ModelSpec(num_experts=(8, 8, 8), top_k=2)
        if hidden_size:
            model = msgspec.structs.replace(
                model,
                model_type="qwen3_moe",
                layer_ids=(0, 1, 2),
                hidden_size=hidden_size,
                vocab_size=50,
            )
            model = msgspec.structs.replace(model, fingerprint=model.bound_fingerprint())
        path = tmp_path / f"trace-{seed}-{str(tokenizer)[:4]}-{hidden_size}"
        made = {} if tokenizer is None else {"tokenizer_sha256": tokenizer}
        with TraceWriter(directory=path, model=model, provenance=made) as writer:
            writer.append(make_chunk(seed=seed))
            writer.finish()
        return Trace(path)

    return write


def counts_of(traces: list[Trace], folder: Path) -> list[Path]:
    paths = [folder / f"{number}.counts" for number in range(len(traces))]
    for path, trace in zip(paths, traces, strict=True):
        affinity_of_traces([trace], EVERYTHING, rows="tokens").write(path)
    return paths


@pytest.fixture(params=["trace merge", "affinity", "affinity --merge"])
def combine(request: pytest.FixtureRequest, tmp_path: Path) -> Callable:
    """Return what combines traces and takes the warnings: model and tokenizer of all."""

    def run(traces: list[Trace], warn: Callable[[str], None]) -> tuple:
        if request.param == "trace merge":
            header = merge_traces(traces, tmp_path / "merged", warn)
            return header.model, header.provenance["tokenizer_sha256"]
        found = (
            affinity_of_traces(traces, EVERYTHING, rows="tokens", warn=warn)
            if request.param == "affinity"
            else merged_affinity(counts_of(traces, tmp_path), warn)
        )
        return found.model, found.provenance["tokenizer_sha256"]

    return run


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_unequal_tokenizers_do_not_combine(
    combine: Callable, trace_of: TraceOf, order: tuple[int, ...]
) -> None:
    """Not in any order either: the file that says nothing fits both, they do not."""
    three = [trace_of(0, ONE), trace_of(1), trace_of(2, OTHER)]
    with pytest.raises(UsageError, match="different tokenizers") as raised:
        combine([three[n] for n in order], lambda _: None)
    assert ONE[:12] in raised.value.message and OTHER[:12] in raised.value.message


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_unequal_models_do_not_combine(
    combine: Callable, trace_of: TraceOf, order: tuple[int, ...]
) -> None:
    three = [trace_of(0, hidden_size=32), trace_of(1), trace_of(2, hidden_size=64)]
    with pytest.raises(UsageError, match="different models: fingerprint"):
        combine([three[n] for n in order], lambda _: None)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_bound_and_unbound_combine_with_a_warning(
    combine: Callable, trace_of: TraceOf, order: tuple[int, ...]
) -> None:
    """One of each kind, and the result claims no more than the file that says least."""
    three = [trace_of(0, ONE, hidden_size=32), trace_of(1), trace_of(2, ONE, 32)]
    told: list[str] = []
    model, tokenizer = combine([three[n] for n in order], told.append)
    assert not model.bound and tokenizer is None
    assert len(told) == 2
    assert sum("match by shape only" in one for one in told) == 1
    assert sum("does not say which tokenizer" in one for one in told) == 1


def test_equal_ones_combine_in_silence(combine: Callable, trace_of: TraceOf) -> None:
    told: list[str] = []
    two = [trace_of(0, ONE, hidden_size=32), trace_of(1, ONE, hidden_size=32)]
    model, tokenizer = combine(two, told.append)
    assert (model, tokenizer, told) == (two[0].model, ONE, [])


def test_sums_of_counts_compare_tokenizers(trace_of: TraceOf, tmp_path: Path) -> None:
    one, other = (
        Affinity.read(path)
        for path in counts_of([trace_of(0, ONE), trace_of(1, OTHER)], tmp_path)
    )
    with pytest.raises(UsageError, match="different tokenizers"):
        one.add(other)


def test_parts_of_a_trace_keep_its_tokenizer(trace_of: TraceOf, tmp_path: Path) -> None:
    trace = trace_of(0, ONE)
    split_trace(trace, tmp_path / "split", selection=Selection(Fold(0, 2)))
    sample_trace(trace, tmp_path / "sample", 2, seed=0)
    assert Trace(tmp_path / "split").tokenizer_sha256 == ONE
    assert Trace(tmp_path / "sample").tokenizer_sha256 == ONE


def test_a_table_and_a_trace_compare_tokenizers(
    trace_of: TraceOf, write_plan: Callable, tmp_path: Path
) -> None:
    """In ``simulate --table``: refused, warned of, or silent."""
    trace, path = trace_of(0, ONE), tmp_path / "table"
    plan = write_plan(trace.model, contiguous(trace.model.num_experts, 4))
    make_table(plan, trace, options=TableOptions()).table.write(path)

    def warnings(judged: Trace) -> str:
        return " ".join(judge_plan(plan, judged, table_path=path)[0].warnings)

    with pytest.raises(UsageError, match="different tokenizers"):
        warnings(trace_of(1, OTHER))
    assert "does not say which tokenizer" in warnings(trace_of(1))
    assert "tokenizer" not in warnings(trace_of(1, ONE))


def test_a_checkpoint_and_a_trace_compare_tokenizers(
    trace_of: TraceOf, write_plan: Callable, tmp_path: Path
) -> None:
    """In ``tables --embeddings``."""
    trace = trace_of(0, OTHER)
    model = tmp_path / "model"
    model.mkdir()
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 4,
        "vocab_size": 50,
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").write_text("{}")
    rows = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    save_file({"model.embed_tokens.weight": rows}, model / "model.safetensors")
    plan = write_plan(trace.model, contiguous(trace.model.num_experts, 4))
    options = TableOptions(embeddings=model)
    with pytest.raises(UsageError, match="different tokenizers"):
        make_table(plan, trace, options=options)
    unknown = make_table(plan, trace_of(1), options=options)
    assert any("does not say which tokenizer" in one for one in unknown.warnings)
    assert unknown.table.tokenizer_sha256 == ONE
    known = make_table(plan, trace_of(2, ONE), options=options)
    assert not any("tokenizer" in one for one in known.warnings)


def test_an_import_takes_the_tokenizer_of_its_model(
    tiny_model: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permuted(np.arange(8))[:2] for _ in range(200)])
    arrays = {
        "experts": experts.reshape(100, 2, 2),
        "sequence_ids": np.repeat(np.arange(10), 10),
        "token_ids": rng.integers(0, 300, 100),
    }
    np.savez(tmp_path / "record.npz", **arrays)
    arguments = ["import", "npz", str(tmp_path / "record.npz"), "--model", str(tiny_model)]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "trace")])
    assert done.exit_code == 0, done.output
    digest = hashlib.sha256((tiny_model / "tokenizer.json").read_bytes()).hexdigest()
    assert Trace(tmp_path / "trace").tokenizer_sha256 == digest


def test_the_runtime_can_compare_its_tokenizer(
    trace_of: TraceOf, write_plan: Callable, tmp_path: Path
) -> None:
    trace, path = trace_of(0, ONE), tmp_path / "table"
    plan = write_plan(trace.model, contiguous(trace.model.num_experts, 4))
    make_table(plan, trace, options=TableOptions()).table.write(path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert ShuffleTable.read(path, tmp_path / "tokenizer.json").num_ranks == 4
    (tmp_path / "tokenizer.json").write_text("{ }")
    with pytest.raises(ValueError, match=f"is of tokenizer {ONE}, not {OTHER}"):
        ShuffleTable.read(path, tmp_path / "tokenizer.json")


def test_a_table_header_that_is_no_object_is_refused(tmp_path: Path) -> None:
    """The reader of runtimes, which imports nothing of placer."""
    for text in ("[1]", "[" * 9000 + "]" * 9000, "{}", '{"kind": "table"}'):
        save_file({"a": np.zeros(1)}, tmp_path / "t", metadata={"placer": text})
        with pytest.raises(ValueError):
            ShuffleTable.read(tmp_path / "t")


def test_other_files_of_a_tokenizer_are_hashed_where_there_is_no_json(
    tmp_path: Path,
) -> None:
    assert tokenizer_of(tmp_path) is None
    for name in ("tekken.json", "tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_bytes(name.encode())
        assert tokenizer_of(tmp_path) == hashlib.sha256(name.encode()).hexdigest()
