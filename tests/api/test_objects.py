"""Objects of the API: what they hold, checked by counting again in another way."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

import placer
from placer.api.files import temporary_file
from placer.model import ModelSpec
from placer.placement.reference import random
from placer.report.results import result_of_json
from placer.report.simulation_report import summarize_simulation
from placer.trace import Trace as TraceDirectory

QUICK = {"gpus_per_node": 4, "fold": "0/2", "num_sweeps": 0, "proof": "none"}


@pytest.fixture
def trace(make_trace: Callable[..., TraceDirectory]) -> placer.Trace:
    return placer.open(make_trace().directory)


def test_importing_placer_loads_no_heavy_library() -> None:
    heavy = ("numpy", "pandas", "torch", "numba", "networkx", "ortools", "typer")
    code = f"import sys, placer; print(sorted(set({heavy!r}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")


def test_every_public_name_is_there() -> None:
    for name in placer.__all__:
        assert getattr(placer, name).__doc__, name
    assert set(placer.__all__) <= set(dir(placer))
    with pytest.raises(AttributeError, match="has no attribute 'slove'"):
        _ = placer.slove


def test_paths_may_be_text(trace: placer.Trace) -> None:
    assert placer.open(str(trace.path)).path == trace.path


def test_a_trace_as_rows_of_tokens_is_the_trace(trace: placer.Trace) -> None:
    frame, tokens = trace.to_frame("tokens"), trace.contents.read()
    assert len(frame) == tokens.num_tokens * 3
    for layer in range(3):
        rows = frame[frame["layer"] == layer]
        np.testing.assert_array_equal(rows[["expert_0", "expert_1"]], tokens.experts[layer])
        np.testing.assert_array_equal(rows["sequence_id"], tokens.sequence_ids)
        np.testing.assert_array_equal(rows["token_id"], tokens.token_ids)


def test_domains_of_tokens_have_their_names() -> None:
    demo = placer.open("traces/demo/traces/final")
    frame, tokens = demo.to_frame("tokens", fold="0/9"), demo.contents
    found = frame[frame["layer"] == 0].groupby("domain", observed=True).size().to_dict()
    counted: Counter[str] = Counter()
    for chunk in tokens.chunks():
        kept = chunk.sequence_ids % 9 == 0
        counted.update(demo.domains[n] for n in chunk.domain_ids[kept])
    assert found == dict(counted)


def test_loads_of_a_fold_are_counted_token_by_token(trace: placer.Trace) -> None:
    rows = trace.to_frame("tokens")
    rows = rows[rows["sequence_id"] % 2 == 0]
    loads = trace.to_frame(fold="0/2").set_index(["layer", "expert"])["load"]
    counted = Counter(
        (layer, expert)
        for name in ("expert_0", "expert_1")
        for layer, expert in zip(rows["layer"], rows[name], strict=True)
    )
    assert {key: load for key, load in loads.items() if load} == dict(counted)


def test_shares_and_means_of_loads(trace: placer.Trace) -> None:
    frame = trace.to_frame()
    for _, layer in frame.groupby("layer"):
        assert layer["share"].sum() == pytest.approx(1)
        assert layer["over_mean"].mean() == pytest.approx(1)


def test_edges_between_layers_are_pairs_of_tokens(trace: placer.Trace) -> None:
    graph, tokens = trace.affinity().graph(), trace.contents.read()
    counted: Counter[tuple[tuple[int, int], tuple[int, int]]] = Counter()
    for layer, (here, there) in enumerate(pairwise(tokens.experts)):
        for mine, theirs in zip(here.tolist(), there.tolist(), strict=True):
            counted.update(((layer, i), (layer + 1, j)) for i in mine for j in theirs)
    assert dict(counted) == {(i, j): w for i, j, w in graph.edges(data="weight")}
    for node in graph:
        out = [p for _, _, p in graph.out_edges(node, data="probability")]
        assert not out or sum(out) == pytest.approx(1)


def test_edges_inside_a_layer_are_tokens_that_use_both(trace: placer.Trace) -> None:
    graph, tokens = trace.affinity().graph(1), trace.contents.read()
    counted = Counter(tuple(sorted(pair)) for pair in tokens.experts[1].tolist())
    found = {(i[1], j[1]): w for i, j, w in graph.edges(data="weight")}
    assert found == dict(counted)
    assert not graph.is_directed() and len(graph) == 8


def test_lift_is_one_where_choices_are_independent() -> None:
    from placer.affinity.graph import _lift

    np.testing.assert_allclose(_lift(np.outer([1, 2, 0], [3, 5])), [[1, 1], [1, 1], [0, 0]])


def test_edges_below_the_least_are_left_out(trace: placer.Trace) -> None:
    every, strong = (trace.affinity().graph(least=n) for n in (1, 20))
    kept = {(i, j) for i, j, w in every.edges(data="weight") if w >= 20}
    assert 0 < len(kept) < every.number_of_edges()
    assert kept == set(strong.edges)


def test_graphml_is_read_back_and_has_the_same_bytes(
    trace: placer.Trace, tmp_path: Path
) -> None:
    counts = trace.affinity()
    for name in ("one", "two"):
        counts.write_graphml(tmp_path / name, 2)
    one, two = ((tmp_path / name).read_bytes() for name in ("one", "two"))
    assert one == two
    read, graph = nx.read_graphml(tmp_path / "one"), counts.graph(2)
    named = {(f"2.{i[1]}", f"2.{j[1]}"): w for i, j, w in graph.edges(data="weight")}
    assert {(i, j): w for i, j, w in read.edges(data="weight")} == named
    with pytest.raises(placer.PlacerError, match="exists"):
        counts.write_graphml(tmp_path / "one")


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_has_no_graph(trace: placer.Trace, layer: int) -> None:
    with pytest.raises(placer.UsageError, match=f"no MoE layer {layer}"):
        trace.affinity().graph(layer)


def test_an_affinity_is_written_and_opened(trace: placer.Trace, tmp_path: Path) -> None:
    trace.affinity().write(str(tmp_path / "a.safetensors"))
    read = placer.open(tmp_path / "a.safetensors")
    assert isinstance(read, placer.Affinity)
    assert read.to_frame().equals(trace.to_frame())
    with pytest.raises(placer.PlacerError, match="exists"):
        trace.affinity().write(tmp_path / "a.safetensors")


def test_the_map_of_a_plan_has_a_row_for_each_layer(
    write_plan: Callable[..., Path],
) -> None:
    model = ModelSpec(num_experts=(8, 4), top_k=2)
    plan = placer.open(write_plan(model, random((8, 4), 4, seed=1)))
    rows = plan.contents.placement.to_json()
    assert plan.physical_to_logical_map.tolist() == [rows[0], rows[1] + [-1] * 4]
    frame = plan.to_frame()
    for layer, row in enumerate(rows):
        of = frame[frame["layer"] == layer]
        assert of["expert"].tolist() == row
        assert of["rank"].tolist() == np.repeat(range(4), len(row) // 4).tolist()


def test_ranks_of_slots_are_on_their_nodes(write_plan: Callable[..., Path]) -> None:
    placement = random((8,), 4, 2, seed=0)
    plan = placer.open(write_plan(ModelSpec(num_experts=(8,), top_k=2), placement))
    assert plan.to_frame()["node"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_plan_that_changed_on_disk_is_not_used(
    trace: placer.Trace, write_plan: Callable[..., Path]
) -> None:
    model = trace.model
    path = write_plan(model, random(model.num_experts, 4, seed=0))
    plan = placer.open(path)
    write_plan(model, random(model.num_experts, 4, seed=1))
    with pytest.raises(placer.PlacerError, match="changed after it was opened") as failed:
        plan.simulate(trace)
    assert failed.value.hint == f"open it again: placer.open({str(path)!r})"


def test_errors_do_not_name_a_temporary_file() -> None:
    with (
        pytest.raises(placer.UsageError) as failed,
        temporary_file("plan.json", lambda path: path.write_text("x"), "PLAN") as file,
    ):
        raise placer.UsageError(f"{file.path} is odd", f"placer inspect {file.path}")
    error = failed.value
    assert (str(error), error.message, error.hint) == (
        "PLAN is odd",
        "PLAN is odd",
        "placer inspect PLAN",
    )
    assert not file.path.parent.exists()


def test_a_plan_is_never_written_over(trace: placer.Trace, tmp_path: Path) -> None:
    plan = placer.solve(trace, **QUICK)
    plan.write(tmp_path / "plan.json")
    with pytest.raises(placer.PlacerError, match="exists"):
        plan.write(tmp_path / "plan.json")
    plan.write(tmp_path / "plan.json", force=True)
    trace.affinity().write(tmp_path / "a.safetensors")
    with pytest.raises(placer.PlacerError, match="is an affinity file"):
        plan.write(tmp_path / "a.safetensors", force=True)


def test_a_map_is_opened_as_the_plan_that_it_is(
    trace: placer.Trace, tmp_path: Path
) -> None:
    plan = placer.solve(trace, **QUICK)
    plan.export("eplb", None, tmp_path / "map.npz")
    with pytest.warns(placer.PlacerWarning, match="only shapes are compared"):
        read = placer.open(tmp_path / "map.npz", "eplb", gpus_per_node=4)
    np.testing.assert_array_equal(
        read.physical_to_logical_map, plan.physical_to_logical_map
    )
    assert "imported" in repr(read)
    with pytest.raises(placer.UsageError, match="is the map of an engine") as failed:
        placer.open(tmp_path / "map.npz")
    assert "'eplb', gpus_per_node=" in str(failed.value.hint)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "sgl"}, "format sgl is not known"),
        ({"format": "csv"}, "needs the ranks"),
        ({"nodes": 2}, "are for the map of an engine"),
    ],
)
def test_options_of_open_that_do_not_fit(
    tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(placer.UsageError, match=words):
        placer.open(tmp_path / "map.csv", **options)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(placer.PlacerError, match="does not exist"):
        placer.open(tmp_path / "nothing")


def test_a_checkpoint_is_opened(tiny_model: Path) -> None:
    assert isinstance(placer.open(tiny_model), placer.Checkpoint)


def test_what_is_shown_fits_one_screen_and_escapes_names(
    trace: placer.Trace,
) -> None:
    plan = placer.solve(trace, **QUICK)
    simulation = plan.simulate(trace, not_fold="0/2")
    advice = placer.advise(trace, gpus_per_node=4)
    for one in (trace, trace.affinity(), plan, simulation, advice):
        assert len(repr(one).splitlines()) <= 40
        assert one._repr_html_().startswith("<p><b>")
    odd = ModelSpec(num_experts=(8,), top_k=2, id="<b>")
    from placer.api.shown import Shape, Shown, model_name

    class Odd(Shown):
        def _shape(self) -> Shape:
            return Shape(title=model_name(odd), columns=("<i>",), rows=[("<u>",)])

    assert "<b><b>" not in Odd()._repr_html_()
    assert "<i>" not in Odd()._repr_html_() and "<u>" not in Odd()._repr_html_()


def test_placements_without_a_name_are_refused_by_name(trace: placer.Trace) -> None:
    simulation = placer.solve(trace, **QUICK).simulate(trace, not_fold="0/2")
    with pytest.raises(placer.UsageError, match="placement exflow is not known"):
        simulation.figures("exflow")
    with pytest.raises(placer.UsageError, match="policy token is not known"):
        simulation.figures(policy="token")
    with pytest.raises(placer.UsageError, match="engine vllm is not known"):
        simulation.sent_ratio(engine="vllm")


def test_a_plan_is_compared_at_equal_slots(trace: placer.Trace) -> None:
    plain = placer.solve(trace, **QUICK)
    more = placer.solve(
        trace, gpus_per_node=4, fold="0/2", redundant_experts=4, replica_choice="hash"
    )
    frame = placer.compare({"plain": plain, "more": more}, trace, not_fold="0/2")
    assert frame["placement"].tolist() == [
        *("contiguous", "eplb"),
        *("contiguous", "eplb"),
        *("plain", "more"),
    ]
    assert frame["redundant_experts"].tolist() == [0, 0, 4, 4, 0, 4]
    alone = plain.simulate(trace, not_fold="0/2").figures()
    own = frame[frame["placement"] == "plain"].iloc[0]
    assert own["remote_rank_copies_per_token"] == alone.remote_rank_copies_per_token
    twice = placer.compare({"a": plain, "b": plain}, trace, not_fold="0/2")
    assert twice["placement"].tolist() == ["contiguous", "eplb", "a", "b"]


def test_plans_to_compare_need_names(
    write_plan: Callable[..., Path], trace: placer.Trace
) -> None:
    with pytest.raises(placer.UsageError, match="no plan to compare"):
        placer.compare([], trace)
    path = write_plan(trace.model, random(trace.model.num_experts, 4, seed=0))
    plan = placer.open(path)
    with pytest.raises(placer.UsageError, match="two plans have the name plan"):
        placer.compare([plan, plan], trace)
    with pytest.raises(placer.UsageError, match="the name eplb, which is a baseline's"):
        placer.compare({"eplb": plan}, trace)


@pytest.mark.parametrize("function", ["solve", "advise", "simulate", "compare", "export"])
def test_a_misspelt_option_is_refused(
    function: str, write_plan: Callable[..., Path], trace: placer.Trace, tmp_path: Path
) -> None:
    plan = placer.open(write_plan(trace.model, random(trace.model.num_experts, 4, seed=0)))
    calls: dict[str, tuple[Callable[..., object], str, str]] = {
        "solve": (
            partial(placer.solve, trace, gpus_per_node=4),
            "max_imbalence",
            "max_imbalance",
        ),
        "advise": (partial(placer.advise, trace, gpus_per_node=4), "hardwear", "hardware"),
        "simulate": (partial(plan.simulate, trace), "baselines", "baseline"),
        "compare": (partial(placer.compare, [plan], trace), "folds", "fold"),
        "export": (partial(plan.export, "csv", None, tmp_path / "map"), "forced", "force"),
    }
    call, misspelt, meant = calls[function]
    with pytest.raises(placer.UsageError, match=f"no option {misspelt}") as refused:
        call(**{misspelt: False})
    assert f"did you mean {meant}?" in str(refused.value.hint)
    assert not (tmp_path / "map").exists()


def test_baselines_of_other_profiles_are_told_apart(trace: placer.Trace) -> None:
    one, other = (placer.solve(trace, **{**QUICK, "fold": f}) for f in ("0/2", "0/4"))
    frame = placer.compare({"a": one, "b": other}, trace, not_fold="0/2")
    names = ["contiguous", "eplb (a)", "eplb (b)", "a", "b"]
    assert frame["placement"].tolist() == names


def test_with_a_table_the_policy_of_the_plan_is_shown(
    trace: placer.Trace, tmp_path: Path
) -> None:
    plan = placer.solve(trace, **{**QUICK, "num_sweeps": 1}, policy="token")
    plan.table(trace).write(tmp_path / "table.safetensors")
    options = {"not_fold": "0/2", "table": tmp_path / "table.safetensors"}
    found = plan.simulate(trace, **options)
    assert found.figures() == found.figures(policy="token") != found.figures(policy="fixed")
    assert found.figures("eplb") == found.figures("eplb", policy="fixed")
    (tmp_path / "sim.json").write_text(json.dumps(found.to_json()))
    shown = summarize_simulation(result_of_json(tmp_path / "sim.json")).sections[0].rows
    sent = found.figures().remote_rank_copies_per_token
    assert shown[-1][:2] == ("placer", pytest.approx(sent, abs=1e-5))
    frame = placer.compare({"mine": plan}, trace, **options)
    assert frame["policy"].tolist() == ["fixed", "fixed", "token"]
