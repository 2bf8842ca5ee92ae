"""Documents are decoded within bounds, validated strictly, and refused in one sentence."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from placer.errors import PlacerError, UsageError
from placer.run.documents import (
    Document,
    of_this_version,
    parse_json,
    parse_toml,
    read_json,
    validated,
)


class Inner(Document):
    width: Annotated[int, msgspec.Meta(ge=1, le=8)]
    name: str | None = None


class Outer(Document):
    schema_version: Literal[2]
    kind: Literal["fixed", "follow"]
    share: float
    inner: Inner | None
    rows: list[list[Annotated[int, msgspec.Meta(ge=0)]]] = msgspec.field(
        default_factory=list
    )
    named: dict[str, Inner] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.share > 1:
            raise UsageError(f"share {self.share} is above 1", "give less")


SOUND = {
    "schema_version": 2,
    "kind": "fixed",
    "share": 1,
    "inner": {"width": 3, "name": None},
    "rows": [[0, 1], [2]],
    "named": {"a": {"width": 1, "name": "é"}},
}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b'{"a": 1, "a": 2}', 'the key "a" appears twice'),
        (b'[{"b": {"a": 1, "c": 1, "a": 1}}]', 'the key "a" appears twice'),
        (b"[" * 100_000, "nests deeper than 64 levels"),
        (b"[" * 65 + b"]" * 65, "nests deeper than 64 levels"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nests deeper than 64 levels"),
        (b"9" * 60, "more than 128 bits"),
        (b"9" * 5000, "4300 digits"),
        (b'{"\xff": 1}', "byte 2 is 0xff, which is not UTF-8"),
        (b'"\\ud800"', "is not a text"),
        (b'{"\\udfff": 1}', "is not a text"),
        (b"", "Expecting value"),
    ],
)
def test_json_out_of_bounds_is_refused(text: bytes, match: str) -> None:
    with pytest.raises(PlacerError, match=match) as caught:
        parse_json(text, "file x")
    assert str(caught.value).startswith("file x is not valid JSON: ")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a = 1\na = 2", "Cannot overwrite"),
        (f"a = {'[' * 5000}", "nests deeper than 64 levels"),
        (f"a = {'9' * 60}", "more than 128 bits"),
        (b"a = '\xff'", "not UTF-8"),
    ],
)
def test_toml_out_of_bounds_is_refused(text: str | bytes, match: str) -> None:
    with pytest.raises(PlacerError, match=match):
        parse_toml(text, "file x")


def test_real_json_is_read_as_python_reads_it() -> None:
    deep = b"[" * 64 + b"]" * 64
    for text in (deep, json.dumps(SOUND).encode(), b'"\\ud83d\\ude00"', b"1e308", b"-0.0"):
        assert parse_json(text, "x") == json.loads(text)
    # transformers writes this for tokenizers without a limit.
    assert parse_json("1000000000000000019884624838656", "x") == 10**30 + 19884624838656


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_a_document_is_an_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(PlacerError, match=r"plan .*x\.json is .*, not a JSON object"):
        read_json(tmp_path / "x.json", "plan")


def test_what_fits_is_read() -> None:
    found = validated(SOUND, Outer, "x", "again")
    assert found.rows == [[0, 1], [2]]
    assert found.named["a"] == Inner(width=1, name="é")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "bogus"}, 'kind is "bogus", allowed are fixed, follow'),
        ({"kind": 3}, "kind is 3, allowed are fixed, follow"),
        ({"share": "1.1"}, 'share is "1.1", expected a number'),
        ({"share": True}, "share is true, expected a number"),
        ({"share": 10**400}, "share is 1000"),
        ({"inner": []}, "inner is [], expected an object or null"),
        ({"inner": {"width": True}}, "inner.width is true, expected a whole number"),
        ({"inner": {"width": 1.0}}, "inner.width is 1.0, expected a whole number"),
        ({"inner": {"width": 0}}, "inner.width is 0, expected a whole number >= 1"),
        ({"inner": {"width": 10**30}}, "expected a whole number <= 8"),
        ({"inner": {}}, "inner lacks width"),
        ({"inner": {"width": 1}}, "inner lacks name"),
        ({"inner": {"width": 1, "high": 2}}, "inner has the unknown field high"),
        ({"surplus": 1}, "it has the unknown field surplus"),
        ({"rows": [[0], [1, -1]]}, "rows[1][1] is -1, expected a whole number >= 0"),
        ({"rows": [[0], 7]}, "rows[1] is 7, expected a list"),
        (
            {"named": {"b": {"width": 9}}},
            "named.b.width is 9, expected a whole number <= 8",
        ),
        ({"share": 2}, "share 2.0 is above 1"),
        ({"schema_version": 3}, "schema_version is 3, allowed are 2"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlacerError) as caught:
        validated(SOUND | change, Outer, "plan x", "solve again")
    assert caught.value.message.startswith("plan x: ")
    assert sentence in caught.value.message
    assert caught.value.exit_code == 1
    assert caught.value.hint in ("solve again", "give less")


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_for_others_alone(text: str) -> None:
    """Mamba layers have ``time_step_limit`` [0.0, Infinity] in config.json."""
    number = parse_json(text, "x")
    for change in ({"share": number}, {"named": {"a": {"width": [number]}}}):
        with pytest.raises(PlacerError, match=r"x holds .*, which is not a finite number"):
            validated(SOUND | change, Outer, "x", "again")


def test_a_missing_field_is_named() -> None:
    value = {name: one for name, one in SOUND.items() if name != "share"}
    with pytest.raises(PlacerError, match=r"^plan x: it lacks share$"):
        validated(value, Outer, "plan x", "again")


def test_version_1_is_upgraded_once() -> None:
    def upgrade(value: dict[str, Any]) -> dict[str, Any]:
        return value | {"new": len(value["old"])}

    old = {"schema_version": 1, "old": "abc"}
    assert of_this_version(old, "x", "again", upgrade)["new"] == 3
    assert of_this_version(old, "x", "again")["schema_version"] == 2
    new = {"schema_version": 2, "old": "abc"}
    assert of_this_version(new, "x", "again", upgrade) == new
    # The type of what the upgrade needs is for the validation to refuse.
    assert of_this_version(old | {"old": 3}, "x", "again", upgrade)["old"] == 3


@pytest.mark.parametrize(
    ("version", "match"),
    [
        (3, "x was written by a newer placer: it has schema_version 3"),
        (0, "schema_version is 0, allowed are 1 and 2"),
        (True, "schema_version is true"),
        (1.0, r"schema_version is 1\.0"),
        (None, "schema_version is null"),
    ],
)
def test_other_versions_are_refused(version: object, match: str) -> None:
    with pytest.raises(PlacerError, match=match):
        of_this_version({"schema_version": version}, "x", "again")
