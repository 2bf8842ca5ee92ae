"""The JSON Schemas of the documentation are those of the types that files are read by."""

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "schemas"
_spec = importlib.util.spec_from_file_location("write_schemas", FOLDER / "write.py")
write = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(write)


@pytest.mark.parametrize("name", write.KINDS)
def test_a_schema_is_that_of_its_type(name: str) -> None:
    found = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert found == write.schema_text(name), "python docs/schemas/write.py"


def test_every_schema_has_a_type_and_a_line_in_the_page() -> None:
    page = (FOLDER.parent / "formats.md").read_text(encoding="utf-8")
    assert {path.stem for path in FOLDER.glob("*.json")} == set(write.KINDS)
    assert all(f"schemas/{name}.json" in page for name in write.KINDS)


def test_a_plan_must_have_every_field() -> None:
    schema = json.loads(write.schema_text("plan"))["$defs"]
    known = schema["SolverReport"]["properties"].keys()
    assert set(schema["SolverReport"]["required"]) == known - {"layer_gaps"}
    assert "prices" not in schema["Metrics"]["required"]
    assert schema["PlanFile"]["additionalProperties"] is False
