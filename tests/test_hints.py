"""Every hint that is a command runs when its placeholders are filled in."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer.main
from typer.exceptions import TyperException

import placer
from placer.cli.export import TARGETS
from placer.cli.main import app, main
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement import Placement
from placer.placement.topology import Topology
from placer.planning.engine_options import require_loadable
from placer.runtime_map.maps import export_map
from placer.target.engine import Engine, engines_named
from placer.target.map_formats import MAPS
from placer.trace import Chunk, TraceWriter
from tests.plans import unsolved_plan

ROOT = Path(placer.__file__).parent
COMMAND = typer.main.get_command(app)
NAMES = "|".join(COMMAND.commands)
# A command begins a text or follows one of these, and ends before , ; ) or a line's end.
BEFORE = r"(?:^|\n|: |, |; |\(|\bor |\bthen |--no-python )"
FOUND = re.compile(rf"{BEFORE}(placer (?:{NAMES})\b[^,;)\n]*)")
# Stands for whatever an f-string fills in: a path, a number or a name.
FILLED = "1"


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Texts of a module that a user may be told: no docstrings, no help of options."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.add(node.value)
        if isinstance(node, ast.keyword) and node.arg in ("help", "source"):
            left_out.add(node.value)
        if isinstance(node, ast.List):  # words that are joined to a command elsewhere
            left_out.update(node.elts)

    def visit(node: ast.AST) -> Iterator[tuple[int, str]]:
        if node in left_out:
            return
        if isinstance(node, ast.JoinedStr | ast.BinOp) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str)
        ):
            yield node.lineno, rendered(node)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(tree)


def rendered(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(rendered, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return rendered(node.left) + rendered(node.right)
    return FILLED


def commands() -> Iterator[tuple[str, str]]:
    for path in sorted(ROOT.rglob("*.py")):
        for line, text in texts_of(path):
            for found in FOUND.finditer(text):
                yield f"{path.relative_to(ROOT)}:{line}", found[1].strip()


def parse(command: str) -> typer.Context:
    """Parse a command by the real command line, without running it.

    Raises
    ------
    TyperException
        If a command, option or argument does not exist, or a required one is missing.
    """
    words = [re.sub(r"^[A-Z_]+$", FILLED, word) for word in shlex.split(command)[1:]]
    found = COMMAND
    while hasattr(found, "commands"):
        found, words = found.commands[words[0]], words[1:]
    return found.make_context("placer", words)


def test_commands_are_found():
    found = dict(commands())
    assert len(found) > 60
    assert any("placer export checkpoint" in one for one in found.values())


@pytest.mark.parametrize(("place", "command"), [*commands()])
def test_every_hint_that_is_a_command_runs(place, command):
    """The command line takes all of its words, and misses none that it needs."""
    assert "..." not in command.split(), f"{place} leaves out what to type: {command}"
    try:
        context = parse(command)
    except typer.Exit as ended:
        assert ended.exit_code == 0, "--help"
        return
    except TyperException as error:
        pytest.fail(f"{place}: {command}: {error.format_message()}")
    with context:
        given = context.params
    if given.get("target") not in (None, FILLED):
        assert given["target"] in TARGETS
    if given.get("engine") not in (None, FILLED):
        engines_named(given["engine"])


@pytest.mark.parametrize(
    "command",
    ["placer solve TRACE --out PLAN", "placer export sglang --why", "placer simulate PLAN"],
)
def test_a_command_that_lacks_something_is_noticed(command):
    with pytest.raises(TyperException):
        parse(command)


CONFIG = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "hidden_size": 16,
    "vocab_size": 32,
    "num_experts_per_tok": 2,
} | dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 8)
PLAIN = [*range(8)]
WITH_COPIES = [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 0]


@pytest.fixture(params=["deepseek_v3", "kimi_k2", "gpt_oss", "mixtral", "dots1"])
def checkpoint(request, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": request.param}))
    return folder


def told_of(step, engine, row, checkpoint, folder):
    """What placer says where a plan of these slots is solved for, or exported to."""
    model = ModelSpec.from_checkpoint(checkpoint)
    placed = Placement.from_json([row, row], (8, 8), 4, 1)
    if step == "solve":
        loading = require_loadable(
            engine,
            model,
            redundant_experts=placed.redundant_experts,
            topology=Topology(gpus_per_node=4),
        )
        return " ".join(loading.notes)
    if step == "checkpoint":
        placed.permutation(0)
        return ""
    plan = folder / "plan.json"
    unsolved_plan(model, placed, engine=engine.name).write(plan)
    out = folder / f"map{MAPS[step].suffixes[0]}"
    return " ".join(export_map(step, plan, checkpoint, out).warnings)


@pytest.mark.parametrize("started", ["solve", "sglang", "trtllm", "checkpoint"])
@pytest.mark.parametrize("row", [PLAIN, WITH_COPIES])
@pytest.mark.parametrize("name", ["sglang-deepep", "vllm-deepep-ht", "trtllm-onesided"])
def test_hints_lead_to_a_file_that_is_served(started, row, name, checkpoint, tmp_path):
    """Whoever types the first command of each hint gets there, and never comes back.

    Nothing is said of a plan that a map or a permuted checkpoint can carry.
    """
    engine, step, seen = Engine.named(name), started, []
    while (step, tuple(row)) not in seen:
        seen.append((step, tuple(row)))
        try:
            told = told_of(step, engine, row, checkpoint, tmp_path)
        except PlacerError as error:
            told = error.hint
        if not told:
            return
        _, command, target, *words = next(FOUND.finditer(told))[1].split()
        step = target if command == "export" else command
        if "--redundant-experts 0" in " ".join(words):
            row = PLAIN
    pytest.fail(f"round in circles: {seen}")


def run(words, folder, monkeypatch):
    """Run a command in a folder of its own, for what it writes beside itself."""
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as done:
        main(words)
    return done.value.code


EVEN, HOT = (0.25,) * 4, (0.45, 0.45, 0.05, 0.05)


def routed(folder, share):
    """A trace of partners, four pairs of experts, that are used in these shares."""
    first = np.random.default_rng(0).choice(4, 4000, p=share)
    experts = np.stack([first, first + 4], axis=1).astype(np.uint8)
    with TraceWriter(directory=folder, model=ModelSpec(num_experts=(8,), top_k=2)) as out:
        out.append(
            Chunk(
                experts=(experts,),
                sequence_ids=np.repeat(np.arange(40), 100).astype(np.int32),
                positions=np.tile(np.arange(100), 40).astype(np.int32),
            )
        )
        out.finish()
    return str(folder)


@pytest.mark.parametrize(
    ("share", "asked", "part"),
    [
        (EVEN, "--nodes 2 --gpus-per-node 2", "--exchange per-node"),
        (EVEN, "--gpus-per-node 4 --engine sglang-deepep", "--engine sglang-deepep"),
        (EVEN, "--gpus-per-node 4 --policy follow", "--policy follow"),
        (HOT, "--gpus-per-node 4 --engine sglang-none", "--objective balance"),
        (HOT, "--gpus-per-node 3", "--replica-choice hash"),
    ],
)
def test_what_is_advised_runs(share, asked, part, tmp_path, capsys, monkeypatch):
    """On a trace, and on its counts where they advise anything; paths have a space."""
    trace, counts = routed(tmp_path / "a trace", share), str(tmp_path / "the counts")
    assert run(["affinity", trace, "--out", counts], tmp_path, monkeypatch) == 0
    for source in (trace,) if "--policy" in asked else (trace, counts):
        capsys.readouterr()
        words = ["advise", source, *shlex.split(asked), "--json"]
        assert run(words, tmp_path, monkeypatch) == 0
        told = json.loads(capsys.readouterr().out)
        command = told["next"]
        if told["verdict"] == "EPLB does as well":
            assert command is None
        elif source == trace:
            assert part in command
        if command is not None:
            assert run(shlex.split(command)[1:], tmp_path, monkeypatch) == 0, command
            (tmp_path / "plan.json").unlink()


@pytest.mark.parametrize("number", ["2", "auto"])
def test_what_asks_for_a_replica_choice_runs(number, tmp_path, capsys, monkeypatch):
    trace = routed(tmp_path / "a trace", HOT)
    words = ["solve", trace, "--gpus-per-node", "2", "--policy", "follow"]
    words += ["--redundant-experts", number, "--out", "PLAN"]
    assert run(words, tmp_path, monkeypatch) == 2
    told = capsys.readouterr().err.splitlines()
    commands = [line for line in told if line.startswith("  placer solve")]
    assert commands
    for n, line in enumerate(commands):
        command = shlex.split(line, comments=True)[1:]
        assert command[command.index("--redundant-experts") + 1] == number
        command[command.index("PLAN")] = f"plan{n}.json"
        assert run(command, tmp_path, monkeypatch) == 0, line


def test_no_hint_removes_files():
    """A path in a message can be any directory of the user."""
    for path in Path(placer.__file__).parent.rglob("*.py"):
        texts = (
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
        assert [one for one in texts if re.search(r"\brm\s+(-|/|\{)|\brm $", one)] == [], (
            path
        )
