"""Every command refuses with one sentence, the remedy and the documented exit code."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from placer.affinity.from_traces import affinity_of_traces
from placer.cli.main import main
from placer.trace import EVERYTHING, Trace

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Return a runner of a command that must fail and leave nothing at ``out``."""

    def command(exit_code: int, *words: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        assert ended.value.code == exit_code, printed.err
        assert printed.out == ""
        errors = [
            e for e in printed.err.splitlines() if not e.startswith(("warning", "prove"))
        ]
        assert len(errors) == 2, printed.err
        assert errors[0].startswith("placer: ")
        assert errors[1].startswith("hint: ")
        assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"
        return printed.err

    return command


@pytest.fixture
def world(
    tmp_path: Path,
    tiny_model: Path,
    tiny_sharded_model: Path,
    make_trace: Callable[..., Trace],
    make_plan: Callable[..., Path],
) -> dict[str, Path]:
    """Return a trace, a plan of another model, a truncated trace and so on."""
    trace = make_trace().directory
    truncated = tmp_path / "truncated"
    shutil.copytree(trace, truncated)
    chunk = truncated / "chunk-00000.safetensors"
    chunk.write_bytes(chunk.read_bytes()[:-40])
    text = tmp_path / "text.txt"
    text.write_text("some text to read")
    blob = tmp_path / "blob.bin"
    blob.write_bytes(bytes(range(256)))
    counts = tmp_path / "counts.safetensors"
    affinity_of_traces([Trace(trace)], EVERYTHING).write(counts)
    return {
        "trace": trace,
        "counts": counts,
        "truncated": truncated,
        "plan": make_plan(tiny_model),
        "model": tiny_model,
        "other": tiny_sharded_model,
        "text": text,
        "blob": blob,
        "nowhere": tmp_path / "nowhere",
        "out": tmp_path / "out",
    }


CASES = [
    (1, "does not exist", "record nowhere --corpus text --out out"),
    (1, "nowhere does not exist", "record model --corpus nowhere --out out"),
    (2, "no text", "record model --out out"),
    (1, "already exists", "record model --corpus text --out trace"),
    (1, "does not exist", "import npz nowhere --out out"),
    (1, "no readable", "import npz blob --out out"),
    (2, "format 'zip' is not known", "import zip blob --out out"),
    (1, "does not exist", "affinity nowhere --out out"),
    (1, "is damaged: SHA-256", "affinity truncated --out out"),
    (2, "given twice", "affinity trace trace --out out"),
    (1, "does not exist", "trace validate nowhere"),
    (1, "is damaged: SHA-256", "trace validate truncated"),
    (2, "nothing to split by", "trace split trace --out out"),
    (2, "99 sequences requested", "trace sample trace --sequences 99 --out out"),
    (2, "given twice", "trace merge trace trace --out out"),
    (1, "does not exist", "affinity --merge nowhere --out out"),
    (1, "cannot be read", "affinity --merge blob --out out"),
    (2, "tokens can no longer be selected", "affinity --merge blob --fold 0/2 --out out"),
    (2, "a fold has the form K/N", "affinity trace --fold half --out out"),
    (2, "exclude each other", "affinity trace --fold 0/2 --not-fold 0/2 --out out"),
    (1, "does not exist", "solve nowhere --gpus-per-node 2 --out out"),
    (1, "is damaged: SHA-256", "solve truncated --gpus-per-node 2 --out out"),
    (1, "affinity .* cannot be read", "solve blob --gpus-per-node 2 --out out"),
    (2, "8 experts do not divide over 3", "solve trace --gpus-per-node 3 --out out"),
    (2, "is not possible here", "solve trace --gpus-per-node 2 --policy oracle --out out"),
    (2, "--objective cost", "solve trace --gpus-per-node 2 --objective cost --out out"),
    (2, "at least 1", "solve trace --gpus-per-node 2 --max-imbalance 0.5 --out out"),
    (2, "--batch-size", "record model --corpus text --batch-size 0 --out out"),
    (1, r"not a readable \.pt file", "import sglang-dump text --out out"),
    (2, "per-expert", "solve trace --gpus-per-node 2 --exchange per-expert --out out"),
    (3, "out of reach", "solve trace --gpus-per-node 8 --max-imbalance 1.0 --out out"),
    (
        4,
        "no proof",
        "solve trace --gpus-per-node 4 --max-imbalance 2 --policy follow "
        "--robust bootstrap --proof none --require-optimal --out out",
    ),
    (2, "--robust sometimes", "solve trace --gpus-per-node 2 --robust sometimes --out out"),
    (2, "no domains", "solve trace --gpus-per-node 2 --robust domains --out out"),
    (
        2,
        "3 redundant",
        "solve trace --gpus-per-node 2 --redundant-experts 3 --replica-choice hash "
        "--out out",
    ),
    (2, "needs the tokens", "solve counts --gpus-per-node 2 --robust bootstrap --out out"),
    (1, "does not exist", "tables nowhere trace --out out"),
    (2, "different models", "tables plan trace --out out"),
    (1, "does not exist", "simulate nowhere trace"),
    (2, "different models", "simulate plan trace"),
    (1, "does not exist", "export checkpoint nowhere model --out out"),
    (1, "does not exist", "export checkpoint plan nowhere --out out"),
    (2, "different models", "export checkpoint plan other --out out"),
    (2, "needs MODEL", "export checkpoint plan --out out"),
    (2, "target 'vllm' is not known", "export vllm plan model --out out"),
    (1, "not an exported checkpoint", "export checkpoint model --inverse --out out"),
    (2, r"must have the suffix \.json", "export sglang plan model --out out"),
    (1, "not an exported checkpoint", "verify model model plan"),
    (1, "does not exist", "verify nowhere model plan"),
    (1, "does not exist", "inspect nowhere"),
    (1, "is not a file that placer can read", "inspect blob"),
    (1, "does not exist", "demo --model nowhere --out out"),
    (1, "does not exist", "advise nowhere --gpus-per-node 2"),
    (1, "cannot be read", "advise blob --gpus-per-node 2"),
    (2, "is for --hardware", "advise trace --gpus-per-node 2 --weight-bytes 1"),
    (2, "is for --hardware", "simulate plan trace --expert-size 64"),
    (1, "does not exist", "check nowhere trace"),
    (2, "different models", "check plan trace"),
    (1, "does not exist", "replay nowhere model --trace trace"),
    (1, "does not exist", "replay plan model --trace nowhere"),
    (2, "different models", "replay plan model --trace trace"),
    (2, r"end in \.toml", "calibrate --ranks 2 --out out"),
    (1, "does not exist", "trace dedup nowhere --out out"),
    (1, "does not exist", "trace links nowhere"),
    (1, "is damaged: SHA-256", "trace learning truncated --gpus-per-node 2"),
]


@pytest.mark.parametrize(("exit_code", "match", "line"), CASES, ids=[c[2] for c in CASES])
def test_refused(
    world: dict[str, Path], refused: Refused, exit_code: int, match: str, line: str
) -> None:
    command, *words = line.split()
    words = [command, *(world.get(word, word) for word in words)]
    assert re.search(match, refused(exit_code, *words))


@pytest.mark.parametrize(
    ("work", "line"),
    [
        ("placer.planning.solving.solve_request", "solve trace --gpus-per-node 2"),
        ("placer.planning.tables.make_table", "tables plan trace"),
        ("placer.affinity.from_traces.affinity_of_traces", "affinity trace"),
    ],
)
def test_a_directory_in_place_of_the_file_is_refused_before_any_work(
    world: dict[str, Path],
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    work: str,
    line: str,
) -> None:
    monkeypatch.setattr(work, lambda *_, **__: pytest.fail("worked in vain"))
    words = [world.get(word, word) for word in line.split()]
    assert "is a directory" in refused(1, *words, "--out", world["truncated"])


def test_experts_out_of_range_are_refused(
    world: dict[str, Path], tiny_model: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "archive.npz"
    experts = np.tile(np.asarray([3, 400]), (5, 2, 1))
    np.savez(path, experts=experts, sequence_ids=np.zeros(5, int))
    words = ("import", "npz", path, "--model", tiny_model, "--out", world["out"])
    assert "ids up to 400" in refused(1, *words)


def test_a_plan_edited_by_hand_is_refused(world: dict[str, Path], refused: Refused) -> None:
    value = json.loads(world["plan"].read_text()) | {"sha256": None}
    for change, match in (
        ({"physical_to_logical_map": [[0] * 8, [1] * 8]}, "expert 1 has no slot"),
        ({"num_ranks": 3}, "8 slots do not divide over 3 ranks"),
        ({"solver": {}}, "solver lacks status"),
        ({"schema_version": 9}, "has schema_version 9"),
    ):
        world["plan"].write_text(json.dumps(value | change))
        assert match in refused(1, "simulate", world["plan"], world["trace"])


def test_the_unforeseen_is_one_sentence_and_a_traceback_on_demand(
    world: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object) -> None:
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr("placer.placement.Plan.read", fails)
    words = ["inspect", str(world["plan"])]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "placer failed: KeyError: 'first line\\nsecond line'; "
        "run again with PLACER_DEBUG=1 for the traceback\n"
    )
    monkeypatch.setenv("PLACER_DEBUG", "1")
    with pytest.raises(KeyError):
        main(words)


def test_ctrl_c_exits_130(world: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("placer.placement.Plan.read", interrupt)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(world["plan"])])
    assert ended.value.code == 130


