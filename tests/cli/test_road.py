"""The commands one after another, as a user types them, on a small real model."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from placer.cli.main import main
from placer.trace import Trace
from tests.conftest import TINY_TEXT

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a runner of one command that must succeed; it returns stdout."""

    def command(*words: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out

    return command


def test_from_a_model_to_a_verified_checkpoint(
    tiny_model: Path, tmp_path: Path, run: Run
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TINY_TEXT * 4)
    trace, plan, out = tmp_path / "trace", tmp_path / "plan.json", tmp_path / "exported"
    recorded = json.loads(
        run(
            "record",
            tiny_model,
            "--corpus",
            text,
            "--sequence-length",
            32,
            "--out",
            trace,
            "--json",
        )
    )
    assert recorded["num_layers"] == 2
    assert recorded["domains"] == ["text"]

    affinity = tmp_path / "affinity.safetensors"
    counted = json.loads(run("affinity", trace, "--out", affinity, "--json"))
    assert counted["num_tokens"] == recorded["num_tokens"]
    assert counted["transition_pairs"] == recorded["num_tokens"] * 4

    options = ["--gpus-per-node", 4, "--max-imbalance", 4]
    solved = json.loads(
        run("solve", trace, *options, "--fold", "0/2", "--out", plan, "--json")
    )
    assert solved["metrics"]["heldout"]["fixed"]["remote_rank_copies_per_token"] > 0
    assert (
        json.loads(plan.read_text())["solver"]["objective"] == solved["solver"]["objective"]
    )
    counts_only = tmp_path / "counts.json"
    from_counts = json.loads(
        run(
            "solve",
            affinity,
            *options,
            "--policy",
            "follow",
            "--out",
            counts_only,
            "--json",
        )
    )
    assert from_counts["metrics"] == {"profile": None, "heldout": None, "baselines": {}}

    table = tmp_path / "table.safetensors"
    run("tables", plan, trace, "--embeddings", tiny_model, "--out", table)
    judged = json.loads(
        run("simulate", plan, trace, "--fold", "1/2", "--table", table, "--json")
    )
    assert set(judged["policies"]) >= {"fixed", "follow", "token", "token_equal", "oracle"}
    assert judged["policies"]["fixed"] == solved["metrics"]["heldout"]["fixed"]
    assert set(judged["baselines"]) == {"contiguous", "balanced", "eplb"}

    run("export", "checkpoint", plan, tiny_model, "--out", out)
    verified = json.loads(run("verify", tiny_model, out, plan, "--corpus", text, "--json"))
    assert verified["num_ties"] == 0
    assert verified["max_logit_difference"] <= verified["tolerance"]
    run("export", "checkpoint", out, "--inverse", "--out", tmp_path / "back")
    restored = (tmp_path / "back" / "model.safetensors").read_bytes()
    assert restored == (tiny_model / "model.safetensors").read_bytes()
    run("export", "sglang", plan, tiny_model, "--out", tmp_path / "map.json")

    for kind, artifact in (
        ("trace", trace),
        ("affinity", affinity),
        ("plan", plan),
        ("table", table),
        ("checkpoint", out),
        ("checkpoint", tiny_model),
    ):
        html = tmp_path / "report.html"
        shown = json.loads(run("inspect", artifact, "--html", html, "--force", "--json"))
        assert shown["kind"] == kind
        assert "<h1>" in html.read_text()


@pytest.mark.parametrize(
    ("line", "fact", "told"),
    [
        (
            "import npz ARCHIVE --out OUT",
            {"num_experts": [8] * 3},
            "num_experts 8 in each of 3",
        ),
        ("trace validate TRACE", {"num_tokens": 400}, "num_tokens 400"),
        ("trace split TRACE --fold 0/2 --out OUT", {"num_sequences": 4}, "num_sequences 4"),
        ("trace sample TRACE --sequences 3 --out OUT", {"num_sequences": 3}, "sequences 3"),
        ("trace merge TRACE OTHER --out OUT", {"num_tokens": 500}, "num_tokens 500"),
        ("trace dedup TRACE --out OUT", {"tokens_searched": 400}, "tokens_searched 400"),
        ("trace links TRACE", {"num_tokens": 400}, "/trace: 400 tokens"),
    ],
)
def test_traces_are_worked_on_and_told_of_in_both_forms(
    make_trace: Callable[..., Trace],
    tmp_path: Path,
    run: Run,
    line: str,
    fact: dict[str, object],
    told: str,
) -> None:
    trace, other = make_trace(), make_trace("other", num_tokens=100, seed=1)
    tokens, archive = trace.read(), tmp_path / "archive.npz"
    np.savez(
        archive, experts=np.stack(tokens.experts, axis=1), sequence_ids=tokens.sequence_ids
    )
    given = {"TRACE": trace.directory, "OTHER": other.directory, "ARCHIVE": archive}

    def words(out: str) -> list[object]:
        return [(given | {"OUT": tmp_path / out}).get(word, word) for word in line.split()]

    shown = json.loads(run(*words("one"), "--json"))
    assert shown.get(str(trace.directory), shown).items() >= fact.items()
    assert told in " ".join(run(*words("two")).split())
    if "OUT" in line:
        one, two = (Trace(tmp_path / out).read() for out in ("one", "two"))
        assert all((a == b).all() for a, b in zip(one.experts, two.experts, strict=True))


def test_tables_for_people_are_printed_too(
    make_trace: Callable[..., object], tmp_path: Path, run: Run
) -> None:
    trace = make_trace().directory
    printed = run(
        "solve",
        trace,
        "--gpus-per-node",
        2,
        "--max-imbalance",
        2,
        "--fold",
        "0/2",
        "--out",
        tmp_path / "plan.json",
        "--details",
    )
    assert "contiguous" in printed
    assert "gap" in printed
    assert "of contiguous" in run("simulate", tmp_path / "plan.json", trace)
    assert "coactivated_pairs" in run(
        "affinity", trace, "--out", tmp_path / "a.safetensors"
    )
