"""``placer prove``: bounds of any plan against all placements, and their check."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import placer
from placer.cli.main import app, main
from placer.errors import PlacerError, UsageError, VerificationError
from placer.placement import Plan
from placer.placement.reference import contiguous
from placer.placement.reference import random as random_placement
from placer.planning import certificate_check
from placer.planning.certificate_check import check_certificate
from placer.planning.certificate_file import read_certificate, write_certificate
from placer.planning.proving import prove_plan
from placer.run.session import Session
from placer.solver.balance.replicas import with_replicas
from placer.solver.partition import layers as layers_module
from placer.trace import EVERYTHING, Trace
from tests.solver.enumeration import every_layer

SIZES = (8, 8)


@pytest.fixture
def trace(make_trace: Callable[..., Trace]) -> Trace:
    return make_trace(num_tokens=120, num_experts=SIZES, top_k=3)


@pytest.fixture
def plan(trace: Trace, write_plan: Callable[..., Path]) -> Path:
    return write_plan(trace.model, random_placement(SIZES, 4, seed=1))


def ranks_used(trace: Trace, layer: int, ranks: np.ndarray) -> int:
    rows = trace.read(EVERYTHING).experts[layer]
    return sum(len(set(ranks[row].tolist())) for row in rows)


def least(trace: Trace, plan: Path, cap: float) -> float:
    """Copies per token and layer of the best placement, by trying all."""
    placed, total = Plan.read(plan).placement, 0
    tokens = trace.read(EVERYTHING)
    for layer, size in enumerate(SIZES):
        load = np.bincount(tokens.experts[layer].ravel(), minlength=size)
        own = np.bincount(placed.expert_rank(layer), load, minlength=4).max()
        most = max(int(cap * load.sum() / 4), own)
        total += min(
            ranks_used(trace, layer, ranks)
            for ranks in every_layer(size, 4)
            if np.bincount(ranks, load).max() <= most
        )
    return total * 3 / 4 / tokens.num_tokens / len(SIZES)


@pytest.mark.parametrize("cap", [1.05, 1.4])
def test_no_placement_beats_the_bound_and_one_reaches_it(
    trace: Trace, plan: Path, cap: float
) -> None:
    proved = prove_plan(plan, trace, EVERYTHING, cap, Session())
    best = least(trace, plan, cap)
    assert proved.bound == pytest.approx(best)
    assert proved.best_reached.copies == pytest.approx(best)
    assert proved.reached.copies > best
    assert proved.gap == pytest.approx(1 - best / proved.reached.copies)


def test_caps_of_eplb_are_said_to_be_lower(trace: Trace, tmp_path: Path) -> None:
    """A plan that is solved as an engine needs it has EPLB's load of each layer as cap."""
    words = ("--gpus-per-node", "4", "--engine", "sglang-deepep", "--num-sweeps", "1")
    path = tmp_path / "plan.json"
    assert main_code("solve", str(trace.directory), *words, "--out", str(path)) == 0
    caps = Plan.read(path).solver.eplb_caps
    assert caps is not None
    told = prove_plan(path, trace, EVERYTHING, None, Session()).warnings
    assert any(f"{min(caps):.3f} to {max(caps):.3f}" in one for one in told)
    told = prove_plan(path, trace, EVERYTHING, 1.05, Session()).warnings
    assert not any("EPLB" in one for one in told)


def main_code(*words: str) -> object:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    return stopped.value.code


def test_a_relaxation_bounds_layers_of_too_many_columns(
    trace: Trace, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_module, "num_columns", lambda *_: 10**9)
    proved = prove_plan(plan, trace, EVERYTHING, 1.4, Session())
    assert proved.proofs == [None, None]
    assert 0 < proved.bound <= least(trace, plan, 1.4)


def test_redundant_experts_and_other_models_are_refused(
    trace: Trace,
    plan: Path,
    write_plan: Callable[..., Path],
    make_trace: Callable[..., Trace],
    tmp_path: Path,
) -> None:
    other = make_trace("other", num_experts=(4, 4), num_tokens=20)
    with pytest.raises(UsageError, match="different models"):
        prove_plan(plan, other, EVERYTHING, None, Session())
    copied = with_replicas(contiguous(SIZES, 4), [np.ones(8)] * 2, 4)
    with pytest.raises(PlacerError, match="redundant experts"):
        prove_plan(write_plan(trace.model, copied), trace, EVERYTHING, None, Session())


