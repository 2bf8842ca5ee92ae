"""SGLang draws for rows of dense layers too: whatever serves copies knows these rows."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from placer.cli.main import main
from placer.serving.replica_choice import SglangDraws
from placer.trace import Trace, TraceWriter

LAYER_IDS = (1, 2, 4)
TOPOLOGY = ("--gpus-per-node", "4", "--redundant-experts", "4")
QUICK = ("--proof", "none", "--num-sweeps", "1", "--num-rounds", "0", "--relax-cap")
SIZES = ("--hardware", "h100", "--hidden-size", "64", "--expert-size", "32")
SERVED = ("--engine", "sglang-deepep")


def run(*words: object) -> None:
    try:
        main([str(word) for word in words])
    except SystemExit as error:
        assert not error.code, words


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...] | None]:
    """The numbers of the MoE layers in the model, as every draw of a test was told."""
    told: list[tuple[int, ...] | None] = []
    original = SglangDraws.__init__

    def listening(self, placement, layer_ids):
        told.append(layer_ids)
        original(self, placement, layer_ids)

    monkeypatch.setattr(SglangDraws, "__init__", listening)
    return told


@pytest.fixture
def bound(make_trace: Callable[..., Trace], tmp_path: Path) -> Path:
    """A trace of a model whose layers 0 and 3 are dense."""
    unbound = make_trace("unbound", num_tokens=1200, num_sequences=80)
    model = msgspec.structs.replace(
        unbound.model,
        model_type="deepseek_v3",
        layer_ids=LAYER_IDS,
        hidden_size=64,
        vocab_size=50,
    )
    model = msgspec.structs.replace(model, fingerprint=model.bound_fingerprint())
    with TraceWriter(directory=tmp_path / "bound", model=model) as writer:
        writer.append(unbound.read())
        writer.finish()
    return tmp_path / "bound"


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--policy", "follow"),
        ("--policy", "token"),
        ("--policy", "request"),
        ("--robust", "bootstrap"),
        ("--objective", "time", *SIZES),
        ("--nodes", "2", "--gpus-per-node", "2"),
    ],
    ids=lambda more: " ".join(more[:2]) or "fixed",
)
def test_a_search_draws_for_dense_layers(
    bound: Path, drawn: list[object], tmp_path: Path, more: tuple[str, ...]
) -> None:
    words = ("--fold", "0/2", *SERVED, *TOPOLOGY, *QUICK, *more)
    run("solve", bound, *words, "--out", tmp_path / "plan.json")
    assert set(drawn) == {LAYER_IDS}


def test_what_judges_a_plan_draws_for_dense_layers(
    bound: Path, drawn: list[object], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    words = ("--fold", "0/2", *SERVED, *TOPOLOGY, *QUICK)
    run("solve", bound, *words, "--out", plan)
    for command in (
        ("simulate", plan, bound, "--not-fold", "0/2"),
        ("check", plan, bound, "--not-fold", "0/2", "--tolerance", "9"),
        ("tables", plan, bound, "--out", tmp_path / "table.safetensors"),
    ):
        drawn.clear()
        run(*command)
        assert set(drawn) == {LAYER_IDS}, command


@pytest.mark.parametrize(("solved", "judged"), [("bound", "unbound"), ("unbound", "bound")])
def test_the_plan_or_else_the_trace_says_which_layers_are_dense(
    bound: Path, drawn: list[object], tmp_path: Path, solved: str, judged: str
) -> None:
    """The same for every command that judges a plan, on tokens or on counts."""
    plan, trace = tmp_path / "plan.json", tmp_path / judged
    words = ("--fold", "0/2", *SERVED, *TOPOLOGY, *QUICK)
    run("solve", tmp_path / solved, *words, "--out", plan)
    run("affinity", trace, "--out", tmp_path / "counts")
    for command in (
        ("simulate", plan, trace),
        ("check", plan, trace, "--tolerance", "9"),
        ("check", plan, tmp_path / "counts", "--tolerance", "9"),
        ("tables", plan, trace, "--out", tmp_path / "table.safetensors"),
    ):
        drawn.clear()
        run(*command)
        assert set(drawn) == {LAYER_IDS}, command


def test_a_trace_that_knows_no_dense_layer_says_so(
    bound: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, unbound = tmp_path / "plan.json", tmp_path / "unbound"
    words = (*SERVED, "--gpus-per-node", "4", *QUICK, "--out", plan)
    warning = "no file says which layers are dense"
    run("solve", unbound, *words)
    assert warning not in capfd.readouterr().err, "without redundant experts"
    plan.unlink()
    run("solve", unbound, "--redundant-experts", "4", *words)
    assert warning in capfd.readouterr().err
    for command in (
        ("simulate", plan, unbound),
        ("check", plan, unbound, "--tolerance", "9"),
        ("tables", plan, unbound, "--out", tmp_path / "table.safetensors"),
    ):
        run(*command)
        assert warning in capfd.readouterr().err, command
    for command in ("simulate", "check"):
        run(command, plan, bound, *(("--tolerance", "9") if command == "check" else ()))
        assert warning not in capfd.readouterr().err, "the trace knows it"
