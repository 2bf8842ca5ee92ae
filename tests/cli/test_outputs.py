"""Every command that writes: nothing is replaced unasked, no input ever, one at a time."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer.main

from placer.cli.main import app, main
from placer.placement.reference import contiguous
from placer.run.writing import lock_path
from placer.trace import Trace

SOLVE = "solve TRACE --gpus-per-node 4 --max-imbalance 4 --num-rounds 0 --proof none"
FRONTIER = SOLVE.replace("--max-imbalance 4", "--frontier 3,4")
#: Words, the option that names the output, its suffix, and whether it is a directory.
WRITERS = {
    "affinity": ("affinity TRACE", "--out", "", False),
    "solve": (SOLVE, "--out", ".json", False),
    "solve --frontier": (FRONTIER, "--out", "", True),
    "tables": ("tables PLAN TRACE", "--out", "", False),
    "import csv": ("import csv CSV", "--out", "", True),
    "import csv-loads": ("import csv-loads LOADS --model MODEL", "--out", "", False),
    "trace split": ("trace split TRACE --fold 0/2", "--out", "", True),
    "trace sample": ("trace sample TRACE --sequences 2", "--out", "", True),
    "trace merge": ("trace merge TRACE", "--out", "", True),
    "trace dedup": ("trace dedup TRACE", "--out", "", True),
    "record": ("record MODEL --corpus TEXT", "--out", "", True),
    "export checkpoint": ("export checkpoint PLAN MODEL", "--out", "", True),
    "export ranks": ("export ranks PLAN MODEL", "--out", "", True),
    "export sglang": ("export sglang PLAN MODEL", "--out", ".json", False),
    "export eplb": ("export eplb PLAN MODEL", "--out", ".safetensors", False),
    "export csv": ("export csv PLAN", "--out", ".csv", False),
    "inspect": ("inspect PLAN", "--html", "", False),
    "prove": ("prove PLAN TRACE", "--out", ".json", False),
    "prove --certificate": ("prove PLAN TRACE", "--certificate", ".json", False),
}
# Slow, or without a file that is read: the rules are tested by hand below.
ELSEWHERE = {"calibrate", "demo", "export", "import", "trace"}


def commands(command: object, words: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    for name, one in getattr(command, "commands", {}).items():
        yield " ".join((*words, name)), one
        yield from commands(one, (*words, name))


def test_every_command_that_writes_is_asked_before_it_replaces() -> None:
    """One that comes later too: whoever writes has --force and stands in the table."""
    found = dict(commands(typer.main.get_command(app)))
    writers = {
        name
        for name, command in found.items()
        if {"--out", "--html"} & {word for p in command.params for word in p.opts}
    }
    assert len(writers) > 10
    for name in writers:
        assert "--force" in {word for p in found[name].params for word in p.opts}, name
    known = {name.partition(" --")[0] for name in WRITERS}
    assert {name for name in writers if not any(k.startswith(name) for k in known)} <= (
        ELSEWHERE
    )


@pytest.fixture
def paths(
    tmp_path: Path,
    tiny_model: Path,
    make_plan: Callable[..., Path],
    make_trace: Callable[..., Trace],
) -> dict[str, Path]:
    """Small inputs by the words that stand for them."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "text.txt").write_text("one two three four five six " * 20)
    rows = [f"{s},{p},0,{s},{s + p + 1}" for s in range(2) for p in range(3)]
    header = "sequence_id,position,layer,e0,e1"
    (tmp_path / "rows.csv").write_text("\n".join([header, *rows]) + "\n")
    counts = [f"{layer},{expert},{expert + 3}" for layer in range(2) for expert in range(8)]
    header = "layer,expert,count"
    (tmp_path / "loads.csv").write_text("\n".join([header, *counts]) + "\n")
    return {
        "TRACE": make_trace(num_experts=(8, 8)).directory,
        "MODEL": model,
        "PLAN": make_plan(model),
        "CSV": tmp_path / "rows.csv",
        "LOADS": tmp_path / "loads.csv",
        "TEXT": tmp_path / "text",
    }


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(paths: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a runner of a command of the table: its exit code and what it said."""

    def command(name: str, out: Path, *more: str) -> tuple[int, str]:
        words, option, _, _ = WRITERS[name]
        line = [str(paths.get(word, word)) for word in words.split()]
        with pytest.raises(SystemExit) as ended:
            main([*line, option, str(out), *more])
        return int(ended.value.code or 0), capsys.readouterr().err

    return command


def contents(place: Path) -> dict[str, bytes]:
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    return {str(path): path.read_bytes() for path in files if path.is_file()}


@pytest.mark.parametrize("name", WRITERS)
def test_what_exists_is_replaced_by_force_alone(
    name: str, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / f"out{WRITERS[name][2]}"
    assert run(name, out)[0] == 0
    written, around = contents(out), contents(tmp_path)
    code, said = run(name, out)
    assert code == 1
    assert f"{out} already exists" in said
    assert "--force" in said
    assert contents(tmp_path) == around
    code, said = run(name, out, "--force")
    assert code == 0, said
    assert contents(out) == written
    assert contents(tmp_path) == around, "nothing is left beside it"
    own = tmp_path / "own"
    own.mkdir()
    (own / "precious").touch()
    target = own.rename(tmp_path / f"own{WRITERS[name][2]}")
    assert run(name, target, "--force")[0] == 1
    assert (target / "precious").exists()


@pytest.mark.parametrize("name", WRITERS)
def test_no_input_is_written(
    name: str, run: Run, paths: dict[str, Path], tmp_path: Path
) -> None:
    words, _, suffix, _ = WRITERS[name]
    before = contents(tmp_path)
    for one in [paths[word] for word in words.split() if word in paths]:
        (tmp_path / "link").symlink_to(one)
        inside = [one / f"new{suffix}"] if one.is_dir() else []
        for target in (one, tmp_path / "link", *inside):
            code, said = run(name, target, "--force")
            assert code == 2, (target, said)
            assert "the input" in said
        (tmp_path / "link").unlink()
    assert contents(tmp_path) == before


HOLD = """
import sys
from pathlib import Path
from placer.run.writing import claimed
with claimed(Path(sys.argv[1]), directory=True, force=True):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_two_writers_of_one_target(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of two processes is refused in one sentence, whatever it writes."""
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "claimed\n"
        for name in WRITERS:
            if WRITERS[name][2]:
                continue  # known by its suffix, so never written there
            code, said = run(name, out, "--force")
            assert code == 1, name
            assert said.splitlines()[0] == f"placer: another process is writing {out}"
        with pytest.raises(SystemExit) as ended:
            main(["demo", "--out", str(out), "--force"])
        assert ended.value.code == 1
        assert f"placer: another process is writing {out}" in capsys.readouterr().err
        process.stdin.close()
    assert not out.exists()
    assert not lock_path(out).exists()
    assert run("trace sample", out)[0] == 0


def test_of_two_imports_at_once_one_writes_all_and_one_nothing(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    rows = ["sequence_id,position,layer,e0,e1"]
    rows += [
        f"{s},{p},0,{s % 8},{(s + 1 + p % 7) % 8}" for s in range(3000) for p in range(20)
    ]
    paths["CSV"].write_text("\n".join(rows) + "\n")
    out = tmp_path / "out"
    words = [sys.executable, "-m", "placer.cli.main", "import", "csv", paths["CSV"]]
    for _ in range(2):
        pair = [
            subprocess.Popen(
                [*map(str, words), "--out", str(out)], stderr=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        said = [one.communicate()[1] for one in pair]
        assert sorted(one.returncode for one in pair) == [0, 1], said
        assert Trace(out).read().num_tokens == 60_000
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("solve TRACE --gpus-per-node 4 --out x.npz", "a plan is a .json file"),
        ("tables PLAN TRACE --out x.json", "a table is a .safetensors file"),
        ("affinity TRACE --out x.json", "an affinity file is a .safetensors file"),
        ("inspect TRACE --html x.txt", "a report is a .html file"),
    ],
)
def test_a_name_of_another_kind_of_file_is_refused_before_the_work(
    line: str,
    said: str,
    make_trace: Callable[..., Trace],
    write_plan: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    trace = make_trace()
    plan = write_plan(trace.model, contiguous(trace.model.num_experts, 4))
    paths = {"TRACE": str(trace.directory), "PLAN": str(plan)}
    with pytest.raises(SystemExit) as ended:
        main([paths.get(word, word) for word in line.split()])
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in told
    assert "hint: name it x" in told
    assert not list(tmp_path.glob("x*"))
