"""Tools for traces, frontiers and reports: files and figures are those of the commands."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import placer
from placer.cli.main import main
from placer.trace import Trace as TraceDirectory

pytestmark = pytest.mark.filterwarnings("ignore::placer.PlacerWarning")


@pytest.fixture
def trace(make_trace: Callable[..., TraceDirectory]) -> placer.Trace:
    return placer.open(make_trace().directory)


def printed(capsys: pytest.CaptureFixture[str], *line: object) -> dict[str, object]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, line), "--json"])
    assert ended.value.code == 0
    read: dict[str, object] = json.loads(capsys.readouterr().out)
    return read


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return bool(names) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


@pytest.mark.parametrize(
    ("tool", "given", "line"),
    [
        ("split", {"fold": "1/2"}, ("--fold", "1/2")),
        ("sample", {"sequences": 3, "seed": 4}, ("--sequences", 3, "--seed", 4)),
        ("dedup", {"rows": False, "fold": "0/2"}, ("--no-rows", "--fold", "0/2")),
    ],
)
def test_traces_made_from_a_trace_are_those_of_the_command(
    trace: placer.Trace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tool: str,
    given: dict[str, object],
    line: tuple[object, ...],
) -> None:
    made, other = tmp_path / "api", tmp_path / "command"
    found = getattr(trace, tool)(made, **given)
    told = printed(capsys, "trace", tool, trace.path, *line, "--out", other)
    assert same_files(made, other)
    renamed = json.dumps(found.to_json()).replace(str(made), str(other))
    assert json.loads(renamed) == told
    assert found.open().num_tokens == found.facts["num_tokens"] > 0
    with pytest.raises(placer.PlacerError, match="exists"):
        getattr(trace, tool)(made, **given)


def test_parts_of_a_trace_are_the_whole_again(trace: placer.Trace, tmp_path: Path) -> None:
    parts = [trace.split(tmp_path / n, fold=f"{n}/2").open() for n in "01"]
    both = placer.merge_traces(parts, tmp_path / "both").open()
    assert both.num_tokens == trace.num_tokens
    assert both.to_frame().equals(trace.to_frame())
    counts = placer.count_affinity(parts)
    assert counts.to_frame().equals(trace.to_frame())


def test_counts_of_parts_are_added_up(trace: placer.Trace, tmp_path: Path) -> None:
    for n in range(2):
        trace.affinity(fold=f"{n}/2").write(tmp_path / f"{n}.safetensors")
    files = [tmp_path / f"{n}.safetensors" for n in range(2)]
    assert placer.merge_affinities(files).to_frame().equals(trace.to_frame())


def test_a_written_object_knows_its_path(
    trace: placer.Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = trace.affinity().write(tmp_path / "a.safetensors")
    assert placer.open(tmp_path / "a.safetensors").sha256 == counts.sha256
    command = ("affinity", trace.path, "--out", tmp_path / "b.safetensors")
    told = json.dumps(printed(capsys, *command)).replace("b.safetensors", "a.safetensors")
    assert counts.to_json() == json.loads(told)


def test_a_damaged_trace_is_not_valid(trace: placer.Trace) -> None:
    assert trace.validate().verdict.is_better
    chunk = next(trace.path.glob("chunk-*"))
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(placer.PlacerError, match=chunk.name):
        trace.validate()


def test_links_and_learning_are_those_of_the_commands(
    trace: placer.Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    found = placer.links([trace], seed=2)
    told = printed(capsys, "trace", "links", trace.path, "--seed", 2)
    assert json.loads(json.dumps(found.to_json())) == told
    assert (
        found.to_frame()["pairs"][0] == found.by_trace[str(trace.path)].information[0].pairs
    )
    learned = trace.learning(gpus_per_node=4, tokens=[40, 80])
    line = ("--gpus-per-node", 4, "--tokens", 40, "--tokens", 80)
    assert learned.to_json() == printed(capsys, "trace", "learning", trace.path, *line)
    assert learned.to_frame()["num_tokens"].is_monotonic_increasing
    assert learned.verdict.next is not None
    assert learned.verdict.next.startswith(f"placer solve {trace.path} --gpus-per-node 4")


def test_a_frontier_has_the_bytes_of_the_command(
    trace: placer.Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {"gpus_per_node": 4, "fold": "0/2", "num_sweeps": 0, "proof": "none"}
    found = placer.solve_frontier(trace, [1.2, 1.4], tmp_path / "api", **quick)
    line = ["--gpus-per-node", 4, "--fold", "0/2", "--num-sweeps", 0, "--proof", "none"]
    out = ("--frontier", "1.2,1.4", "--out", tmp_path / "command")
    told = printed(capsys, "solve", trace.path, *line, *out)
    assert same_files(tmp_path / "api", tmp_path / "command")
    renamed = json.dumps(found.to_json()).replace("/api", "/command")
    assert json.loads(renamed) == told
    plans = [placer.open(tmp_path / "api" / point.file) for point in found.points]
    assert [plan.contents.max_imbalance for plan in plans] == list(
        found.to_frame()["max_imbalance"]
    )


def test_a_report_is_that_of_the_command(
    trace: placer.Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = placer.inspect(trace.path)
    found.write_html(tmp_path / "api.html")
    out = tmp_path / "command.html"
    assert found.to_json() == printed(capsys, "inspect", trace.path, "--html", out)
    assert (tmp_path / "api.html").read_bytes() == out.read_bytes()
    assert found.kind == "trace" and found.tables(details=True)
    with pytest.raises(placer.PlacerError, match="exists"):
        found.write_html(out)


def test_solve_says_what_the_command_says(
    trace: placer.Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {"gpus_per_node": 4, "fold": "0/2", "num_sweeps": 0, "proof": "none"}
    plan = placer.solve(trace, **quick).write(tmp_path / "plan.json")
    line = ["--gpus-per-node", 4, "--fold", "0/2", "--num-sweeps", 0, "--proof", "none"]
    told = printed(
        capsys, "solve", trace.path, *line, "--out", tmp_path / "plan.json", "--force"
    )
    found = plan.to_json()
    assert {**found, "seconds": None} == {**told, "seconds": None}
    # A plan that was read has the same answer; it does not know the trace.
    assert placer.open(tmp_path / "plan.json").verdict.answer == plan.verdict.answer


@pytest.mark.parametrize("of", ["trace", "affinity"])
def test_check_says_what_the_command_says(
    make_trace: Callable[..., TraceDirectory],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    of: str,
) -> None:
    trace = placer.open(make_trace(num_sequences=40).directory)
    quick = {"gpus_per_node": 4, "fold": "0/2", "num_sweeps": 0, "proof": "none"}
    plan = placer.solve(trace, **quick).write(tmp_path / "plan.json")
    source: placer.Trace | placer.Affinity = trace
    if of == "affinity":
        source = trace.affinity().write(tmp_path / "a.safetensors")
    found = plan.check(source, tolerance=1.0)
    line = ("check", tmp_path / "plan.json", source.path, "--tolerance", 1.0)
    assert found.to_json() == printed(capsys, *line)
    assert not found.drifted and len(found.to_frame()) == len(found.figures)
    found.require_held()


def test_loads_that_moved_to_other_experts_are_drift(
    trace: placer.Trace, make_trace: Callable[..., TraceDirectory]
) -> None:
    counts = trace.affinity()
    plan = placer.solve(counts, gpus_per_node=4, objective="balance")
    other = placer.open(make_trace("other", seed=5).directory).affinity()
    found = plan.check(other, tolerance=0.0)
    now = found.to_frame().iloc[0]
    assert now["now"] > now["then"] and found.drifted
    with pytest.raises(placer.PlacerError, match="has drifted from PLAN") as failed:
        found.require_held()
    assert "placer solve AFFINITY" in str(failed.value.hint)


def test_a_file_of_rows_is_imported_as_by_the_command(
    trace: placer.Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = trace.to_frame("tokens")
    with (tmp_path / "rows.csv").open("w", encoding="utf-8") as file:
        file.write("sequence_id,position,layer,experts\n")
        for row in rows.itertuples():
            chosen = f"{row.expert_0} {row.expert_1}"
            file.write(f"{row.sequence_id},{row.position},{row.layer},{chosen}\n")
    made, other = tmp_path / "api", tmp_path / "command"
    found = placer.import_file("csv", str(tmp_path / "rows.csv"), made)
    told = printed(capsys, "import", "csv", tmp_path / "rows.csv", "--out", other)
    assert same_files(made, other)
    assert {**found.to_json(), "out": None, "verdict": None} == {
        **told,
        "out": None,
        "verdict": None,
    }
    columns = ["sequence_id", "position", "layer", "expert_0", "expert_1"]
    assert found.open().to_frame("tokens")[columns].equals(rows[columns])
