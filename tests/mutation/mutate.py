"""Mutation testing: does a test fail for every small change of the code?

``python tests/mutation/mutate.py [--module NAME] [--number N]`` changes one operator,
constant or condition at a time, runs the tests that mirror the module, and prints every
mutant that no test found. mutmut and cosmic-ray start an interpreter and import torch for
each mutant; here a process that has imported the libraries, and all that the tests of the
module import, forks a child for each.

Some mutants change no result, or only speed. ``equivalent.toml`` lists them, each with its
reason; they are tried all the same, and counted apart. An entry that a test finds after
all, or that fits no mutant, is an error.

Numba's loops run as plain Python here: numba keeps what it compiled on disk, and could
take the loop before the change from there.
"""

import argparse
import ast
import gc
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
LOOPS = "placer.solver."
# A mutant that takes so many times longer than the code before the change is found.
CPU_FACTOR, WALL_FACTOR = 4, 40
LEAST_CPU_SECONDS, LEAST_WALL_SECONDS = 5, 300
#: Modules, and the tests that must find their mutants; the cheapest come first.
TARGETS = {
    "placer.run.files": ["tests/run/test_files.py"],
    "placer.run.documents": ["tests/run/test_documents.py"],
    "placer.run.writing": ["tests/run/test_writing.py", "-k", "not signal_removes"],
    "placer.run.archives": ["tests/run/test_archives.py"],
    "placer.run.seals": ["tests/test_seals.py"],
    "placer.table.homes": ["tests/table/test_homes.py"],
    "placer.checkpoint.permutation": [
        "tests/checkpoint/test_permutation.py",
    ],
    "placer.trace.chunk": ["tests/trace/test_chunk.py", "tests/trace/test_trace_files.py"],
    "placer.trace.stored": ["tests/trace/test_stored.py"],
    "placer.serving.layer_serving": ["tests/serving/test_layer_serving.py"],
    "placer.serving.homes": [
        "tests/serving/test_layer_serving.py",
        "tests/serving/test_replica_choice.py",
        "tests/simulation/test_steps.py",
    ],
    "placer.placement.placement": ["tests/placement/test_placement.py"],
    "placer.simulation.cost": ["tests/simulation/test_cost.py"],
    "placer.simulation.messages": ["tests/simulation/test_messages.py"],
    "placer.simulation.metrics": [
        "tests/simulation/test_simulate.py",
        "tests/simulation/test_steps.py",
    ],
    "placer.simulation.steps": ["tests/simulation/test_steps.py"],
    "placer.solver.balance.eplb": ["tests/baseline/test_eplb.py"],
    "placer.solver.kernels.price": ["tests/solver/kernels/test_price.py"],
    "placer.solver.problem.traffic": ["tests/solver/problem/test_traffic_problem.py"],
    "placer.solver.problem.layer_profile": ["tests/solver/problem/test_layer_profile.py"],
    "placer.solver.proof.bounds": ["tests/solver/proof/test_bounds.py"],
    "placer.solver.proof.certificate": ["tests/solver/proof/test_certificate.py"],
    "placer.solver.proof.copies": ["tests/solver/proof/test_copies.py"],
    "placer.solver.proof.grouping": ["tests/solver/proof/test_grouping.py"],
    "placer.solver.proof.triangles": ["tests/solver/proof/test_triangles.py"],
    "placer.solver.search.copies_cost": [
        f"tests/solver/search/test_copies_cost.py::{name}"
        for name in (
            "test_layers_and_steps_add_up_to_what_tokens_cost",
            "test_a_cap_on_received_copies_allows_what_is_at_most_at_it",
            "test_a_cap_on_one_layer",
        )
    ],
    "placer.solver.search.evaluation": ["tests/solver/search/test_evaluation.py"],
    "placer.solver.search.evaluator": ["tests/solver/search/test_evaluation.py"],
}
#: What pytest does beside running tests costs more than most of these tests.
OPTIONS = (
    *("-x", "-q", "--assert=plain", "--hypothesis-seed=0"),
    *(f"-pno:{name}" for name in ("anyio", "cacheprovider", "threadexception")),
    *(f"-pno:{name}" for name in ("unraisableexception", "warnings")),
)
COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
COUNTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}


