"""``placer inspect`` tells each thing apart by its content, and refuses what it is not."""

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from placer.affinity import Affinity
from placer.affinity.from_traces import affinity_of_traces
from placer.cli.main import main
from placer.placement import Placement, Plan, SolverReport
from placer.simulation import PolicyMetrics
from placer.table import Table
from placer.trace import EVERYTHING, Trace

CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "hidden_size": 4,
    "vocab_size": 10,
}
FIGURES = {one.name: 0.25 for one in fields(PolicyMetrics)} | {
    "local_activation_rate": 0.5,
    "remote_rank_copies_per_token": 1.5,
    "load_imbalance_mean": 1.1,
    "load_imbalance_max": 1.2,
    "straggler_mean": 1.3,
    "bottleneck_rank_copies_per_token": 1.6,
    "home_imbalance_max": 1.0,
}


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *map(str, arguments), "--json"])
    output = capsys.readouterr()
    assert stopped.value.code == 0, output.err
    return json.loads(output.out)


def refused(
    capsys: pytest.CaptureFixture[str], *arguments: object, exit_code: int = 1
) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *map(str, arguments)])
    output = capsys.readouterr()
    assert stopped.value.code == exit_code
    assert output.out == ""
    return output.err


def plan_for(trace: Trace, metrics: dict[str, Any]) -> Plan:
    """Experts from the highest to the lowest over two ranks."""
    sizes = trace.model.num_experts
    return Plan(
        model=trace.model,
        placement=Placement(
            physical_to_logical_map=tuple(np.arange(size)[::-1] for size in sizes),
            num_experts=sizes,
            num_ranks=2,
        ),
        policy="fixed",
        exchange="per-rank",
        max_imbalance=1.1,
        solver=SolverReport(
            status="feasible",
            termination="step_limit",
            objective_name="pairs",
            objective=10.0,
            bound=8.0,
            gap=0.2,
            bound_method="by hand",
            seconds=None,
            seed=0,
        ),
        metrics=metrics,
        provenance={},
    )


@pytest.fixture
def plan(make_trace: Callable[..., Trace], tmp_path: Path) -> Path:
    metrics = {
        "profile": {"fixed": FIGURES},
        "heldout": {"fixed": FIGURES | {"remote_rank_copies_per_token": 2.0}},
        "baselines": {
            "contiguous": {"fixed": FIGURES | {"remote_rank_copies_per_token": 4.0}}
        },
    }
    path = tmp_path / "plan.json"
    plan_for(make_trace(), metrics).write(path)
    return path


@pytest.fixture
def table(make_trace: Callable[..., Trace], tmp_path: Path) -> Path:
    # Ids 11 to 13 repeat the row of id 0.
    row = np.r_[np.linspace(0, 1, 11), 0, 0, 0].astype(np.float16)
    confidence = np.tile(row, (3, 1))
    path = tmp_path / "table.safetensors"
    Table(
        model=make_trace("for-table").model,
        num_ranks=2,
        num_nodes=1,
        lookback=1,
        token_rank=np.zeros((3, 14), np.uint8),
        token_confidence=confidence,
        history_rank=np.zeros((3, 2), np.uint8),
        history_confidence=np.full((3, 2), 0.75, np.float16),
        request_score=np.zeros((14, 2), np.float16),
        expert_rank=np.zeros((3, 8), np.uint8),
    ).write(path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two MoE layers (0 and 2) of two experts, in two files with an index."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    weight = np.zeros((3, 4), np.float16)
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": weight
        for layer in (0, 2)
        for expert in (0, 1)
    }
    others = {
        "model.layers.0.mlp.gate.weight": np.zeros((2, 4), np.float32),
        "model.layers.2.mlp.gate.weight": np.zeros((2, 4), np.float32),
        "model.layers.1.mlp.up_proj.weight": weight,
        "model.embed_tokens.weight": np.zeros((10, 4), np.float16),
    }
    (directory / "placer.json").write_text('{"plan_sha256": "12ab"}')
    files = {"a.safetensors": experts, "b.safetensors": others}
    for name, tensors in files.items():
        save_file(tensors, directory / name)
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    return directory


