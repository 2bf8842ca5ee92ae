"""Documents are decoded within bounds, validated strictly, and refused in one sentence."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from placer.errors import PlacerError, UsageError
from placer.run import documents
from placer.run.documents import (
    Count,
    Document,
    ExpertId,
    NumExperts,
    NumRanks,
    Size,
    TopK,
    file_header,
    of_this_version,
    parse_json,
    parse_toml,
    parse_yaml,
    read_data,
    read_json,
    require_bounds,
    shown,
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
    assert found.to_json() == SOUND
    assert json.loads(json.dumps(found.to_json())) == SOUND


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
        ({"named": {"a": {"width": 1}}}, "named.a lacks name"),
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


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        (Size, 1, 2**63 - 1),
        (Count, 0, 2**63 - 1),
        (NumRanks, 1, 65_536),
        (NumExperts, 1, 32_768),
        (TopK, 0, 32_768),
        (ExpertId, 0, 32_767),
    ],
)
def test_numbers_have_a_least_and_a_most(kind: Any, least: int, most: int) -> None:
    for value in (least, most):
        assert validated(value, kind, "x", "again") == value
    for value in (least - 1, most + 1):
        with pytest.raises(PlacerError, match="expected a whole number"):
            validated(value, kind, "x", "again")


def test_numbers_have_at_most_128_bits() -> None:
    assert parse_json(str(2**128 - 1), "x") == 2**128 - 1
    with pytest.raises(PlacerError, match="more than 128 bits"):
        parse_json(str(2**128), "x")


@pytest.mark.parametrize("parse", [parse_toml, parse_yaml])
def test_toml_and_yaml_have_at_most_a_mebibyte(parse: Any) -> None:
    """A comment: it takes no time to decode."""
    assert not parse("#" * (1 << 20), "x")
    with pytest.raises(
        PlacerError, match="1,048,577 bytes, placer reads at most 1,048,576"
    ):
        parse("#" * ((1 << 20) + 1), "x")


def test_a_long_dotted_key_takes_no_time() -> None:
    assert parse_toml("a.b.c = 1.5", "x") == {"a": {"b": {"c": 1.5}}}
    assert parse_toml("a = [" + "1.5, " * 200 + "]", "x") == {"a": [1.5] * 200}
    with pytest.raises(PlacerError, match="nests deeper than 64 levels"):
        parse_toml(".".join("a" * 30_000) + " = 1", "x")
    assert parse_toml(".".join("a" * 63) + " = 1", "x")
    with pytest.raises(PlacerError, match="nests deeper than 64 levels"):
        parse_toml(".".join("a" * 64) + " = 1", "x")


def aliases(anchored: str, number: int) -> str:
    return f"a: &a {anchored}\nb: [{', '.join(['*a'] * number)}]"


def test_aliases_make_no_more_values_than_a_million() -> None:
    thousand = f"[{', '.join('0' * 1000)}]"
    assert len(parse_yaml(aliases(thousand, 1000), "x")["b"]) == 1000
    with pytest.raises(PlacerError, match="its aliases make far more values than it has"):
        parse_yaml(aliases(thousand, 1100), "x")


def test_keys_and_values_of_objects_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_FEW_VALUES", 10_000)
    hundred = f"{{{', '.join(f'k{n}: 0' for n in range(100))}}}"  # 700 characters
    assert len(parse_yaml(aliases(hundred, 45), "x")["b"]) == 45
    with pytest.raises(PlacerError, match="its aliases make far more values than it has"):
        parse_yaml(aliases(hundred, 60), "x")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: 1\na: 2", 'the key "a" appears twice'),
        ("? [1, 2]\n: 3", "unhashable"),
        ('a: !!int ""', "is not valid YAML: "),
        ("a: [", "is not valid YAML: while parsing a flow"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_yaml_out_of_bounds_is_refused(text: str, match: str) -> None:
    with pytest.raises(PlacerError, match=match) as caught:
        parse_yaml(text, "x")
    assert caught.value.message[-1] != " "
    assert "\n" not in caught.value.message


def test_what_was_decoded_elsewhere_has_the_same_bounds() -> None:
    require_bounds([[]] * 100, "x")
    deep: list[Any] = []
    for _ in range(64):
        deep = [deep]
    with pytest.raises(PlacerError, match="nests deeper than 64 levels"):
        require_bounds(deep, "x")


def test_a_byte_order_mark_is_no_content() -> None:
    assert parse_json(b"\xef\xbb\xbf{}", "x") == {}


def test_the_header_of_a_file_is_placers_own_metadata() -> None:
    assert file_header(None, "x") == file_header({}, "x") == {}
    assert file_header({"format": "pt"}, "x") == {}
    assert file_header({"placer": '{"a": 1}'}, "x") == {"a": 1}
    with pytest.raises(PlacerError, match="the header of x is 3, not a JSON object"):
        file_header({"placer": "3"}, "x")


class Named(Document):
    name: str
    width: int
    high: int = 7


def test_tables_of_placer_know_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fields that have a default may be left out."""
    monkeypatch.setattr(documents.resources, "files", lambda _: tmp_path)
    (tmp_path / "x.toml").write_text("[a]\nwidth = 1\n[b]\nwidth = 2\nhigh = 3")
    assert read_data("placer", "x.toml", Named) == {
        "a": Named(name="a", width=1),
        "b": Named(name="b", width=2, high=3),
    }
    (tmp_path / "x.toml").write_text("a = 3")
    with pytest.raises(PlacerError, match=r"x\.toml: a is 3, not a JSON object"):
        read_data("placer", "x.toml", Named)