@pytest.mark.parametrize(
    "redirect", [">&-", ">&- 2>&-", "| true", "2>&-"], ids=["out", "both", "pipe", "err"]
)
def test_a_closed_stream_is_no_failure_of_ours(
    world: dict[str, Path], redirect: str
) -> None:
    command = f"{sys.executable} -m placer.cli.main inspect {world['plan']} {redirect}"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    assert ended.returncode == 0
    assert ended.stderr == b""


def test_an_ascii_terminal_shows_any_text(world: dict[str, Path]) -> None:
    value = json.loads(world["plan"].read_text()) | {"sha256": None}
    value["model"]["id"] = "mod\u00e8le"
    world["plan"].write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "placer.cli.main",
            "inspect",
            str(world["plan"]),
            "--details",
        ],
        env={**os.environ, **ascii_only, "PYTHONIOENCODING": "ascii:strict"},
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert b"mod\\xe8le" in ended.stdout


@pytest.fixture
def full_disk(tmp_path: Path) -> Path:
    """A file system of 64 KiB; only root may mount one."""
    place = tmp_path / "full"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system does not let root mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_nothing(
    world: dict[str, Path], full_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (full_disk / "ballast").write_bytes(bytes(65_536))
    endings = ("json", "safetensors", "json", "json", "html")
    outs = (full_disk / f"{a}.{b}" for a, b in zip("abcde", endings, strict=True))
    for words in (
        ("record", world["model"], "--corpus", world["text"], "--out", next(outs)),
        ("affinity", world["trace"], "--out", next(outs)),
        (
            "solve",
            world["trace"],
            "--gpus-per-node",
            "2",
            "--max-imbalance",
            "3",
            "--out",
            next(outs),
        ),
        ("export", "checkpoint", world["plan"], world["model"], "--out", next(outs)),
        ("inspect", world["plan"], "--html", next(outs)),
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        printed = capsys.readouterr().err
        assert ended.value.code == 1, printed
        assert "df -h" in printed, words
        left = {path.name for path in full_disk.iterdir()} - {"ballast"}
        assert left <= {"a.json.placer-partial", ".a.json.placer"}, (
            f"only placer record goes on: {words}"
        )