@pytest.fixture
def certificate(trace: Trace, plan: Path, tmp_path: Path) -> Path:
    proved = prove_plan(plan, trace, EVERYTHING, 1.2, Session())
    out = tmp_path / "certificate.json"
    write_certificate(proved, plan, trace, EVERYTHING, out)
    return out


def test_a_certificate_holds(trace: Trace, plan: Path, certificate: Path) -> None:
    found = check_certificate(read_certificate(certificate), plan, trace)
    assert found.bound == pytest.approx(least(trace, plan, 1.2))
    assert found.num_by_prices + found.num_by_search == 2


def changed_layer(certificate: Path, **fields: Any) -> None:
    value = json.loads(certificate.read_text())
    value["layers"][0] |= fields
    certificate.write_text(json.dumps(value | {"sha256": None}))


def broken_fields(certificate: Path, part: str) -> dict[str, Any]:
    layer = json.loads(certificate.read_text())["layers"][0]
    prices = [0] * 8 if part == "prices" else [*layer["prices"][1:], 10**6]
    return {
        "bound": {"bound": layer["bound"] + 1},
        "search": {"bound": layer["bound"] + 1, "proved_by": "search"},
        "prices": {"prices": prices, "cuts": [], "cut_prices": [], "proved_by": "prices"},
        "swapped prices": {"prices": prices, "proved_by": "prices"},
        "too few prices": {"prices": prices[1:]},
        "load": {"most_load": layer["most_load"] - 1},
        "cost": {"most_cost": layer["most_cost"] - 1},
        "together": {"together": [[0, 1]]},
        "apart": {"apart": [0, 1] * 4},
        "size": {"proved_by": "size"},
    }[part]


@pytest.mark.parametrize(
    "part",
    [
        *("bound", "search", "prices", "swapped prices", "too few prices", "load"),
        *("cost", "together", "apart", "size"),
    ],
)
def test_a_certificate_that_is_wrong_is_seen(
    trace: Trace, plan: Path, certificate: Path, part: str
) -> None:
    """Each ingredient of a proof is broken once."""
    changed_layer(certificate, **broken_fields(certificate, part))
    with pytest.raises(VerificationError, match="MoE layer 0"):
        check_certificate(read_certificate(certificate), plan, trace)


@pytest.fixture
def of_two_ranks(
    trace: Trace, write_plan: Callable[..., Path], tmp_path: Path
) -> tuple[Path, Path]:
    """A plan of four experts on each of two ranks, and its certificate."""
    plan = write_plan(trace.model, random_placement(SIZES, 2, seed=1))
    out = tmp_path / "certificate.json"
    proved = prove_plan(plan, trace, EVERYTHING, 1.2, Session())
    write_certificate(proved, plan, trace, EVERYTHING, out)
    return plan, out


def test_prices_that_64_bits_cannot_add_prove_nothing(
    trace: Trace, of_two_ranks: tuple[Path, Path]
) -> None:
    """Four times 2^62 is 0 in 64 bits: with it any bound would seem proved."""
    plan, out = of_two_ranks
    fields = {"cuts": [], "cut_prices": [], "proved_by": "prices"}
    for prices in (2**62, 2**60):
        changed_layer(out, bound=10**6, prices=[prices] * 8, **fields)
        with pytest.raises(VerificationError, match="prices are too large to add"):
            check_certificate(read_certificate(out), plan, trace)
    changed_layer(out, bound=1, prices=[2**50] * 8, **fields)
    check_certificate(read_certificate(out), plan, trace)


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("scale", 0, "scale is 0"),
        ("scale", 2**63 - 1, "too large to add"),
        ("max_imbalance", 1e308, "tighter than the caps"),
    ],
)
def test_numbers_that_no_certificate_has_are_refused(
    field: str,
    value: float,
    fault: str,
    trace: Trace,
    of_two_ranks: tuple[Path, Path],
) -> None:
    plan, out = of_two_ranks
    whole = json.loads(out.read_text()) | {field: value, "sha256": None}
    out.write_text(json.dumps(whole))
    with pytest.raises(VerificationError, match=fault):
        check_certificate(read_certificate(out), plan, trace)


