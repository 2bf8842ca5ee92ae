"""A result of another kind is called by its name, and no command replaces it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from placer.affinity import Affinity
from placer.affinity.from_traces import affinity_of_traces
from placer.cli.main import main
from placer.errors import PlacerError
from placer.trace import Trace
from placer.trace.selection import EVERYTHING

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(
    tiny_model: Path,
    make_plan: Callable[..., Path],
    make_trace: Callable[..., Trace],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Return a runner of commands: words that name small files stand for their paths."""
    trace = make_trace()
    affinity_of_traces([trace], EVERYTHING).write(tmp_path / "affinity")
    paths = {
        "M": tiny_model,
        "P": make_plan(tiny_model),
        "T": trace.directory,
        "A": tmp_path / "affinity",
    }

    def command(line: str) -> tuple[int, str]:
        words = [str(paths.get(word, word)) for word in line.split()]
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr().err
        for name, path in paths.items():
            said = said.replace(str(path), name)
        return int(ended.value.code or 0), said

    return command


@pytest.mark.parametrize(
    ("line", "what", "order"),
    [
        (
            "solve P --gpus-per-node 2 --out new",
            "P is a plan, not a trace or an affinity file",
            "placer solve TRACE|AFFINITY",
        ),
        (
            "advise P --gpus-per-node 2",
            "P is a plan, not a trace or an affinity file",
            "placer advise TRACE|AFFINITY",
        ),
        ("simulate T P", "T is a trace, not a plan", "placer simulate P T"),
        ("tables A T --out new", "A is an affinity file, not a plan", None),
        ("check T P", "T is a trace, not a plan", "placer check P T"),
        ("affinity P --out new", "P is a plan, not a trace", "placer affinity TRACE"),
        ("affinity --merge T --out new", "T is a trace, not an affinity file", None),
        ("trace links P", "P is a plan, not a trace", "placer trace links TRACE"),
        (
            "export sglang M P --out new.json",
            "M is a checkpoint, not a plan",
            "placer export sglang P M --out new.json",
        ),
        ("export csv A --out new.csv", "A is an affinity file, not a plan", None),
        (
            "verify P M M",
            "P is a plan, not a checkpoint or an exported checkpoint",
            "placer verify ORIGINAL EXPORTED PLAN",
        ),
    ],
)
def test_swapped_arguments_are_named(
    line: str, what: str, order: str | None, run: Run
) -> None:
    code, said = run(line)
    assert code == 1
    first, second = said.splitlines()
    assert first == f"placer: {what}"
    assert second.startswith(("hint: it takes: ", "hint: in this order: "))
    assert order is None or second.endswith(f": {order}")


def test_the_original_is_no_export(run: Run) -> None:
    code, said = run("verify M M P")
    assert code == 1
    assert said.startswith("placer: M is a checkpoint, not an exported checkpoint\n")
    assert "an export has placer.json" in said


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("affinity T --out {plan} --force", "plan"),
        ("export csv P --out {plan}.csv --force", "plan"),
        ("trace sample T --sequences 2 --out {model} --force", "checkpoint"),
        ("solve T --gpus-per-node 2 --out {affinity} --force", "affinity file"),
    ],
)
def test_force_replaces_no_other_kind(
    line: str,
    kind: str,
    run: Run,
    make_plan: Callable[..., Path],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    plan, affinity, model = (tmp_path / n for n in ("own.json", "own", "empty"))
    content = make_plan(tiny_model).read_bytes()
    for one in (plan, Path(f"{plan}.csv")):
        one.write_bytes(content)
    affinity.write_bytes((tmp_path / "affinity").read_bytes())
    model.mkdir()
    (model / "config.json").write_text("{}")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, said = run(line.format(plan=plan, affinity=affinity, model=model))
    assert code == 1
    # A checkpoint that placer did not write was never replaced.
    assert f"is a{'n' * (kind[0] == 'a')} {kind}" in said or "did not write" in said
    assert "--force\n" not in said
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("cut", [100, 10**6])
def test_a_damaged_file_is_replaced(cut: int, run: Run, tmp_path: Path) -> None:
    whole = (tmp_path / "affinity").read_bytes()
    damaged = tmp_path / "damaged"
    damaged.write_bytes(whole[:-cut])
    code, said = run(f"affinity T --out {damaged} --force")
    assert code == 0, said
    assert Affinity.read(damaged).num_tokens


def test_nothing_tells_to_replace_a_foreign_file(tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("one two three " * 100)
    with pytest.raises(PlacerError, match="cannot be read") as caught:
        Affinity.read(text)
    assert caught.value.hint == "write one: placer affinity TRACE --out AFFINITY"
