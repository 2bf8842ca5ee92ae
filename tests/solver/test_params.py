"""The parameters of the search: read from a file, refused, and used."""

from dataclasses import fields
from pathlib import Path

import pytest

from placer.errors import PlacerError, UsageError
from placer.placement.topology import Topology
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams

FORMATS = Path(__file__).parents[2] / "docs" / "formats.md"


def test_a_file_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text("num_sweeps = 3\ncautions_of_draws = [1.0, 0.0]\nhome_price = 4\n")
    params = SolverParams.read(path)
    assert (params.num_sweeps, params.home_price, params.num_rounds) == (3, 4, 30)
    assert params.cautions_of_draws == (1.0, 0.0)
    changed = {"num_sweeps": 3, "home_price": 4, "cautions_of_draws": (1.0, 0.0)}
    assert params.changed() == changed
    assert SolverParams().changed() == {}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("num_sweep = 3", UsageError, "num_sweep, which is not a parameter"),
        ("num_sweeps = -1", UsageError, "num_sweeps is -1"),
        ("num_sweeps = 1.5", UsageError, "num_sweeps is 1.5"),
        ("num_sweeps = true", UsageError, "num_sweeps is True"),
        ("home_price = nan", UsageError, "home_price is nan"),
        ("home_price = '4'", UsageError, "home_price is '4'"),
        ("full_proof = [3]", UsageError, "full_proof is"),
        ("cautions_of_repairs = [2.0]", UsageError, "between 0 and 1"),
        ("num_parts = 0", UsageError, "num_parts must be at least 1"),
        ("cooling = 0.0", UsageError, "cooling must be above 0"),
        ("num_sweeps = ", PlacerError, "is not valid TOML"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, text: str, error: type[PlacerError], message: str
) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(error, match=message) as caught:
        SolverParams.read(path)
    assert caught.value.hint or "must be" in str(caught.value)


def test_every_parameter_is_documented() -> None:
    """In its docstring and in the specification of the file, with its default."""
    table = FORMATS.read_text(encoding="utf-8")
    for field in fields(SolverParams):
        assert field.name in (SolverParams.__doc__ or "")
        assert f"| `{field.name}` |" in table


def test_a_plan_to_choose_by_keeps_the_other_parameters() -> None:
    params = SolverParams(home_price=4.0, num_tokens=100)
    quick = SolveOptions(topology=Topology(), params=params).quick()
    assert quick.params.changed() == {
        "num_rounds": 0, "num_sweeps": 1, "num_starts": 1,
        "num_tokens": 100, "home_price": 4.0,
    }  # fmt: skip
