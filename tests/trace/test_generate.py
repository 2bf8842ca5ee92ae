"""Generated tokens are transformers' own, and are routed as a full forward pass would."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from placer.errors import PlacerError, UsageError
from placer.trace import Trace
from placer.trace.corpus import Corpus
from placer.trace.record import RecordOptions, record


@pytest.fixture
def corpora(tmp_path: Path) -> list[Corpus]:
    text = tmp_path / "text.txt"
    text.write_text("def add(one, two):\n    return one + two\n" * 12)
    return [Corpus(domain="code", path=text)]


def options(**more: object) -> RecordOptions:
    fields = {"sequence_length": 10, "batch_size": 3, "dtype": "float32", "generate": 6}
    return RecordOptions(**(fields | more))


def test_greedy_tokens_and_their_routing(
    tiny_model: Path, corpora: list[Corpus], tmp_path: Path
) -> None:
    record(tiny_model, corpora, tmp_path / "t", options())
    tokens = Trace(tmp_path / "t").read()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    called: list[np.ndarray] = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, a: called.append(a[1].numpy()))
    lengths = set()
    for sequence in np.unique(tokens.sequence_ids)[:7]:
        mine = tokens.select(tokens.sequence_ids == sequence)
        prompt = mine.token_ids[mine.phase == 0]
        lengths.add(len(prompt))
        with torch.inference_mode():
            made = model.generate(
                torch.from_numpy(prompt[None].astype(np.int64)),
                max_new_tokens=6,
                do_sample=False,
            )[0].numpy()
            called.clear()
            model(input_ids=torch.from_numpy(mine.token_ids[None].astype(np.int64)))
        assert mine.token_ids.tolist() == made[: len(mine.token_ids)].tolist()
        assert mine.phase.tolist() == [0] * len(prompt) + [1] * (
            len(mine.phase) - len(prompt)
        )
        for ids, expected in zip(mine.experts, called, strict=True):
            assert ids.tolist() == expected.tolist()
        steps = mine.step_ids - mine.step_ids[0]
        assert steps.tolist() == [0] * len(prompt) + list(
            range(1, len(steps) - len(prompt) + 1)
        )
    assert lengths


def test_an_end_token_ends_its_sequence_alone(
    tiny_model: Path, corpora: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tiny_model, corpora, tmp_path / "all", options())
    whole = Trace(tmp_path / "all").read()
    first = whole.select(whole.sequence_ids == 0)
    end = int(first.token_ids[first.phase == 1][1])
    monkeypatch.setattr("placer.trace.record._end_ids", lambda model: frozenset([end]))
    record(tiny_model, corpora, tmp_path / "cut", options())
    cut = Trace(tmp_path / "cut").read()
    for sequence in np.unique(whole.sequence_ids):
        full = whole.select(whole.sequence_ids == sequence)
        decoded = full.token_ids[full.phase == 1].tolist()
        stop = decoded.index(end) if end in decoded else len(decoded)
        mine = cut.select(cut.sequence_ids == sequence)
        assert mine.token_ids[mine.phase == 1].tolist() == decoded[:stop]


def test_draws_depend_on_the_seed_and_not_on_the_batch(
    tiny_model: Path, corpora: list[Corpus], tmp_path: Path
) -> None:
    found = []
    for name, more in {
        "one": {"batch_size": 1},
        "three": {"batch_size": 3},
        "other": {"seed": 1},
    }.items():
        record(tiny_model, corpora, tmp_path / name, options(temperature=1.0, **more))
        found.append(Trace(tmp_path / name).read().token_ids.tolist())
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_a_killed_recording_goes_on_to_the_same_bytes(
    tiny_model: Path, corpora: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options(temperature=0.7, chunk_tokens=30)
    record(tiny_model, corpora, tmp_path / "whole", asked)

    class KillError(Exception):
        pass

    def kill(num_tokens: int) -> None:
        if num_tokens > 100:
            raise KillError

    with pytest.raises(KillError):
        record(tiny_model, corpora, tmp_path / "again", asked, kill)
    record(tiny_model, corpora, tmp_path / "again", asked)
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_wrong_options_are_refused(
    tiny_model: Path, corpora: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="--generate is 0"):
        RecordOptions(temperature=0.5)
    with pytest.raises(UsageError, match="must not be negative"):
        RecordOptions(generate=-1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PlacerError, match="needs accelerate") as caught:
        record(tiny_model, corpora, tmp_path / "t", options(device_map="auto"))
    assert caught.value.hint == "pip install accelerate"
