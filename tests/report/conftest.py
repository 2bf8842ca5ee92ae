"""One report of every kind, as the commands write them, on a small trace."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.cli.main import main


@dataclass(frozen=True)
class Reports:
    """Where everything is, and the words after ``placer inspect`` for each kind."""

    folder: Path
    inspected: dict[str, tuple[str, ...]]

    def json(self, name: str) -> dict[str, Any]:
        """Return what ``inspect --json`` prints, and write the page beside it."""
        page = self.page(name)
        return json.loads(
            run("inspect", *self.inspected[name], "--json", "--html", page, "--force")
        )

    def page(self, name: str) -> Path:
        return self.folder / f"{name}.html"


def run(*words: object) -> str:
    """Run a command; return what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 0, err.getvalue()
    return out.getvalue()


def write_archive(path: Path) -> None:
    """Tokens of 40 sequences: an expert is often followed by its double."""
    rng = np.random.default_rng(0)
    first = np.stack([rng.permutation(8)[:2] for _ in range(800)])
    layers = [first]
    for _ in range(2):
        follows = rng.random(len(first)) < 0.7
        fresh = np.stack([rng.permutation(8)[:2] for _ in range(800)])
        layers.append(np.where(follows[:, None], (layers[-1] * 3 + 1) % 8, fresh))
    experts = np.stack(layers, axis=1)
    sequence_ids, token_ids = np.repeat(np.arange(40), 20), first[:, 0] * 10
    np.savez(path, experts=experts, sequence_ids=sequence_ids, token_ids=token_ids)


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Reports:
    folder = tmp_path_factory.mktemp("reports")
    at = {
        name: str(folder / name)
        for name in (
            *("tokens.npz", "trace", "counts", "plan.json", "nodes.json", "token.json"),
            *("table", "frontier", "sim.json", "curve.json", "text.txt", "own", "own.json"),
            *("export", "map.json"),
        )
    }
    write_archive(folder / "tokens.npz")
    run("import", "npz", at["tokens.npz"], "--out", at["trace"])
    run("affinity", at["trace"], "--workers", 1, "--out", at["counts"])
    solve = ("solve", at["trace"], "--fold", "0/2")
    quick = ("--num-rounds", 2, "--num-sweeps", 2)
    ranks = ("--gpus-per-node", 4)
    run(*solve, *ranks, *quick, "--out", at["plan.json"])
    nodes = ("--nodes", 2, "--gpus-per-node", 2, "--exchange", "per-node")
    copies = ("--redundant-experts", 4, "--replica-choice", "hash")
    run(*solve, *nodes, *copies, *quick, "--out", at["nodes.json"])
    run(*solve, *ranks, *quick, "--policy", "token", "--out", at["token.json"])
    run("tables", at["token.json"], at["trace"], "--out", at["table"])
    caps = ("--frontier", "1.05,1.3", "--relax-cap")
    run(*solve, *ranks, *quick, *caps, "--out", at["frontier"])
    judged = ("simulate", at["plan.json"], at["trace"], "--not-fold", "0/2", "--json")
    sizes = ("--hidden-size", 64, "--expert-size", 32, "--weight-bytes", 2)
    batches = ("--tokens-per-rank", "4,16")
    (folder / "sim.json").write_text(
        run(*judged, "--hardware", "h100", *sizes, *batches), encoding="utf-8"
    )
    curve = ("trace", "learning", at["trace"], *ranks, "--tokens", 100, "--tokens", 200)
    (folder / "curve.json").write_text(run(*curve, "--json"), encoding="utf-8")
    (folder / "text.txt").write_text("one two three four five six seven " * 60)
    corpus = ("--corpus", at["text.txt"], "--sequence-length", 32)
    run("record", tiny_model, *corpus, "--out", at["own"])
    run("solve", at["own"], *ranks, "--max-imbalance", 4, *quick, "--out", at["own.json"])
    run("export", "checkpoint", at["own.json"], tiny_model, "--out", at["export"])
    run("export", "sglang", at["own.json"], tiny_model, "--out", at["map.json"])
    return Reports(
        folder,
        {
            "trace": (at["trace"],),
            "affinity": (at["counts"],),
            "plan": (at["plan.json"],),
            "plan-not-held-out": (at["own.json"],),
            "plan-on-trace": (at["plan.json"], at["trace"]),
            "plan-on-counts": (at["nodes.json"], at["counts"]),
            "plan-with-replicas": (at["nodes.json"], at["trace"]),
            "plans": (at["plan.json"], at["token.json"], at["trace"]),
            "table": (at["table"],),
            "checkpoint": (at["export"],),
            "export-record": (str(folder / "export" / "placer.json"),),
            "map": (at["map.json"],),
            "frontier": (at["frontier"],),
            "simulation": (at["sim.json"],),
            "learning": (at["curve.json"],),
        },
    )