def test_trace(
    make_trace: Callable[..., Trace], capsys: pytest.CaptureFixture[str]
) -> None:
    trace = make_trace()
    found = inspected(capsys, trace.directory)
    assert found["kind"] == "trace"
    assert found["facts"]["num_tokens"] == 400
    assert found["facts"]["sha256"] == trace.sha256
    assert found["facts"]["unknown_token_ids"] == 0
    rows = found["tables"]["load per MoE layer"]
    counts = np.bincount(trace.read().experts[1].ravel(), minlength=8)
    assert rows[1]["busiest/mean"] == pytest.approx(counts.max() / counts.mean())


def test_affinity(
    make_trace: Callable[..., Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "affinity.safetensors"
    affinity_of_traces([make_trace()], EVERYTHING).write(path)
    found = inspected(capsys, path)
    assert found["kind"] == "affinity"
    facts = found["facts"]
    assert facts["token_expert_pairs"] == 400 * 3 * 2
    assert facts["transition_pairs"] == 400 * 2 * 4
    assert facts["coactivated_pairs"] == 400 * 3
    rows = found["tables"]["load per MoE layer"]
    assert [
        row["mutual information with the next layer (bits)"] is None for row in rows
    ] == [
        False,
        False,
        True,
    ]


def test_plan_beside_its_baselines(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, plan)
    assert found["kind"] == "plan"
    assert found["facts"]["experts_off_contiguous_rank"] == 1.0
    assert found["facts"]["gap"] == 0.2
    contiguous, placer = found["tables"]["on held-out sequences"]
    assert (contiguous["placement"], placer["placement"]) == ("contiguous", "placer")
    assert placer["of contiguous"] == 0.5
    rows = found["tables"]["profile and held out, policy fixed"]
    (copies,) = (r for r in rows if r["metric"] == "remote_rank_copies_per_token")
    assert (copies["profile"], copies["held out"]) == (1.5, 2.0)


def test_plan_from_counts_alone_has_no_figures(
    make_trace: Callable[..., Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = {"profile": None, "heldout": None, "baselines": {}}
    plan_for(make_trace(), nothing).write(tmp_path / "plan.json")
    tables = inspected(capsys, tmp_path / "plan.json")["tables"]
    assert list(tables) == [
        "proof, on the profile. The plan holds no gap of each layer: placer prove PLAN "
        "TRACE --details",
        "load cap per MoE layer, on the profile",
    ]


def test_plan_with_the_load_of_its_ranks(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = Trace(tmp_path / "trace")
    rows = inspected(capsys, plan, trace.directory)["tables"]["rank load per MoE layer"]
    # Experts 4..7 live on rank 0, experts 0..3 on rank 1.
    ids = trace.read().experts[2]
    share = np.array([(ids >= 4).mean(), (ids < 4).mean()])
    assert rows[2]["max/mean"] == pytest.approx(share.max() * 2)
    assert rows[2]["busiest rank"] == int(share.argmax())
    assert rows[2]["experts there"] == ("4 5 6 7", "0 1 2 3")[share.argmax()]


def test_the_busiest_rank_is_explained(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: rank 0 has experts 4 to 7 with 60 + 25 + 10 + 5 of 120 pairs."""
    model = Plan.read(plan).model
    counts = np.array([5, 5, 5, 5, 10, 60, 25, 5])
    Affinity(
        model=model,
        num_tokens=60,
        load=(counts,) * model.num_layers,
    ).write(tmp_path / "counts")
    found = inspected(capsys, plan, tmp_path / "counts")
    assert inspected(capsys, plan, "--load", tmp_path / "counts") == found
    with pytest.raises(SystemExit):
        main(["inspect", str(plan), "--load", str(tmp_path / "counts")])
    assert "5 (60%)" in capsys.readouterr().out, "without --details too"
    rows = found["tables"]["rank load per MoE layer"]
    assert rows[0]["busiest rank"] == 0
    assert rows[0]["max/mean"] == pytest.approx(100 / 60)
    assert rows[0]["most of its load"] == "5 (60%)"
    assert rows[0]["experts there"] == "4 5 6 7"


def test_table(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, table)
    assert found["kind"] == "table"
    assert found["facts"]["num_token_ids"] == 14
    assert found["facts"]["num_distinct_token_rows"] == 11
    (rows,) = found["tables"].values()
    assert rows[0]["token 50%"] == pytest.approx(0.5)
    assert rows[0]["history 90%"] is None, "the first layer has no history"
    assert rows[1]["history 90%"] == pytest.approx(0.75)


def test_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, checkpoint)
    assert found["kind"] == "checkpoint"
    assert found["facts"]["num_layers"] == 2
    assert found["facts"]["plan_sha256"] == "12ab"
    groups = {row["group"]: row for row in found["tables"]["tensors"]}
    assert groups["experts"]["bytes"] == 4 * 3 * 4 * 2
    assert groups["router"]["bytes"] == 2 * 2 * 4 * 4
    assert groups["other"]["bytes"] == (3 * 4 + 10 * 4) * 2
    assert groups["router"]["dtype"] == "F32"


def test_truncated_checkpoint_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    message = refused(capsys, checkpoint)
    assert "b.safetensors is damaged" in message
    assert "hint: fetch the checkpoint again" in message


def test_checkpoint_with_a_missing_file_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "a.safetensors").unlink()
    assert "a.safetensors" in refused(capsys, checkpoint)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty", b"", "is not a file that placer can read"),
        ("text", b"hello", "is not a file that placer can read"),
        ("list.json", b"[1]", "is not a file that placer can read"),
        ("half.json", b'{"a": ', "is not valid JSON"),
        ("other.json", b'{"a": 1}', "is JSON, but not a plan"),
        ("trace.json", b'{"a": 1}', "is the header of a directory"),
    ],
)
def test_unknown_file_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    message: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    output = refused(capsys, tmp_path / name)
    assert message in output
    assert "hint: " in output


def test_unknown_tensors_and_directories_are_refused(
    tmp_path: Path, make_trace: Callable[..., Trace], capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a": np.zeros(1)}, tmp_path / "foreign.safetensors")
    output = refused(capsys, tmp_path / "foreign.safetensors")
    assert "placer did not write it" in output
    assert "expected a trace directory" in output
    assert "is not a file or directory that placer can read" in refused(capsys, tmp_path)
    assert "does not exist" in refused(capsys, tmp_path / "absent")
    trace = make_trace().directory
    chunk = refused(capsys, trace / "chunk-00000.safetensors")
    assert f"hint: name the trace: placer inspect {trace}" in chunk


def test_a_trace_goes_with_a_plan_only(
    make_trace: Callable[..., Trace], plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = make_trace("other").directory
    output = refused(capsys, trace, trace, exit_code=2)
    assert "hint: placer inspect PLAN TRACE" in output
    output = refused(capsys, plan, trace, trace, exit_code=2)
    assert "a plan is shown on one of them" in output
    narrow = make_trace("narrow", num_experts=(4, 4, 4)).directory
    output = refused(capsys, plan, narrow, exit_code=2)
    assert (
        "are of different models: num_experts 8 x 3 layers against 4 x 3 layers" in output
    )


def test_human_output_has_every_fact(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = inspected(capsys, table)["facts"]
    with pytest.raises(SystemExit):
        main(["inspect", str(table), "--details"])
    printed = capsys.readouterr().out
    assert printed.startswith("table table.safetensors\n")
    assert all(f"\n{name} " in printed for name in facts if name != "provenance")


@pytest.mark.parametrize("kind", ["trace", "affinity", "plan", "table", "checkpoint"])
def test_html_is_one_offline_file_with_stable_bytes(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if kind in ("plan", "table", "checkpoint"):
        source = request.getfixturevalue(kind)
    else:
        trace = request.getfixturevalue("make_trace")("traced")
        source = trace.directory
        if kind == "affinity":
            source = tmp_path / "affinity.safetensors"
            affinity_of_traces([trace], EVERYTHING).write(source)
    pages = []
    for name in ("one.html", "two.html"):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", str(source), "--html", str(tmp_path / name)])
        assert stopped.value.code == 0
        pages.append((tmp_path / name).read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    assert "<svg" in pages[0] or 'class="bars"' in pages[0]
    assert not re.search(r"<(script|img|iframe)\b|https?:", pages[0])
    images = re.findall(r"<image[^>]* href=\"([^\"]+)\"", pages[0])
    assert all(one.startswith("data:image/png;base64,") for one in images)
    assert len(pages[0]) < 2_000_000
    assert str(tmp_path) not in pages[0]
