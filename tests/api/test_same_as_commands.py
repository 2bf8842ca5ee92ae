"""The API does what the commands do: the same files and the same figures."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest

import placer
from placer.cli import advise, calibrate, export, prove, replay, simulate, solve
from placer.cli.main import main
from placer.trace import Trace as TraceDirectory

pytestmark = pytest.mark.filterwarnings("ignore::placer.PlacerWarning")

# They print, or name where to write.
PRINTED = {"details", "context", "out", "as_json", "force"}


@pytest.fixture
def trace(make_trace: Callable[..., TraceDirectory]) -> placer.Trace:
    return placer.open(make_trace().directory)


def words(options: dict[str, object]) -> list[str]:
    """Return options as the command line has them."""
    found: list[str] = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(option)
        else:
            many = value if isinstance(value, list) else [value]
            found += [word for one in many for word in (option, str(one))]
    return found


def run(*line: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, line)])
    assert ended.value.code == 0


def printed(capsys: pytest.CaptureFixture[str], *line: object) -> dict[str, object]:
    capsys.readouterr()
    run(*line, "--json")
    read: dict[str, object] = json.loads(capsys.readouterr().out)
    return read


def options_of(command: Callable[..., None], *left_out: str) -> set[str]:
    return set(inspect.signature(command).parameters) - PRINTED - set(left_out)


def test_solve_takes_the_options_of_the_command() -> None:
    own = set(inspect.signature(placer.solve).parameters)
    own -= {"options", "progress", "began"}
    own |= set(get_type_hints(placer.SolveArguments))
    assert own == options_of(solve.solve, "frontier")


def test_simulate_takes_the_options_of_the_command() -> None:
    own = set(get_type_hints(placer.SimulateArguments))
    assert own == options_of(simulate.simulate, "plan", "trace")


def test_advise_takes_the_options_of_the_command() -> None:
    own = set(inspect.signature(placer.advise).parameters) - {"options", "progress"}
    own |= set(get_type_hints(placer.AdviseArguments))
    assert own == options_of(advise.advise)


def test_prove_takes_the_options_of_the_command() -> None:
    own = set(get_type_hints(placer.ProveArguments)) - {"force", "out"}
    assert own == options_of(prove.prove, "plan", "trace")


def test_replay_takes_the_options_of_the_command() -> None:
    own = set(get_type_hints(placer.ReplayArguments))
    assert own == options_of(replay.replay, "plan", "model", "trace")


def test_calibrate_takes_the_options_of_the_command() -> None:
    own = set(inspect.signature(placer.calibrate).parameters)
    assert own - {"out", "force", "progress"} == options_of(calibrate.calibrate)


def test_export_takes_the_options_of_the_command() -> None:
    own = {
        one.replace("hash", "with_hashes") for one in placer.ExportArguments.__annotations__
    }
    own -= {"force"}
    ways = ("target", "plan", "model", "inverse", "dry_run")
    assert own == options_of(export.export, *ways)


@pytest.mark.parametrize(
    "options",
    [
        {"gpus_per_node": 4},
        {"gpus_per_node": 2, "nodes": 2, "not_fold": "1/3", "seed": 3, "inter_cost": 4},
        {"gpus_per_node": 4, "policy": "follow", "max_imbalance": 1.3, "relax_cap": True},
        {"gpus_per_node": 4, "redundant_experts": 4, "engine": "sglang-deepep"},
        {"gpus_per_node": 4, "pin": ["0:3=1", "2:0=0"], "robust": "bootstrap"},
        {"gpus_per_node": 4, "objective": "balance"},
        {"gpus_per_node": 8, "ep_size": 4, "ep_groups": "strided", "num_sweeps": 2},
    ],
)
def test_solve_writes_the_bytes_of_the_command(
    trace: placer.Trace, tmp_path: Path, options: dict[str, object]
) -> None:
    run("solve", trace.path, *words(options), "--out", tmp_path / "command")
    placer.solve(trace, **options).write(tmp_path / "api")
    assert (tmp_path / "api").read_bytes() == (tmp_path / "command").read_bytes()


def test_counts_that_were_not_written_give_the_same_plan(
    trace: placer.Trace, tmp_path: Path
) -> None:
    counts = trace.affinity(fold="0/2")
    run("affinity", trace.path, "--fold", "0/2", "--out", tmp_path / "a")
    run("solve", tmp_path / "a", "--gpus-per-node", 4, "--out", tmp_path / "p")
    placer.solve(counts, gpus_per_node=4).write(tmp_path / "api")
    assert (tmp_path / "api").read_bytes() == (tmp_path / "p").read_bytes()
    counts.write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"engine": "vllm", "tokens_per_rank": "16,64"},
        {"baseline": ["eplb", "random"], "batching": "decode"},
        {"hardware": "h100", "hidden_size": 512, "expert_size": 256},
    ],
)
def test_simulate_has_the_figures_of_the_command(
    trace: placer.Trace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, object],
) -> None:
    plan = placer.solve(trace, gpus_per_node=4, fold="0/2", proof="none")
    plan.write(tmp_path / "plan.json")
    found = placer.open(tmp_path / "plan.json").simulate(trace, **options, not_fold="0/2")
    line = ("simulate", tmp_path / "plan.json", trace.path, *words(options))
    told = found.to_json()
    assert told == printed(capsys, *line, "--not-fold", "0/2")
    assert plan.simulate(trace, **options, not_fold="0/2").figures() == found.figures()
    frame = found.to_frame().set_index(["engine", "placement", "policy"])
    assert len(frame) == len(set(frame.index)) == len(set(frame.index))
    own = found.figures("eplb")
    assert (
        own.load_imbalance_mean == frame.xs("eplb", level=1).iloc[0]["load_imbalance_mean"]
    )
    timed = [name for name in found.batches() if name.startswith("time")]
    assert bool(timed) == ("hardware" in options)


def test_a_table_has_the_bytes_of_the_command(trace: placer.Trace, tmp_path: Path) -> None:
    plan = placer.solve(trace, gpus_per_node=4, fold="0/2", proof="none", policy="token")
    plan.write(tmp_path / "plan.json")
    options = {"lookback": 1, "token_score": True}
    line = ("tables", tmp_path / "plan.json", trace.path, *words(options))
    run(*line, "--out", tmp_path / "command")
    made = plan.table(trace, **options)
    made.write(tmp_path / "api")
    assert (tmp_path / "api").read_bytes() == (tmp_path / "command").read_bytes()
    read = placer.open(tmp_path / "api")
    assert isinstance(read, placer.Table) and read.num_ranks == 4
    frame = read.to_frame()
    assert len(frame) == 3 * read.vocab_size
    row = frame[(frame["layer"] == 2) & (frame["token_id"] == 7)].iloc[0]
    assert row["rank"] == made.contents.token_rank[2, 7]
    found = plan.simulate(trace, not_fold="0/2", table=tmp_path / "api")
    assert {"token", "request"} <= set(found.to_frame()["policy"])


def test_sizes_of_batches_may_be_numbers(trace: placer.Trace) -> None:
    plan = placer.solve(trace, gpus_per_node=4, proof="none")
    one, two = (plan.simulate(trace, tokens_per_rank=s) for s in ([8, 16], "8,16"))
    assert one.to_json() == two.to_json()


@pytest.mark.parametrize("of", ["trace", "affinity"])
def test_advise_says_what_the_command_says(
    trace: placer.Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str], of: str
) -> None:
    source: placer.Trace | placer.Affinity = trace
    if of == "affinity":
        trace.affinity().write(tmp_path / "a")
        source = placer.Affinity.read(tmp_path / "a")
    found = placer.advise(source, gpus_per_node=4, least_gain=0.01)
    line = ("advise", source.path, "--gpus-per-node", 4, "--least-gain", 0.01)
    assert found.to_json() == printed(capsys, *line)
    assert found.recommendation in repr(found)
    assert set(found.to_frame()["placement"]) >= {"contiguous"}


@pytest.mark.parametrize(
    ("target", "name"), [("sglang", "m.json"), ("eplb", "m.npz"), ("checkpoint", "folder")]
)
def test_exports_are_those_of_the_command(
    tiny_model: Path,
    make_plan: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    target: str,
    name: str,
) -> None:
    (tmp_path / "api").mkdir()
    (tmp_path / "command").mkdir()
    path = make_plan(tiny_model)
    out = tmp_path / "command" / name
    line = ["export", target, path, tiny_model, "--out", out]
    facts = printed(capsys, *line)
    found = placer.open(path).export(target, tiny_model, tmp_path / "api" / name)
    renamed = json.dumps(found.to_json()).replace(
        str(tmp_path / "api"), str(tmp_path / "command")
    )
    assert json.loads(renamed) == facts
    assert str(found.out) in repr(found)
    ours = sorted(one for one in (tmp_path / "api").rglob("*") if one.is_file())
    assert ours
    for one in ours:
        theirs = tmp_path / "command" / one.relative_to(tmp_path / "api")
        assert one.read_bytes() == theirs.read_bytes()
    verified = placer.open(path).verify(tiny_model, found.out, max_tokens=0)
    more = ["--max-tokens", "0"]
    assert verified.to_json() == printed(capsys, "verify", tiny_model, out, path, *more)
    assert repr(verified).startswith("verified: ")


def test_a_plan_that_was_not_written_is_exported_and_verified(
    tiny_model: Path, make_plan: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_plan(tiny_model)
    plan = placer.Plan(placer.open(path).contents)
    plan.export("checkpoint", tiny_model, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "placer.json").read_bytes())
    assert record["plan_sha256"] == placer.open(path).sha256
    placer.open(path).verify(tiny_model, tmp_path / "out", max_tokens=0)
    back = placer.restore(tmp_path / "out", tmp_path / "back")
    assert back.verdict.answer == (
        f"Restored the original of {tmp_path / 'out'} in {back.out}.",
    )
    for shard in tiny_model.glob("*.safetensors"):
        assert (tmp_path / "back" / shard.name).read_bytes() == shard.read_bytes()
    other = placer.open(make_plan(tiny_model, seed=1))
    with pytest.raises(placer.VerificationError):
        other.verify(tiny_model, tmp_path / "out", max_tokens=0)


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("vllm", {}, "target 'vllm' is not known"),
        ("sglang", {"link": True}, "target sglang takes no --link"),
        ("ktransformers", {}, "written from an affinity file"),
        ("ranks", {}, "so it needs MODEL"),
    ],
)
def test_exports_that_are_refused(
    trace: placer.Trace, tmp_path: Path, target: str, options: dict[str, bool], words: str
) -> None:
    plan = placer.solve(trace, gpus_per_node=4, proof="none", num_sweeps=0)
    with pytest.raises(placer.UsageError, match=words):
        plan.export(target, None, tmp_path / "out.json", **options)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus_per_node": 4, "policy": "odd"}, "--policy odd"),
        ({"gpus_per_node": 4, "fold": "0/2", "not_fold": "0/2"}, "exclude each other"),
        ({"gpus_per_node": 4, "redundant_experts": -1}, "is neither a number nor auto"),
        ({"gpus_per_node": 0}, "rank"),
        ({"gpus_per_node": 4, "seed": -1}, "--seed"),
    ],
)
def test_what_a_command_refuses_is_refused(
    trace: placer.Trace, options: dict[str, object], words: str
) -> None:
    with pytest.raises(placer.PlacerError, match=words):
        placer.solve(trace, **options)
