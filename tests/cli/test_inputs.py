"""A missing input is the first thing that is told, whatever else is wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest

from placer.cli.main import main
from placer.trace import Trace

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    "words",
    [
        # Without a replica choice, which is not asked for then.
        "solve {} --gpus-per-node 8 --redundant-experts 8 --out plan",
        "advise {} --gpus-per-node 8",
        "simulate plan.json {}",
        "simulate {} loads.aff",
        "check plan.json {}",
        "affinity {} --out new",
        "export csv {} --out new.csv",
        "import npz {} --out new",
        "trace validate {}",
        "solve loads.aff --gpus-per-node 8 --start {} --out plan",
    ],
)
def test_names_alike_are_offered(
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("loads.aff", "plan.json"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit) as ended:
        main(words.format("load.aff").split())
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told == "placer: load.aff does not exist\nhint: did you mean loads.aff?\n"


def test_a_link_to_nothing_is_not_offered_for_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "trace"
    link.symlink_to("gone")
    with pytest.raises(SystemExit):
        main(["advise", str(link), "--gpus-per-node", "8"])
    assert capsys.readouterr().err == (
        f"placer: {link} does not exist\nhint: check the path: ls -l {tmp_path}\n"
    )


@pytest.mark.parametrize(
    ("sought", "present", "meant"),
    [
        ("nofile.txt", "before.txt", False),
        ("plans.json", "plan.json", True),
        ("plan", "plan.json", True),
        ("plam.json", "plan.toml", False),
    ],
)
def test_only_names_that_are_alike_are_offered(
    sought: str, present: str, meant: bool, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / present).touch()
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / sought)])
    assert (present in capsys.readouterr().err) == meant


def test_a_file_of_another_kind_is_not_offered(
    make_trace: Callable[..., Trace], tmp_path: Path, capsys: Captured
) -> None:
    trace = make_trace().directory
    trace.rename(tmp_path / "demo1")
    plan = tmp_path / "demo2"
    plan.write_text('{"physical_to_logical_map": [], "solver": {}}')
    with pytest.raises(SystemExit):
        main(["advise", str(tmp_path / "demo"), "--gpus-per-node", "2"])
    told = capsys.readouterr().err
    assert f"did you mean {tmp_path / 'demo1'}?" in told
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path / "demo"), str(tmp_path / "demo1")])
    assert f"did you mean {plan}?" in capsys.readouterr().err


def test_a_folder_without_names_alike_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "no" / "such" / "trace"
    with pytest.raises(SystemExit):
        main(["advise", str(missing), "--gpus-per-node", "8"])
    assert capsys.readouterr().err == (
        f"placer: {missing} does not exist\nhint: check the path: ls -l {tmp_path}\n"
    )