def test_a_certificate_of_more_sets_than_placer_proves_is_refused(
    trace: Trace, of_two_ranks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it could ask for work without end."""
    plan, out = of_two_ranks
    assert certificate_check._MOST_SETS == layers_module.FULL_COLUMNS
    monkeypatch.setattr(certificate_check, "_MOST_SETS", 69)  # of 8 experts: 70 sets of 4
    with pytest.raises(VerificationError, match="more than 69 sets"):
        check_certificate(read_certificate(out), plan, trace)


def test_a_certificate_is_of_one_plan_and_one_trace(
    trace: Trace,
    certificate: Path,
    write_plan: Callable[..., Path],
    make_trace: Callable[..., Trace],
    plan: Path,
) -> None:
    read = read_certificate(certificate)
    other = make_trace("other", num_tokens=50, num_experts=SIZES, top_k=3)
    with pytest.raises(UsageError, match="another trace"):
        check_certificate(read, plan, other)
    with pytest.raises(UsageError, match="another plan"):
        check_certificate(read, write_plan(trace.model, contiguous(SIZES, 4)), trace)
    certificate.write_text(certificate.read_text().replace('"bound": ', '"bound": 1'))
    with pytest.raises(PlacerError, match="changed after"):
        read_certificate(certificate)
    with pytest.raises(PlacerError, match="not a certificate"):
        read_certificate(plan)


def run(*words: object) -> Any:
    found = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_the_command_finds_proves_and_checks(
    trace: Trace, plan: Path, tmp_path: Path
) -> None:
    better, proof = tmp_path / "better.json", tmp_path / "proof.json"
    told = json.loads(run("prove", plan, trace.directory, "--out", better, "--json"))
    assert told["status"] == "feasible"
    assert told["verdict"]["next"].startswith(f"placer simulate {better}")
    assert Plan.read(better).solver.status == "optimal"
    assert Plan.read(better).solver.objective == pytest.approx(told["bound"], abs=1e-6)
    said = run("prove", better, trace.directory, "--certificate", proof, "--details")
    said = " ".join(said.split())
    assert "is proved optimal" in said
    assert "copies/token" in said
    assert "holds" in run("prove", better, trace.directory, "--check", proof)
    changed_layer(proof, bound=json.loads(proof.read_text())["layers"][0]["bound"] + 1)
    with pytest.raises(SystemExit) as ended:
        main(["prove", str(better), str(trace.directory), "--check", str(proof)])
    assert ended.value.code == 5
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("prove", str(better), str(trace.directory)),
                "--check",
                str(proof),
                "--out",
                "x",
            ]
        )
    assert ended.value.code == 2


def test_the_map_of_an_engine_is_proved(trace: Trace, plan: Path, tmp_path: Path) -> None:
    exported, imported = tmp_path / "map.json", tmp_path / "imported.json"
    run("export", "json", plan, "--out", exported)
    run("import", "json-map", exported, "--gpus-per-node", 4, "--out", imported)
    told = json.loads(run("prove", imported, trace.directory, "--json"))
    own = json.loads(run("prove", plan, trace.directory, "--json"))
    assert told["bound"] == own["bound"] < told["objective"] == own["objective"]


def test_the_api_proves_what_the_command_does(
    trace: Trace, plan: Path, tmp_path: Path
) -> None:
    told = json.loads(run("prove", plan, trace.directory, "--json"))
    mine, judged = placer.open(plan), placer.open(trace.directory)
    assert mine.prove(judged).to_json() == told
    unwritten = placer.Plan(mine.contents)
    found = unwritten.prove(judged, out=tmp_path / "better.json")
    assert found.facts == {name: told[name] for name in told if name != "verdict"}
    assert "than PLAN" in found.verdict.answer[0]
    with pytest.raises(PlacerError, match="already exists"):
        unwritten.prove(judged, out=tmp_path / "better.json")