class Choice(Document):
    one: Literal["a", "b"] | None
    two: int | msgspec.UnsetType = msgspec.UNSET


def test_a_value_that_was_not_set_is_not_written() -> None:
    assert Choice(one=None).to_json() == {"one": None}
    assert Choice(one="a", two=3).to_json() == {"one": "a", "two": 3}


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (3, "one is 3, allowed are a, b, null"),
        ([], "one is [], expected a text or null"),
        ({}, "one is {}, expected a text or null"),
    ],
)
def test_values_that_are_listed_are_named(value: object, sentence: str) -> None:
    with pytest.raises(PlacerError) as caught:
        validated({"one": value}, Choice, "x", "again")
    assert caught.value.message == f"x: {sentence}"


class Pairs(Document):
    rows: Annotated[list[Inner], msgspec.Meta(min_length=1)]
    most: int | None


def test_a_field_that_is_missing_in_a_list_is_named() -> None:
    for rows, sentence in (
        ([{"width": 1, "name": None}, {"width": 1}], "rows[1] lacks name"),
        ([{"width": 1, "name": None}, {"name": None}], "rows[1] lacks width"),
    ):
        with pytest.raises(PlacerError) as caught:
            validated({"rows": rows, "most": None}, Pairs, "x", "again")
        assert caught.value.message == f"x: {sentence}"


def test_a_number_or_null_is_asked_for_in_these_words() -> None:
    row = {"width": 1, "name": None}
    for change, sentence in (
        ({"most": "8"}, 'most is "8", expected a whole number or null'),
        ({"rows": []}, "rows is [], expected a list of length >= 1"),
    ):
        with pytest.raises(PlacerError) as caught:
            validated({"rows": [row], "most": 8} | change, Pairs, "x", "again")
        assert caught.value.message == f"x: {sentence}"


def test_long_values_are_cut_where_they_are_shown() -> None:
    assert shown("é" * 58) == '"' + "é" * 58 + '"'
    assert shown("é" * 59) == '"' + "é" * 56 + "..."
    assert shown({"a": Path("x")}) == '{"a": "x"}'


def test_a_newer_version_is_told_by_its_number() -> None:
    for version in (2.0, "3", [3]):
        with pytest.raises(PlacerError, match=r"schema_version is .*, allowed are 1 and 2"):
            of_this_version({"schema_version": version}, "x", "again")
    damaged = {"schema_version": 1}

    def upgrade(value: dict[str, Any]) -> dict[str, Any]:
        return {"new": value["old"]}

    assert of_this_version(damaged, "x", "again", upgrade) == {"schema_version": 2}
