"""Solve and judge what the README's table says, and name every figure that differs.

``make reproduce`` runs this on ``traces/gpt-oss-20b``. Each plan is solved on one half of
the sequences and judged on the other, with the contiguous placement and EPLB at equal slots
to compare with.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "reproduce"
TRACE = "traces/gpt-oss-20b"
COMMAND = "$ make reproduce"
HEADING = (
    "gpt-oss-20b, solved on half of the sequences, judged on the other half\n"
    "\n"
    "                                copies sent,      busiest GPU over the mean\n"
    "                                contiguous is 1\n"
    "plan                               EPLB  placer   contiguous    EPLB  placer"
)


@dataclass(frozen=True, slots=True)
class Case:
    """One row: what it is called, and how ``placer solve`` is asked for it."""

    name: str
    options: str
    policy: str = "fixed"
    sent: str = "remote_rank_copies_per_token"

    def commands(self, out: Path) -> tuple[str, str]:
        """Return how the plan is made and how it is judged."""
        plan = out / f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}.json"
        asked = f"--fold 0/2 {self.options}"
        return (
            f"placer solve {TRACE} {asked} --out {shlex.quote(str(plan))} --force",
            f"placer simulate {shlex.quote(str(plan))} {TRACE} --fold 1/2 --json",
        )


CASES = (
    Case("1 x 8 GPUs, DeepEP", "--gpus-per-node 8 --engine sglang-deepep"),
    Case("1 x 8, load cap 1.10", "--gpus-per-node 8 --max-imbalance 1.10 --relax-cap"),
    Case(
        "1 x 8, 8 redundant experts",
        "--gpus-per-node 8 --engine trtllm-onesided --redundant-experts 8",
    ),
    Case(
        "2 x 8, DeepEP, between nodes",
        "--nodes 2 --gpus-per-node 8 --engine sglang-deepep",
        sent="remote_node_copies_per_token",
    ),
    Case(
        "1 x 8, follow (research)",
        "--gpus-per-node 8 --policy follow --max-imbalance 1.10 --relax-cap",
        policy="follow",
    ),
)


def row(case: Case, judged: Mapping[str, Any]) -> str:
    """Return a line of the table from what ``placer simulate --json`` printed."""
    plan = judged["policies"][case.policy]
    default, eplb = (judged["baselines"][n][case.policy] for n in ("contiguous", "eplb"))
    sent = [one[case.sent] / default[case.sent] for one in (eplb, plan)]
    busiest = [one["load_imbalance_mean"] for one in (default, eplb, plan)]
    return (
        f"{case.name:31}{sent[0]:8.3f}{sent[1]:8.3f}"
        f"{busiest[0]:13.3f}{busiest[1]:8.3f}{busiest[2]:8.3f}"
    )


def run(case: Case) -> str:
    """Solve a case, judge it, and return its line.

    Raises
    ------
    RuntimeError
        If a command fails.
    """
    solve, simulate = case.commands(OUT)
    _run(solve)
    return row(case, json.loads(_run(simulate)))


def differences(found: str, readme: str) -> Iterator[str]:
    """Yield what the README's table says otherwise, line by line."""
    _, _, rest = readme.partition(f"{COMMAND}\n")
    told = rest.partition("```")[0].splitlines()
    for line in found.splitlines():
        if line not in told:
            named = [one for one in told if one[:31] == line[:31]]
            yield f"now:    {line}\nREADME: {named[0] if named else 'has no such line'}"


def main(cases: Sequence[Case] = CASES) -> int:
    """Print the table, and return how many of its lines differ from the README's."""
    OUT.mkdir(parents=True, exist_ok=True)
    lines = [HEADING]
    print(HEADING, flush=True)
    # Two at a time: a plan is solved in one process.
    with ThreadPoolExecutor(2) as pool:
        for line in pool.map(run, cases):
            lines.append(line)
            print(line, flush=True)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = list(differences("\n".join(lines), readme))
    if found:
        print("\nThis differs from the README:", *found, sep="\n", file=sys.stderr)
    else:
        print("\nEvery figure is that of the README.", file=sys.stderr)
    return len(found)


def _run(command: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        shlex.split(command),
        cwd=ROOT,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(bool(main()))
