"""Documents come from files, lines of JSON, chats and standard input as they are."""

import io
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from placer.errors import PlacerError, UsageError
from placer.trace import Trace
from placer.trace.corpus import Corpus, name_corpora
from placer.trace.record import RecordOptions, record

CHAT = [{"role": "user", "content": "add one"}, {"role": "assistant", "content": "two"}]


def write_lines(path: Path, *values: object) -> Path:
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n\n")
    return path


def test_each_line_of_json_is_a_document(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", {"text": "é one"}, {"text": " "}, {"text": "two"}
    )
    corpus = Corpus(domain="a", path=path)
    assert list(corpus.documents()) == ["é one", "two"]
    orders = {tuple(corpus.documents(seed)) for seed in range(8)}
    assert orders == {("é one", "two"), ("two", "é one")}


def test_a_field_may_be_named_and_a_chat_stands_in_messages(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"body": "b", "text": "t"}, {"body": CHAT})
    assert list(Corpus(domain="a", path=path, field="body").documents()) == ["b", CHAT]
    path = write_lines(tmp_path / "b.jsonl", {"messages": CHAT})
    assert list(Corpus(domain="a", path=path).documents()) == [CHAT]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"text": "a"', "line at byte 14 is not valid JSON"),
        ('{"prompt": "a"}', "no text or chat in text or messages; it has prompt"),
        ('{"text": 3}', "no text or chat"),
        ('{"messages": [{"role": "user"}]}', "no text or chat"),
        ("[1]", "it has no field"),
    ],
)
def test_a_line_without_text_is_named(tmp_path: Path, line: str, match: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line)
    with pytest.raises(PlacerError, match=match) as caught:
        list(Corpus(domain="a", path=path).documents())
    assert caught.value.hint


def test_file_names_need_not_be_utf8(tiny_model: Path, tmp_path: Path) -> None:
    """A name in Latin-1, as older archives have them: the byte e9 alone is not UTF-8."""
    folder = tmp_path / "text"
    folder.mkdir()
    name = "caf\udce9.txt"
    (folder / name).write_text("the sum of two numbers")
    corpus = Corpus(domain="text", path=folder)
    before = corpus.sha256()
    record(tiny_model, [corpus], tmp_path / "t", RecordOptions())
    assert Trace(tmp_path / "t").header.num_sequences == 1
    (folder / name).rename(folder / "other.txt")
    assert corpus.sha256() != before
    (folder / "other.txt").rename(folder / name)
    one = Corpus(domain="one", path=folder / name)
    record(tiny_model, [one], tmp_path / "u", RecordOptions())
    assert Trace(tmp_path / "u").header.provenance["corpora"][0]["name"] == "caf?.txt"
    with pytest.raises(UsageError, match="needs a domain name of printable text"):
        name_corpora([folder / name], [])


def test_standard_input_is_a_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b"text from a pipe")

    monkeypatch.setattr("sys.stdin", Stdin)
    (corpus,) = name_corpora([Path("-")], [])
    assert corpus.domain == "stdin"
    assert list(corpus.documents()) == ["text from a pipe"]
    assert corpus.sha256() != Corpus(domain="x", path=Path("-"), content="other").sha256()


def test_a_chat_is_recorded_through_the_template(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    )
    tokenizer.save_pretrained(model)
    corpora = [
        Corpus(domain="chat", path=write_lines(tmp_path / "c.jsonl", {"messages": CHAT}))
    ]
    record(model, corpora, tmp_path / "t", RecordOptions())
    tokens = Trace(tmp_path / "t").read()
    expected = tokenizer("user: add one;assistant: two;")["input_ids"]
    assert tokens.token_ids.tolist() == expected
    with pytest.raises(PlacerError, match="cannot apply a chat template"):
        record(tiny_model, corpora, tmp_path / "u", RecordOptions())
    assert not (tmp_path / "u").exists()
