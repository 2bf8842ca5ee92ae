"""Recorded ids are those that the experts were called with, and a kill changes nothing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from placer.errors import PlacerError, UsageError
from placer.model import ModelSpec
from placer.trace import Trace
from placer.trace.capture import by_descending_weight
from placer.trace.corpus import Corpus, name_corpora, token_sequences
from placer.trace.record import RecordOptions, _step_ids, record

CODE = "def add(one, two):\n    return one + two\n"
PROSE = "The sum of two numbers. "


@pytest.fixture
def corpora(tmp_path: Path) -> list[Corpus]:
    code = tmp_path / "text" / "code"
    code.mkdir(parents=True)
    for n in range(5):
        (code / f"{n}.py").write_text(f"# {n}\n" + CODE * (3 + n))
    (code / ".hidden").write_text("not read")
    (code / "binary.bin").write_bytes(b"\xff\xfe\x00")
    prose = tmp_path / "text" / "prose.txt"
    prose.write_text(PROSE * 30)
    return [Corpus(domain="code", path=code), Corpus(domain="prose", path=prose)]


def experts_called(model: Path, sequence: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Run one sequence alone; return what every experts module was called with."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    called: list[tuple[np.ndarray, np.ndarray]] = []
    for name, module in loaded.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda _, args: called.append((args[1].numpy(), args[2].numpy()))
            )
    with torch.inference_mode():
        loaded(input_ids=torch.tensor([sequence]))
    return called


@pytest.mark.parametrize("name", ["tiny_model", "tiny_sharded_model"])
def test_recorded_ids_are_those_that_the_experts_were_called_with(
    name: str, request: pytest.FixtureRequest, corpora: list[Corpus], tmp_path: Path
) -> None:
    """Batches of unequal, padded sequences against each sequence run alone."""
    model = request.getfixturevalue(name)
    options = RecordOptions(sequence_length=24, batch_size=3, dtype="float32")
    header = record(model, corpora, tmp_path / "trace", options)
    tokens = Trace(tmp_path / "trace").read()
    assert header.model == ModelSpec.from_checkpoint(model)
    assert header.domains == ("code", "prose")
    lengths = np.bincount(tokens.sequence_ids)
    assert len(set(lengths.tolist())) > 2, "padding is put to the test"
    for sequence in (0, 3, header.num_sequences - 1):
        mine = tokens.select(tokens.sequence_ids == sequence)
        assert mine.positions.tolist() == list(range(lengths[sequence]))
        called = experts_called(model, mine.token_ids.tolist())
        assert len(called) == len(mine.experts)
        for layer, (ids, weights) in enumerate(called):
            assert mine.experts[layer].tolist() == ids.tolist()
            assert np.allclose(mine.weights[layer], weights, atol=2e-3)


def test_text_is_recorded_whole_and_in_order(
    tiny_model: Path, corpora: list[Corpus], tmp_path: Path
) -> None:
    record(tiny_model, corpora, tmp_path / "t", RecordOptions(sequence_length=16))
    tokens = Trace(tmp_path / "t").read()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = []
    for text in [*(f"# {n}\n" + CODE * (3 + n) for n in range(5)), PROSE * 30]:
        ids = tokenizer(text)["input_ids"]
        expected += ids[: len(ids) - 1] if len(ids) % 16 == 1 else ids
    assert tokens.token_ids.tolist() == expected
    assert np.bincount(tokens.sequence_ids).max() == 16
    assert (np.diff(tokens.domain_ids.astype(int)) >= 0).all()
    assert not tokens.phase.any()


@pytest.mark.parametrize("generate", [0, 3])
def test_each_batch_is_told_while_a_file_is_recorded(
    tiny_model: Path, corpora: list[Corpus], tmp_path: Path, generate: int
) -> None:
    told: list[int] = []
    options = RecordOptions(sequence_length=16, batch_size=4, generate=generate)
    header = record(tiny_model, corpora, tmp_path / "t", options, told.append)
    assert len(header.chunks) == 1
    assert len(told) > 3
    assert told[:-1] == sorted(set(told[:-1]))
    assert (told[0], told[-1]) == (0, header.num_tokens)


def test_killed_and_started_again_the_bytes_are_the_same(
    tiny_model: Path, corpora: list[Corpus], tmp_path: Path
) -> None:
    options = RecordOptions(sequence_length=16, batch_size=2, chunk_tokens=100)
    record(tiny_model, corpora, tmp_path / "whole", options)

    class KilledError(Exception):
        pass

    def kill_at(limit: int):
        def progress(num_tokens: int) -> None:
            if num_tokens >= limit:
                raise KilledError

        return progress

    for limit in (100, 250, 300):
        with pytest.raises(KilledError):
            record(tiny_model, corpora, tmp_path / "cut", options, kill_at(limit))
        assert not (tmp_path / "cut").exists()
        assert (tmp_path / "cut.placer-partial" / "chunk-00000.safetensors").exists()
    record(tiny_model, corpora, tmp_path / "cut", options)
    whole = sorted((tmp_path / "whole").iterdir())
    assert len(whole) > 4
    assert [p.name for p in whole] == [p.name for p in sorted((tmp_path / "cut").iterdir())]
    for path in whole:
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_an_unfinished_recording_refuses_other_options(
    tiny_model: Path, corpora: list[Corpus], tmp_path: Path
) -> None:
    def stop(num_tokens: int) -> None:
        if num_tokens:
            raise KeyboardInterrupt

    options = RecordOptions(sequence_length=16, chunk_tokens=100)
    with pytest.raises(KeyboardInterrupt):
        record(tiny_model, corpora, tmp_path / "t", options, stop)
    other = RecordOptions(sequence_length=16, chunk_tokens=100, dtype="bfloat16")
    with pytest.raises(PlacerError, match="begun with other input") as caught:
        record(tiny_model, corpora, tmp_path / "t", other)
    assert "--force" in caught.value.hint


@pytest.mark.parametrize(
    ("num_tokens", "said"),
    [(0, "nothing is kept"), (100, "run the same command again to continue")],
)
def test_an_interrupted_recording_says_what_it_keeps(
    tiny_model: Path, corpora: list[Corpus], tmp_path: Path, num_tokens: int, said: str
) -> None:
    def stop(recorded: int) -> None:
        if recorded >= num_tokens:
            raise KeyboardInterrupt

    options = RecordOptions(sequence_length=16, chunk_tokens=100)
    with pytest.raises(KeyboardInterrupt) as caught:
        record(tiny_model, corpora, tmp_path / "t", options, stop)
    assert said in caught.value.__notes__[0]
    assert (tmp_path / "t.placer-partial").exists() == bool(num_tokens)


def test_an_unfinished_recording_refuses_other_weights(
    tiny_model: Path, corpora: list[Corpus], tmp_path: Path
) -> None:
    """The same config and files of the same sizes, trained a step further."""

    def stop(num_tokens: int) -> None:
        if num_tokens:
            raise KeyboardInterrupt

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    options = RecordOptions(sequence_length=16, chunk_tokens=100)
    with pytest.raises(KeyboardInterrupt):
        record(model, corpora, tmp_path / "t", options, stop)
    (path,) = model.glob("*.safetensors")
    tensors = {name: one + 1e-3 for name, one in load_file(path).items()}
    size = path.stat().st_size
    save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == size
    with pytest.raises(PlacerError, match="begun with other input") as caught:
        record(model, corpora, tmp_path / "t", options)
    assert "--force" in caught.value.hint


def test_max_tokens_cuts_each_corpus_in_an_order_of_the_seed(corpora: list[Corpus]) -> None:
    def first(seed: int) -> list[list[int]]:
        return list(
            token_sequences(
                corpora[0],
                lambda t: list(t.encode()),
                sequence_length=50,
                max_tokens=120,
                seed=seed,
            )
        )

    assert sum(map(len, first(0))) == 120
    assert first(0) == first(0)
    assert any(first(0) != first(seed) for seed in range(1, 6))


def test_what_cannot_be_recorded_is_refused_with_the_remedy(
    tiny_model: Path, corpora: list[Corpus], tmp_path: Path
) -> None:
    out, options = tmp_path / "t", RecordOptions()
    with pytest.raises(PlacerError, match=r"model config .* does not exist"):
        record(tmp_path / "nowhere", corpora, out, options)
    with pytest.raises(PlacerError, match=r"corpus .* does not exist"):
        Corpus(domain="x", path=tmp_path / "nowhere")
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PlacerError, match="'llama' is not a family") as caught:
        record(dense, corpora, out, options)
    assert "qwen3_moe" in caught.value.hint
    blank = tmp_path / "blank.txt"
    blank.write_text("  \n")
    with pytest.raises(PlacerError, match="holds no readable text"):
        record(tiny_model, [Corpus(domain="blank", path=blank)], out, options)
    assert not out.exists()
    for option, asked in (
        ("--sequence-length", {"sequence_length": 1}),
        ("--batch-size", {"batch_size": 0}),
        ("--chunk-tokens", {"chunk_tokens": 0}),
        ("--max-tokens", {"max_tokens": 1}),
    ):
        with pytest.raises(UsageError, match=f"^{option} must be at least"):
            RecordOptions(**asked)
    with pytest.raises(UsageError, match="--seed -1 must not be negative"):
        RecordOptions(seed=-1)
    with pytest.raises(UsageError, match="--temperature nan"):
        RecordOptions(generate=1, temperature=float("nan"))
    with pytest.raises(PlacerError, match="cannot be moved to --device nowhere"):
        record(tiny_model, corpora, out, RecordOptions(device="nowhere"))
    assert not list(tmp_path.glob("t*partial"))


def test_weights_on_an_accelerator_are_ordered_without_asking_for_a_value() -> None:
    """A meta tensor has no values, so asking for one, which would wait, raises."""
    ids = torch.empty(5, 3, dtype=torch.int64, device="meta")
    weights = torch.empty(5, 3, device="meta")
    found = by_descending_weight(ids, weights)
    assert [one.shape for one in found] == [ids.shape, weights.shape]


@given(data=st.data(), top_k=st.integers(1, 5))
def test_experts_are_listed_by_weight_and_equal_ones_as_they_came(
    data: st.DataObject, top_k: int
) -> None:
    row = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=top_k, max_size=top_k)
    weights = data.draw(st.lists(row, min_size=1, max_size=4))
    ids = [list(range(top_k)) for _ in weights]
    found, ordered = by_descending_weight(torch.tensor(ids), torch.tensor(weights))
    expected = [sorted(range(top_k), key=lambda n: -one[n]) for one in weights]
    assert found.tolist() == expected
    assert ordered.tolist() == [sorted(one, reverse=True) for one in weights]


def test_passes_beyond_int32_are_refused_not_wrapped() -> None:
    """With 8 passes per batch the last one, 2^31 - 1, is of the batch that begins at
    sequence 2^28 - 1."""
    step = np.arange(8, dtype=np.int32)
    assert _step_ids(2**28 - 1, 7, step)[-1] == 2**31 - 1
    with pytest.raises(PlacerError, match="need numbers above int32"):
        _step_ids(2**28, 7, step)


def test_corpora_are_named_once(corpora: list[Corpus]) -> None:
    path = corpora[1].path
    assert name_corpora([path], [f"other={path}"]) == [
        Corpus(domain="prose", path=path),
        Corpus(domain="other", path=path),
    ]
    with pytest.raises(UsageError, match="two corpora are named 'prose'"):
        name_corpora([path, path], [])
    with pytest.raises(UsageError, match="has the form NAME=PATH"):
        name_corpora([], ["prose"])
    with pytest.raises(UsageError, match="no text"):
        name_corpora([], [])
    with pytest.raises(UsageError, match=r"257 corpora are given, .* at most 256 domains"):
        name_corpora([], [f"{n}={path}" for n in range(257)])
