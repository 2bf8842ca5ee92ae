"""The format pages tell the truth: their readers and examples are extracted and run."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.model import ModelSpec
from placer.placement import SolverReport
from placer.shuffle import CombinedRule
from placer.simulation import PolicyMetrics
from placer.table import Table
from placer.table.lookup import LayerTable, known_ids
from placer.table.table import _DTYPES as TABLE_DTYPES
from placer.target.hardware import Hardware, write_hardware
from placer.trace import Chunk, Trace, TraceWriter
from placer.trace.header import TraceHeader

ROOT = Path(__file__).resolve().parents[1]
FORMATS_PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
TRACES_PAGE = (ROOT / "traces" / "README.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def documented_reader() -> dict[str, Any]:
    (source,) = blocks(TRACES_PAGE, "python")
    names: dict[str, Any] = {}
    exec(compile(source, "traces/README.md", "exec"), names)
    return names


def make_chunk(first_sequence: int, num_tokens: int, seed: int) -> Chunk:
    rng = np.random.default_rng(seed)

    def experts(size: int) -> np.ndarray:
        return rng.permuted(np.tile(np.arange(size), (num_tokens, 1)), axis=1)[:, :2]

    return Chunk(
        experts=(experts(5).astype(np.uint8), experts(300).astype(np.int16)),
        weights=tuple(rng.random((num_tokens, 2)).astype(np.float16) for _ in range(2)),
        token_ids=rng.integers(0, 9, num_tokens, dtype=np.int32),
        sequence_ids=np.sort(rng.integers(0, 3, num_tokens)).astype(np.int32)
        + np.int32(first_sequence),
        positions=np.arange(num_tokens, dtype=np.int32),
        domain_ids=np.zeros(num_tokens, dtype=np.uint8),
    )


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    directory = tmp_path / "trace"
    model = ModelSpec(num_experts=(5, 300), top_k=2)
    with TraceWriter(directory=directory, model=model, domains=("all",)) as writer:
        writer.append(make_chunk(0, 20, seed=0))
        writer.append(make_chunk(3, 11, seed=1))
        writer.finish()
    return directory


def test_documented_reader_reads_what_placer_writes(trace: Path) -> None:
    reader = documented_reader()
    header, tensors = reader["read_trace"](trace)
    expected = Trace(trace).read()
    assert set(tensors) == set(expected.tensors())
    for name, values in expected.tensors().items():
        np.testing.assert_array_equal(tensors[name], values)
        assert tensors[name].dtype == values.dtype
    experts = reader["experts_of"](header, tensors)
    assert experts.shape == (31, 2, 2)
    np.testing.assert_array_equal(experts[:, 1], expected.experts[1])


def test_documented_reader_refuses_a_damaged_chunk(trace: Path) -> None:
    chunk = trace / "chunk-00001.safetensors"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"chunk-00001\.safetensors is damaged"):
        documented_reader()["read_trace"](trace)


def test_documented_tensors_are_those_that_placer_knows() -> None:
    table = TRACES_PAGE.partition("### Tensors of a chunk")[2].partition("### Header")[0]
    documented = {
        name: dtype
        for name, dtype in re.findall(r"^\| `([^`]+)` \| \[[^|]+\| ([^|]+) \|", table, re.M)
    }
    chunk = make_chunk(0, 4, seed=2)
    every = chunk.tensors() | {
        "phase": np.zeros(4, np.uint8),
        "step_ids": np.zeros(4, np.int32),
    }
    Chunk.from_tensors(every, num_layers=2)
    assert set(documented) == {re.sub(r"\.\d+$", ".{l}", name) for name in every}
    for name, values in every.items():
        assert str(values.dtype) in documented[re.sub(r"\.\d+$", ".{l}", name)], name


def test_example_header_is_a_valid_header_with_the_documented_fingerprint(
    tmp_path: Path,
) -> None:
    (example,) = blocks(TRACES_PAGE, "json")
    (tmp_path / "trace.json").write_text(example, encoding="utf-8")
    header = TraceHeader.read(tmp_path)
    assert header.to_json() == json.loads(example)
    assert header.model.fingerprint == header.model.bound_fingerprint()


def test_documented_table_rule_is_the_one_that_is_simulated() -> None:
    """Against ``placer.table.lookup``, which the simulated figures come from."""
    (source,) = blocks(FORMATS_PAGE, "python")
    names: dict[str, Any] = {}
    exec(compile(source, "docs/formats.md", "exec"), names)
    rng = np.random.default_rng(0)
    table = Table(
        model=ModelSpec(num_experts=(6, 6, 6, 6), top_k=2),
        num_ranks=3,
        num_nodes=1,
        lookback=2,
        token_rank=rng.integers(3, size=(4, 20)).astype(np.uint8),
        token_confidence=rng.integers(4, size=(4, 20)).astype(np.float16) / np.float16(4),
        history_rank=rng.integers(3, size=(4, 9)).astype(np.uint8),
        history_confidence=rng.integers(4, size=(4, 9)).astype(np.float16) / np.float16(4),
        request_score=np.zeros((20, 3), np.float16),
        expert_rank=np.zeros((4, 6), np.uint8),
    )
    tensors = table.tensors()
    token_ids = rng.integers(-2, 24, size=200)
    fallback = rng.integers(3, size=200)
    history = [rng.integers(3, size=200) for _ in range(4)]
    known = known_ids(token_ids, 200, table.vocab_size)
    for layer in range(4):
        past = history[:layer]
        expected, _ = LayerTable.of(table, layer).homes(known, past, fallback)
        found = [
            names["home_of"](tensors, layer, token, [h[n] for h in past], fallback[n])
            for n, token in enumerate(token_ids)
        ]
        assert found == expected.tolist()


def test_documented_combined_rule_is_the_one_that_is_simulated() -> None:
    """In sixty-fourths, of which float32 holds every sum."""
    (source,) = blocks(FORMATS_PAGE, "python")
    names: dict[str, Any] = {}
    exec(compile(source, "docs/formats.md", "exec"), names)
    rng = np.random.default_rng(0)

    def drawn(*shape: int, dtype: type = np.float32) -> Any:
        return rng.integers(-64, 65, size=shape).astype(dtype) / dtype(64)

    rule = CombinedRule(
        token_weight=drawn(4),
        unknown_score=drawn(4, 3, dtype=np.float16),
        combined_bias=drawn(4, 3),
        expert_score=drawn(4, 2, 6, 3, dtype=np.float16),
        home_price=drawn(4, 3),
    )
    token_score = np.abs(drawn(4, 20, 3, dtype=np.float16))
    tensors = {one.name: getattr(rule, one.name) for one in fields(CombinedRule)}
    token_ids = rng.integers(-2, 24, size=200)
    experts = [rng.integers(6, size=(2, 200)) for _ in range(4)]
    for layer in range(1, 4):
        past = experts[:layer]
        scores = rule.scores(layer, token_score[layer], token_ids, past)
        expected, _ = rule.homes(layer, scores)
        found = [
            names["combined_home_of"](
                tensors | {"token_score": token_score},
                layer,
                token,
                [one[:, n].tolist() for one in past],
            )
            for n, token in enumerate(token_ids)
        ]
        assert found == expected.tolist()


def test_every_tensor_and_metric_is_documented() -> None:
    documented = set(re.findall(r"`([a-z_.]+)(?:\.\{l\})?`", FORMATS_PAGE))
    metrics = {one.name for one in fields(PolicyMetrics)}
    solver = set(SolverReport.__struct_fields__)
    tensors = {"load", "transition", "coactivation", *TABLE_DTYPES}
    assert metrics | solver | tensors <= documented


def test_the_documented_hardware_is_read_and_written_back(tmp_path: Path) -> None:
    (text,) = (t for t in blocks(FORMATS_PAGE, "toml") if "bf16_flops" in t)
    page, again = tmp_path / "mine.toml", tmp_path / "again" / "mine.toml"
    page.write_text(text)
    again.parent.mkdir()
    hardware = Hardware.named(str(page))
    assert hardware.slow.curves is not None
    assert hardware.fast.curves is None
    write_hardware(hardware, again)
    assert Hardware.named(str(again)) == hardware
