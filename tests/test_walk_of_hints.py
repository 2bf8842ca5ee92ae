"""Every command that real runs print does run, and none leads to where it was printed."""

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from placer.cli.main import main
from placer.model import ModelSpec
from placer.placement import Placement
from placer.trace import Chunk, TraceWriter
from tests.plans import unsolved_plan
from tests.test_hints import FOUND, WITH_COPIES

# What a user puts for a word in capitals; files of that name are in the folder.
FILLED = {"N": "1", "M": "4", "X": "4", "DIR": "MODEL"}
QUICK = ["--num-rounds", "0", "--num-sweeps", "1", "--proof", "none"]
SCENARIOS = [
    "advise TRACE --gpus-per-node 4",
    "advise TRACE --gpus-per-node 4 --engine sglang",
    "advise AFFINITY --gpus-per-node 4",
    "advise AFFINITY --gpus-per-node 4 --engine vllm",
    "advise AFFINITY --gpus-per-node 3 --engine vllm-agrs",
    "advise TRACE --nodes 2 --gpus-per-node 2 --engine trtllm-onesided",
    "advise TRACE --nodes 2 --gpus-per-node 2 --engine trtllm-deepep",
    "solve TRACE --gpus-per-node 3 --out NEW",
    "solve TRACE --gpus-per-node 4 --redundant-experts 4 --out NEW",
    "solve AFFINITY --gpus-per-node 4 --policy follow --out NEW",
    "solve TRACE --gpus-per-node 4 --redundant-experts 4 --engine vllm-agrs --out NEW",
    "solve TRACE --nodes 2 --gpus-per-node 2 --engine trtllm-twosided --out NEW",
    "solve TRACE --nodes 2 --gpus-per-node 2 --engine sglang-megamoe --out NEW",
    "solve TRACE --gpus-per-node 4 --engine sglang-deepep-ll --out NEW",
    "solve TRACE --gpus-per-node 4 --max-imbalance 1.0001 --out NEW",
    "simulate PLAN TRACE",
    "simulate COPIES TRACE",
    "simulate COPIES TRACE --engine vllm",
    "simulate PLAN TRACE --engine sglang",
    "check PLAN TRACE",
    "check PLAN AFFINITY",
    "check IMPORTED TRACE",
    "tables COPIES TRACE --out NEW",
    "export checkpoint PLAN --out NEW",
    "export checkpoint PLAN MODEL --out NEW",
    "export checkpoint COPIES MODEL --out NEW",
    "export sglang DRAWN MODEL --out NEW.json",
    "export trtllm DRAWN MODEL --out NEW.yaml",
    "export sglang PLAN --out NEW.json",
    "export json PLAN --out NEW.csv",
    "import sglang-map SERVED.json --out NEW",
    "import csv-map MAP.json --gpus-per-node 4 --out NEW",
    "import npz ROWS.npz --out NEW",
    "inspect TRACE TRACE",
    "trace dedup TRACE --out NEW",
]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of 40 sequences, its counts, and plans, named as hints name them."""
    folder = tmp_path_factory.mktemp("walk")
    (folder / "MODEL").symlink_to(tiny_model)
    spec = ModelSpec.from_checkpoint(tiny_model)
    rng = np.random.default_rng(0)
    first = rng.choice(4, (2, 2000), p=(0.45, 0.45, 0.05, 0.05))
    experts = np.stack([first, first + 4], axis=2).astype(np.uint8)
    with TraceWriter(directory=folder / "TRACE", model=spec) as out:
        out.append(
            Chunk(
                experts=tuple(experts),
                token_ids=rng.integers(50, size=2000).astype(np.int32),
                sequence_ids=np.repeat(np.arange(40), 50).astype(np.int32),
                positions=np.tile(np.arange(50), 40).astype(np.int32),
            )
        )
        out.finish()
    rows = np.concatenate([np.stack([*experts], axis=1)] * 2)
    rows[:400] = rows[0]
    np.savez(folder / "ROWS.npz", experts=rows, sequence_ids=np.arange(4000) // 100)
    plain = unsolved_plan(spec, Placement.from_json([[*range(8)]] * 2, (8, 8), 4, 1))
    copies = replace(plain, placement=Placement.from_json([WITH_COPIES] * 2, (8, 8), 4, 1))
    copies.write(folder / "COPIES")
    replace(copies, provenance={"replica_choice": "cover"}).write(folder / "DRAWN")
    solver = msgspec.structs.replace(plain.solver, status="imported")
    replace(plain, solver=solver).write(folder / "IMPORTED")
    for words in (
        "affinity TRACE --out AFFINITY",
        "solve TRACE --gpus-per-node 4 --fold 0/2 --out PLAN",
        "export json PLAN --out MAP.json",
        "export csv PLAN --out FILE.csv",
        "export sglang PLAN MODEL --out SERVED.json",
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            assert run(words.split()) == 0
    return folder


def run(words: list[str]) -> int:
    with pytest.raises(SystemExit) as done:
        main([*words, *(QUICK if words[0] == "solve" else [])])
    return int(done.value.code or 0)


NUMBERS = itertools.count()


def filled(command: str, asked: list[str]) -> list[str]:
    """Return the words of a command, each output under a new name.

    A word in capitals that the first command gave a file for stands for that file.
    """
    words = shlex.split(command, comments=True)[1:]
    given = next((one for one in asked if one in ("COPIES", "DRAWN", "IMPORTED")), "PLAN")
    for place, word in enumerate(words):
        if place and words[place - 1] == "--out":
            words[place] = f"written{next(NUMBERS)}{Path(word).suffix}"
        elif word == "PLAN":
            words[place] = given
        else:
            words[place] = FILLED.get(word, word)
    return words


def printed(told: str) -> Iterator[str]:
    for line in told.splitlines():
        for found in FOUND.finditer(re.sub(r"\s+#.*", "", line.strip())):
            yield found[1].strip().rstrip(".")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_command_that_is_printed_runs(
    scenario: str, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever follows a hint is not refused: so no two hints lead in a circle."""
    monkeypatch.chdir(folder)
    code = run(filled(f"placer {scenario}", []))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    commands = [*printed(captured.out + "\n" + captured.err)]
    assert code == 0 or "hint: " in captured.err, captured.err
    for command in commands:
        words = filled(command, scenario.split())
        assert run(words) == 0, (scenario, command, words, capsys.readouterr().err)
