"""A missing input is the first thing that is told, whatever else is wrong."""

from pathlib import Path

import pytest

from placer.cli.main import main


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


def test_a_folder_without_names_alike_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "no" / "such" / "trace"
    with pytest.raises(SystemExit):
        main(["advise", str(missing), "--gpus-per-node", "8"])
    assert capsys.readouterr().err == (
        f"placer: {missing} does not exist\nhint: check the path: ls -l {tmp_path}\n"
    )
