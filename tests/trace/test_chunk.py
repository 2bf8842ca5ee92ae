"""Chunks are joined, cut and checked: small ones, each rule by hand."""

from dataclasses import replace

import numpy as np
import pytest

from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.trace import Chunk
from placer.trace.chunk import expert_dtype, require_ranges, sequence_order

MODEL = ModelSpec(num_experts=(4, 6), top_k=2)
LARGEST = 2**31 - 1


def chunk(*sequence_ids: int, weighted: bool = True) -> Chunk:
    """Return tokens of two layers; sequence s has expert s, and weights of s sixteenths."""
    ids = np.array(sequence_ids, dtype=np.int32)
    experts = np.stack([ids % 4, (ids + 1) % 4], axis=1).astype(np.uint8)
    weights = (np.stack([ids, ids], axis=1) / 16).astype(np.float16)
    return Chunk(
        experts=(experts, experts + np.uint8(2)),
        weights=(weights, weights + np.float16(1)) if weighted else None,
        sequence_ids=ids,
        positions=np.arange(len(ids), dtype=np.int32),
    )


def test_expert_ids_take_the_fewest_bytes() -> None:
    for number, dtype in ((1, np.uint8), (256, np.uint8), (257, np.int16)):
        assert expert_dtype(number) is dtype


@pytest.mark.parametrize("weighted", [True, False])
def test_joined_chunks_are_sorted_by_sequence_with_all_that_they_hold(
    weighted: bool,
) -> None:
    one, two = chunk(3, 3, 5, weighted=weighted), chunk(1, 4, weighted=weighted)
    joined = Chunk.concatenate([one, two])
    assert joined.sequence_ids.tolist() == [1, 3, 3, 4, 5]
    assert joined.positions.tolist() == [0, 0, 1, 1, 2]
    assert [layer[:, 0].tolist() for layer in joined.experts] == [
        [1, 3, 3, 0, 1],
        [3, 5, 5, 2, 3],
    ]
    if weighted:
        assert joined.weights is not None
        assert [(16 * layer[:, 0]).tolist() for layer in joined.weights] == [
            [1, 3, 3, 4, 5],
            [17, 19, 19, 20, 21],
        ]
    else:
        assert joined.weights is None


def test_one_chunk_joined_is_itself() -> None:
    one = chunk(0, 2)
    same = Chunk.concatenate([one]).tensors()
    assert same.keys() == one.tensors().keys()
    for name, values in one.tensors().items():
        assert (same[name] == values).all()


def test_weights_that_a_chunk_lacks_are_left_out() -> None:
    for first, second in ((True, False), (False, True)):
        parts = [chunk(0, weighted=first), chunk(1, weighted=second)]
        assert Chunk.concatenate(parts).weights is None


def test_tokens_in_order_stay_where_they_are() -> None:
    """A sequence of two parts is refused only where the order would mix them up."""
    ids = [np.array(part, dtype=np.int32) for part in ([0, 1, 1], [1, 2], [4], [3])]
    assert sequence_order(ids[:2]) is None
    order = sequence_order(ids[1:])
    assert order is not None
    assert order.tolist() == [0, 1, 3, 2]
    with pytest.raises(PlacerError, match="sequence 1 is in two chunks"):
        sequence_order(ids)


@pytest.mark.parametrize(
    ("num_tokens", "kept"), [(0, 2), (1, 2), (2, 3), (3, 6), (5, 6), (6, 6), (9, 6)]
)
def test_the_first_sequences_are_whole(num_tokens: int, kept: int) -> None:
    found = chunk(0, 0, 1, 2, 2, 2).first_sequences(num_tokens)
    assert found.sequence_ids.tolist() == [0, 0, 1, 2, 2, 2][:kept]


def test_what_the_model_cannot_have_emitted_is_refused() -> None:
    sound = chunk(0, 1, 2)
    sound.require_within(MODEL)
    chunk().require_within(MODEL)
    for model, words in (
        (ModelSpec(num_experts=(4,), top_k=2), "2 MoE layers recorded, the model has 1"),
        (ModelSpec(num_experts=(4, 6, 6), top_k=2), "recorded, the model has 3"),
        (
            ModelSpec(num_experts=(4, 6), top_k=3),
            "MoE layer 0: 2 experts per token recorded, the model's top_k is 3",
        ),
        (
            ModelSpec(num_experts=(4, 5), top_k=2),
            r"MoE layer 1: expert id 5 is outside 0\.\.4",
        ),
    ):
        with pytest.raises(PlacerError, match=words):
            sound.require_within(model)
    below = replace(sound, experts=(sound.experts[0], sound.experts[1].astype(np.int16)))
    below.experts[1][2, 1] = -1
    with pytest.raises(PlacerError, match=r"MoE layer 1: expert id -1 is outside 0\.\.5"):
        below.require_within(MODEL)


@pytest.mark.parametrize(
    ("name", "dtype", "least", "most"),
    [
        ("sequence_ids", np.int32, 0, LARGEST),
        ("positions", np.int32, 0, LARGEST),
        ("token_ids", np.int32, -1, LARGEST),
        ("phase", np.uint8, 0, 1),
    ],
)
def test_ids_of_tokens_have_a_least_and_a_most(
    name: str, dtype: type[np.generic], least: int, most: int
) -> None:
    sound = chunk(0, 1)
    require_ranges(replace(sound, **{name: np.array([least, most], dtype=dtype)}))
    beyond = [least - 1] * (least - 1 >= np.iinfo(dtype).min)
    beyond += [most + 1] * (most < np.iinfo(dtype).max)
    assert beyond
    for value in beyond:
        values = np.array([value, value], dtype=dtype)
        with pytest.raises(PlacerError, match=f"{name} holds {value}, expected {least} to"):
            require_ranges(replace(sound, **{name: values}))
