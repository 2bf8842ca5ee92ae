"""The report of links against traces whose links are known by construction."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from placer.errors import UsageError
from placer.model import ModelSpec
from placer.report.links import links_of
from placer.trace import Chunk, Fold, Selection, Trace, TraceWriter
from tests.conftest import GPT_OSS


def write(path: Path, layers: list[np.ndarray], **fields: object) -> Trace:
    num_tokens = len(layers[0])
    chunk = Chunk(
        experts=tuple(layers),
        sequence_ids=(np.arange(num_tokens) // 50).astype(np.int32),
        positions=(np.arange(num_tokens) % 50).astype(np.int32),
        **fields,
    )
    model = ModelSpec(num_experts=(8,) * len(layers), top_k=layers[0].shape[1])
    names = () if chunk.domain_ids is None else ("a", "b", "empty")
    with TraceWriter(directory=path, model=model, domains=names) as writer:
        writer.append(chunk)
        writer.finish()
    return Trace(path)


def test_layers_that_copy_each_other_share_all_their_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = rng.permutation(np.repeat(np.arange(8), 500))[:, None].astype(np.uint8)
    found = links_of(write(tmp_path / "t", [first, first, first]))
    observed, within, across, skew = found.information
    assert observed.top1 == pytest.approx(3.0)
    assert observed.pairs == pytest.approx(3.0)
    assert within.top1 < 0.5
    assert abs(across.top1_corrected) < 0.01
    assert skew.top1 is None
    assert skew.pairs < 0.05
    assert [row.distance for row in found.reach] == [1, 2]
    assert all(row.best_next == 1.0 for row in found.reach)
    assert found.domains == ()


def test_a_topic_survives_shuffling_inside_sequences_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    topic = np.arange(4000) // 50 % 2 * 4
    layers = [
        (topic + rng.integers(4, size=4000))[:, None].astype(np.uint8) for _ in range(2)
    ]
    found = links_of(write(tmp_path / "t", layers))
    observed, within, across, _ = found.information
    assert observed.top1_corrected == pytest.approx(1.0, abs=0.02)
    assert within.top1_corrected == pytest.approx(1.0, abs=0.02)
    assert abs(across.top1_corrected) < 0.02


def test_coactivation_survives_all_but_the_redrawing_of_experts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pair = rng.integers(4, size=2000)
    layer = np.stack([2 * pair, 2 * pair + 1], axis=1).astype(np.uint8)
    found = links_of(write(tmp_path / "t", [layer, rng.permutation(layer)]))
    observed, within, across, skew = found.information
    assert observed.within == within.within == across.within == pytest.approx(3.0, abs=0.01)
    assert skew.within < 0.3


def test_domains_that_use_other_experts_are_one_bit_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    domain = (np.arange(2000) // 1000).astype(np.uint8)
    layer = (domain * 4 + rng.integers(4, size=2000))[:, None].astype(np.uint8)
    found = links_of(write(tmp_path / "t", [layer, layer], domain_ids=domain))
    assert found.domains == ("a", "b")
    assert found.domain_distance == pytest.approx(np.array([[0, 1], [1, 0]]))


def test_one_layer_is_refused(make_trace: Callable[..., Trace]) -> None:
    with pytest.raises(UsageError, match="one MoE layer"):
        links_of(make_trace(num_experts=(8,)))


def test_the_known_figures_of_gpt_oss() -> None:
    """1.48 bits between neighbouring top-1 experts, 0.009 with the links destroyed."""
    found = links_of(Trace(GPT_OSS), distances=(1,))
    observed, _, across, _ = found.information
    assert observed.top1 == pytest.approx(1.48, abs=0.005)
    assert across.top1 == pytest.approx(0.009, abs=0.0005)
    assert 0 <= across.top1_corrected < 0.002


def test_a_fold_is_counted_alone(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace()
    both = [links_of(trace, Selection(Fold(part, 2))).num_tokens for part in (0, 1)]
    assert sum(both) == trace.header.num_tokens
