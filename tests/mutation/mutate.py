"""Mutation testing: does a test fail for every small change of the code?

``python tests/mutation/mutate.py [--module NAME] [--number N]`` changes one operator,
constant or condition at a time, runs the tests that mirror the module, and prints every
mutant that no test found. mutmut and cosmic-ray start an interpreter and import torch for
each mutant; here a process that has imported the libraries forks a child for each.
"""

import argparse
import ast
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CPU_SECONDS = 30
#: Modules, and the tests that must find their mutants.
TARGETS = {
    "placer.run.files": ["tests/run/test_files.py"],
    "placer.run.documents": ["tests/run/test_documents.py"],
    "placer.run.writing": ["tests/run/test_writing.py"],
    "placer.checkpoint.permutation": [
        "tests/checkpoint/test_named_experts.py",
        "tests/checkpoint/test_quantised_layouts.py",
        "tests/checkpoint/test_released_layouts.py",
    ],
    "placer.run.seals": ["tests/test_seals.py"],
    "placer.trace.chunk": ["tests/trace/test_trace_files.py"],
    "placer.trace.stored": ["tests/trace/test_stored.py"],
    "placer.serving.layer_serving": ["tests/serving/test_layer_serving.py"],
    "placer.serving.homes": ["tests/simulation/test_steps.py"],
    "placer.placement.placement": ["tests/placement/test_placement.py"],
    "placer.simulation.cost": ["tests/simulation/test_cost.py"],
    "placer.simulation.messages": ["tests/simulation/test_messages.py"],
    "placer.simulation.metrics": [
        "tests/simulation/test_simulate.py",
        "tests/simulation/test_steps.py",
    ],
    "placer.simulation.steps": ["tests/simulation/test_steps.py"],
    "placer.solver.problem.traffic": ["tests/solver/search/test_evaluation.py"],
    "placer.solver.problem.layer_profile": ["tests/solver/problem/test_layer_profile.py"],
    "placer.solver.proof.triangles": ["tests/solver/proof/test_triangles.py"],
    "placer.solver.proof.copies": ["tests/solver/proof/test_copies.py"],
}
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


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line, what was changed, and the changed source, for every mutant."""
    number = 0
    while True:
        tree = ast.parse(source)
        done = _Change(number).change(tree)
        if done is None:
            return
        yield done[0], done[1], ast.unparse(ast.fix_missing_locations(tree))
        number += 1


class _Change(ast.NodeTransformer):
    """Makes the ``wanted``-th of all possible changes."""

    def __init__(self, wanted: int) -> None:
        self._left = wanted
        self._done: tuple[int, str] | None = None

    def change(self, tree: ast.AST) -> tuple[int, str] | None:
        self.visit(tree)
        return self._done

    def _take(self, node: ast.AST, what: str) -> bool:
        if self._done is not None:
            return False
        self._left -= 1
        if self._left >= 0:
            return False
        self._done = (getattr(node, "lineno", 0), what)
        return True

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        for place, operator in enumerate(node.ops):
            new = COMPARED[type(operator)]
            if self._take(node, f"{type(operator).__name__} -> {new.__name__}"):
                node.ops[place] = new()
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        new = COUNTED.get(type(node.op))
        old = type(node.op).__name__
        if new is not None and self._take(node, f"{old} -> {new.__name__}"):
            node.op = new()
        return self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        if self._take(node, "and <-> or"):
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        if isinstance(node.op, ast.Not) and self._take(node, "not dropped"):
            return node.operand
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST:
        for value in (True, False):
            if self._take(node, f"if {value}"):
                node.test = ast.Constant(value)
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            if self._take(node, f"{node.value} -> {not node.value}"):
                return ast.copy_location(ast.Constant(not node.value), node)
        elif isinstance(node.value, int) and self._take(node, f"{node.value} + 1"):
            return ast.copy_location(ast.Constant(node.value + 1), node)
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
        node.body = [self.visit(one) for one in node.body]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.body = [self.visit(one) for one in node.body]
        return node


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from changed source."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self._name, self._path, self._source = name, path, source

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        if name != self._name:
            return None
        return importlib.util.spec_from_loader(name, self, origin=str(self._path))

    def exec_module(self, module: object) -> None:
        exec(compile(self._source, str(self._path), "exec"), vars(module))


def run_tests(name: str, source: str) -> int:
    """Run the tests of a module in a child that imports it from ``source``."""
    import pytest

    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        signal.alarm(10 * CPU_SECONDS)  # it may wait for ever
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.meta_path.insert(0, _Mutated(name, path_of(name), source))
        words = ["-x", "-q", "-p", "no:cacheprovider", *TARGETS[name]]
        os._exit(int(pytest.main(words)))
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def path_of(name: str) -> Path:
    return ROOT / (name.replace(".", "/") + ".py")


def main() -> int:
    """Try mutants of all modules, or of one; the exit code says whether any survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", action="append")
    parser.add_argument("--number", type=int, help="a seeded sample of each module's")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    import hypothesis  # noqa: F401
    import msgspec  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    from safetensors import numpy as _  # noqa: F401

    survived = 0
    for name in arguments.module or TARGETS:
        source = path_of(name).read_text(encoding="utf-8")
        if run_tests(name, source):
            raise RuntimeError(f"{name}: its tests fail without a change")
        known = list(mutants(source))
        chosen = known
        if arguments.number is not None and arguments.number < len(known):
            chosen = random.Random(0).sample(known, arguments.number)
        alive = 0
        for line, what, changed in chosen:
            if not run_tests(name, changed):
                alive += 1
                print(f"{name}:{line}: {what}: survives", flush=True)
        survived += alive
        facts = {"module": name, "possible": len(known), "tried": len(chosen)}
        print(json.dumps(facts | {"alive": alive}), flush=True)
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main())