class Mutant(NamedTuple):
    """One small change of a module.

    Attributes
    ----------
    number
        Of the line that is changed.
    where
        The function that holds it, with its class; empty outside of functions.
    line
        Its text.
    change
        What was there, and what is there now.
    source
        The whole module after the change.
    """

    number: int
    where: str
    line: str
    change: str
    source: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What ``equivalent.toml`` knows it by."""
        return self.where, self.line, self.change


def mutants(source: str) -> Iterator[Mutant]:
    """Yield all mutants of a module."""
    lines = source.splitlines()
    wanted = 0
    while True:
        tree = ast.parse(source)
        done = _Change(wanted).change(tree)
        if done is None:
            return
        node, where, change = done
        line = lines[node.lineno - 1]
        if isinstance(node, ast.Constant):
            change += f" at {node.col_offset - len(line) + len(line.lstrip())}"
        changed = ast.unparse(ast.fix_missing_locations(tree))
        yield Mutant(node.lineno, where, line.strip(), change, changed)
        wanted += 1


#: The node that was changed, the function that holds it, and the change.
_Done = tuple[ast.expr | ast.stmt, str, str]


class _Change(ast.NodeTransformer):
    """Makes the ``wanted``-th of all possible changes."""

    def __init__(self, wanted: int) -> None:
        self._left = wanted
        self._within: list[str] = []
        self._done: _Done | None = None

    def change(self, tree: ast.AST) -> _Done | None:
        """Change the tree; return what was done, or ``None`` if there are not so many."""
        self.visit(tree)
        return self._done

    def _take(self, node: ast.expr | ast.stmt, old: ast.AST, new: ast.AST) -> bool:
        if self._done is not None:
            return False
        self._left -= 1
        if self._left >= 0:
            return False
        change = f"{ast.unparse(old)} -> {ast.unparse(new)}"
        self._done = (node, ".".join(self._within), change)
        return True

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        for place, operator in enumerate(node.ops):
            ops = list(node.ops)
            ops[place] = COMPARED[type(operator)]()
            new = ast.Compare(node.left, ops, node.comparators)
            if self._take(node, node, new):
                return ast.copy_location(new, node)
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        operator = COUNTED.get(type(node.op))
        if operator is not None:
            new = ast.BinOp(node.left, operator(), node.right)
            if self._take(node, node, new):
                return ast.copy_location(new, node)
        return self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        operator = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        new = ast.BoolOp(operator, node.values)
        if self._take(node, node, new):
            return ast.copy_location(new, node)
        return self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        if isinstance(node.op, ast.Not) and self._take(node, node, node.operand):
            return node.operand
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return node
        for value in (True, False):
            if self._take(node, node.test, ast.Constant(value)):
                node.test = ast.Constant(value)
                return node
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            new = ast.Constant(not node.value)
        elif isinstance(node.value, int):
            new = ast.Constant(node.value + 1)
        else:
            return node
        if self._take(node, node, new):
            return ast.copy_location(new, node)
        return node

    # Neither messages nor types nor docstrings decide what the code does.
    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._visit_body(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._visit_body(node)

    def _visit_body(self, node: ast.ClassDef | ast.FunctionDef) -> ast.AST:
        self._within.append(node.name)
        node.body = [self.visit(one) for one in node.body]
        self._within.pop()
        return node


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from changed source."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self._name, self._path, self._source = name, path, source

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=self)

    def exec_module(self, module: object) -> None:
        exec(compile(self._source, str(self._path), "exec"), vars(module))


class Outcome(NamedTuple):
    """How the tests of a module ended.

    Attributes
    ----------
    failed, timed_out
        Whether a test failed; whether time ran out before.
    cpu_seconds, wall_seconds
        What they took.
    """

    failed: bool
    timed_out: bool
    cpu_seconds: float
    wall_seconds: float


def run_tests(name: str, source: str, folder: Path, usual: Outcome | None) -> Outcome:
    """Run the tests of a module in a child that imports it from ``source``."""
    started, child = time.monotonic(), os.fork()
    if not child:
        _run_in_child(name, source, folder, usual)
    _, status, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return Outcome(
        failed=code != 0,
        timed_out=code in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL),
        cpu_seconds=used.ru_utime + used.ru_stime,
        wall_seconds=time.monotonic() - started,
    )


def _run_in_child(name: str, source: str, folder: Path, usual: Outcome | None) -> None:
    import numba
    import pytest

    if usual is not None:
        cpu = LEAST_CPU_SECONDS + CPU_FACTOR * int(usual.cpu_seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        wall = LEAST_WALL_SECONDS + WALL_FACTOR * int(usual.wall_seconds)
        signal.alarm(wall)  # it may wait for ever
    if name.startswith(LOOPS):
        numba.config.DISABLE_JIT = True
    quiet = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.meta_path.insert(0, _Mutated(name, path_of(name), source))
    words = [*OPTIONS, f"--basetemp={folder / 'tests'}", *TARGETS[name]]
    os._exit(int(pytest.main(words)))


def import_what_tests_import(name: str, folder: Path) -> None:
    """Import all libraries that the tests of a module need, and forget placer and tests."""
    import pytest

    with open(folder / "output", "w") as quiet, redirect_stdout(quiet):
        pytest.main([*OPTIONS, "--collect-only", *TARGETS[name]])
    own = (str(ROOT / "placer") + os.sep, str(ROOT / "tests") + os.sep)
    for imported, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if imported != "__main__" and file.startswith(own):
            del sys.modules[imported]
    gc.collect()
    gc.freeze()  # else every child copies the pages that it marks


def path_of(name: str) -> Path:
    """Return the file of a module."""
    return ROOT / (name.replace(".", "/") + ".py")


def explained(name: str, known: list[Mutant]) -> set[tuple[str, str, str]]:
    """Return the keys of the mutants of a module that are known to be equivalent.

    Raises
    ------
    RuntimeError
        If one of them is no mutant of the module.
    """
    entries = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8"))["mutant"]
    mine = {
        (one["where"], one["line"], one["change"])
        for one in entries
        if one["module"] == name
    }
    if odd := mine - {one.key for one in known}:
        raise RuntimeError(f"{EQUIVALENT.name} lists what is no mutant of {name}: {odd}")
    return mine


def try_module(name: str, number: int | None, folder: Path) -> bool:
    """Try mutants of a module, print what came of it, and say whether all is explained."""
    import_what_tests_import(name, folder)
    source = path_of(name).read_text(encoding="utf-8")
    usual = run_tests(name, source, folder, None)
    if usual.failed:
        text = (folder / "output").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{name}: its tests fail without a change\n{text[-2000:]}")
    if not run_tests(name, "raise ImportError('planted')", folder, usual).failed:
        raise RuntimeError(f"{name}: its tests do not find that it cannot be imported")
    known = list(mutants(source))
    equal = explained(name, known)
    chosen = known
    if number is not None and number < len(known):
        chosen = random.Random(0).sample(known, number)
    facts = {"tried": len(chosen), "found": 0, "timed_out": 0, "equivalent": 0, "alive": 0}
    wrong = False
    seconds = usual.cpu_seconds
    for one in chosen:
        outcome = run_tests(name, one.source, folder, usual)
        seconds += outcome.cpu_seconds
        is_equal = one.key in equal
        facts["found"] += outcome.failed
        facts["timed_out"] += outcome.timed_out
        facts["equivalent"] += is_equal
        facts["alive"] += not outcome.failed and not is_equal
        if outcome.failed == is_equal:
            wrong = True
            verb = "is no equivalent" if is_equal else "survives"
            place = f"{name}:{one.number}: {one.where}"
            print(f"{place}: {one.line}: {one.change}: {verb}", flush=True)
    whole = {"module": name, "possible": len(known)} | facts
    print(json.dumps(whole | {"cpu_seconds": round(seconds)}), flush=True)
    return not wrong


def main() -> int:
    """Try mutants of all modules, or of some; the exit code says whether any survived."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--module", action="append", choices=TARGETS, metavar="NAME")
    parser.add_argument("--number", type=int, help="a seeded sample of each module's")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    os.environ["NUMBA_CACHE_DIR"] = str(folder / "numba")
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    import hypothesis  # noqa: F401
    import msgspec  # noqa: F401
    import numba  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    from ortools.graph.python import min_cost_flow  # noqa: F401
    from safetensors import numpy as _  # noqa: F401

    try:
        fine = [
            try_module(name, arguments.number, folder)
            for name in arguments.module or TARGETS
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return not all(fine)


if __name__ == "__main__":
    sys.exit(main())
