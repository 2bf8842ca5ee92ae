"""All steps on the demo model, then a plan for the trace of a real model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from placer.affinity import Affinity
from placer.affinity.from_traces import affinity_of_traces
from placer.checkpoint.export import export_checkpoint
from placer.checkpoint.verify import VerificationReport, verify
from placer.demo.real_trace import NAME, solve_trace
from placer.demo.steps import Steps
from placer.demo.text import DOMAINS, Split, documents
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.placement.policy import Policy
from placer.placement.reference import contiguous
from placer.placement.topology import Topology
from placer.planning.planner import plan_from_trace
from placer.report.html import write_page
from placer.report.inspect import summarize
from placer.run.progress import Progress
from placer.run.session import Session
from placer.run.writing import atomic_directory
from placer.runtime_map.maps import export_map
from placer.simulation.simulate import simulate
from placer.solver.balance.load_caps import balanced
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.table import build_table
from placer.trace import EVERYTHING, Chunk, Trace
from placer.trace.corpus import Corpus
from placer.trace.record import RecordOptions, record

NUM_RANKS = 4
TOKENS_PER_DOMAIN = 16_384
VERIFIED_TOKENS = 2048
POLICIES = ("fixed", "follow", "token")
SOLVED_POLICIES: tuple[Policy, ...] = ("fixed", "follow")
# Those on the demo model.
NUM_STEPS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """The results of the demo.

    Attributes
    ----------
    figures
        Metrics on held-out text, by placement, policy and name.
    verification
        What ``placer verify`` found of the exported checkpoint.
    files
        What was written, by meaning, relative to the directory given.
    real_plan
        The plan for the real trace, or ``None`` where that is not there.
    """

    figures: Mapping[str, Mapping[str, Mapping[str, Any]]]
    verification: VerificationReport
    files: Mapping[str, str]
    real_plan: Plan | None


def shipped_model() -> Path:
    """Return the directory of the model that ships with placer.

    Raises
    ------
    PlacerError
        If this installation has none.
    """
    package = Path(__file__).parent
    for place in (package / "model", package.parents[1] / "traces" / "demo" / "model"):
        if (place / "config.json").is_file():
            here = Path.cwd()
            return place.relative_to(here) if place.is_relative_to(here) else place
    raise PlacerError(
        "this installation does not contain the demo model",
        "name one: placer demo --model DIRECTORY",
    )


def run_demo(
    model: Path,
    out: Path,
    say: Callable[[str], None],
    *,
    trace: Path | None = None,
    progress: Progress | None = None,
) -> DemoReport:
    """Run all steps.

    Parameters
    ----------
    model
        A Hugging Face directory.
    out
        The directory to write.
    say
        Called with the command that does the same as a step.
    trace
        The real trace of the last step, or ``None``: that step is left out.
    progress
        Called with one line for each part of a step.

    Raises
    ------
    PlacerError
        If ``out`` exists and is not claimed with ``force``.
    VerificationError
        If the exported checkpoint is not the same function.

    Notes
    -----
    What exists at ``out`` stays until all steps are done, and stays if one fails.
    """
    ModelSpec.from_checkpoint(model)  # refuse before anything is written
    with atomic_directory(out) as folder:
        steps = Steps(
            total=NUM_STEPS + (trace is not None),
            say=say,
            progress=progress,
            folder=folder,
            out=out,
        )
        try:
            report = _walk(model, folder, steps)
            return report if trace is None else _with_trace(report, trace, folder, steps)
        except BaseException as error:
            _say_nothing_is_kept(error, steps)
            raise


def _say_nothing_is_kept(error: BaseException, steps: Steps) -> None:
    """Leave out what a step noted that it keeps: the whole directory is removed."""
    if hasattr(error, "__notes__"):
        del error.__notes__
    if isinstance(error, PlacerError):
        error.reword(steps.words)


def _with_trace(report: DemoReport, trace: Path, out: Path, steps: Steps) -> DemoReport:
    path = out / f"plan-{NAME}.json"
    plan = solve_trace(trace, path, steps)
    files = {**report.files, f"plan for {NAME}": path.name}
    return replace(report, real_plan=plan, files=files)


def _walk(model: Path, out: Path, steps: Steps) -> DemoReport:
    traces = {split: _record(model, split, out, steps) for split in ("profile", "heldout")}
    profile, heldout = traces["profile"], traces["heldout"]
    affinity = affinity_of_traces([profile], EVERYTHING)
    plans = {policy: _solve(profile, policy, out, steps) for policy in SOLVED_POLICIES}
    steps.begin("simulate on the held-out text, each placement with its own table")
    figures = _figures(plans, affinity, profile.read(), heldout.read())
    plan_path, checkpoint = out / "plan-fixed.json", out / "checkpoint"
    steps.begin(f"placer export checkpoint {plan_path} {model} --out {checkpoint}")
    export_checkpoint(plan_path, model, checkpoint)
    steps.begin(f"placer export sglang {plan_path} {model} --out {out / 'sglang.json'}")
    export_map("sglang", plan_path, model, out / "sglang.json")
    steps.begin(f"placer verify {model} {checkpoint} {plan_path}")
    texts = [one.text for one in documents("heldout")]
    verification = verify(model, checkpoint, plan_path, texts, VERIFIED_TOKENS)
    steps.begin(f"placer inspect {plan_path} --html {out / 'report.html'}")
    write_page(out / "report.html", plan_path.name, summarize(plans["fixed"]))
    return DemoReport(
        figures=figures,
        verification=verification,
        files={
            "report": "report.html",
            "plan": plan_path.name,
            "checkpoint": checkpoint.name,
            "SGLang map": "sglang.json",
        },
        real_plan=None,
    )


def _record(model: Path, split: Split, out: Path, steps: Steps) -> Trace:
    folder = out / "text" / split
    for document in documents(split):
        path = folder / document.domain / (document.name.removesuffix(".txt") + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text, encoding="utf-8")
    most = len(DOMAINS) * TOKENS_PER_DOMAIN
    given = " --corpus ".join(str(folder / domain) for domain in DOMAINS)
    steps.begin(
        f"placer record {model} --corpus {given} --max-tokens {TOKENS_PER_DOMAIN} "
        f"--out {out / split}"
    )
    record(
        model,
        [Corpus(domain=domain, path=folder / domain) for domain in DOMAINS],
        out / split,
        RecordOptions(max_tokens=TOKENS_PER_DOMAIN),
        lambda done: steps.tell(f"recorded {done:,} of at most {most:,} tokens"),
    )
    return Trace(out / split)


def _solve(profile: Trace, policy: Policy, out: Path, steps: Steps) -> Plan:
    path = out / f"plan-{policy}.json"
    steps.begin(
        f"placer solve {profile.directory} --gpus-per-node {NUM_RANKS} --policy {policy} "
        f"--out {path}"
    )
    options = SolveOptions(
        topology=Topology(gpus_per_node=NUM_RANKS), goal=Goal(policy=policy)
    ).guarded()
    session = Session(progress=steps.tell)
    plan = plan_from_trace(profile, options, EVERYTHING, session)
    if session.deadline.interrupted:
        raise KeyboardInterrupt
    plan.write(path)
    return plan


def _figures(
    plans: Mapping[Policy, Plan], affinity: Affinity, profile: Chunk, heldout: Chunk
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return held-out metrics by placement and policy; each policy has its own plan."""
    model = affinity.model
    vocab_size = model.vocab_size or 0  # a recorded trace is bound, and so has one
    blind = {
        "contiguous": contiguous(model.num_experts, NUM_RANKS),
        "balanced": balanced(affinity.load, NUM_RANKS),
    }

    def judged(placement: Placement) -> dict[str, dict[str, Any]]:
        table = build_table(placement, profile, vocab_size=vocab_size)
        found = simulate(placement, heldout, table=table)
        return {policy: found[policy].to_json() for policy in POLICIES}

    figures = {name: judged(placement) for name, placement in blind.items()}
    fixed, follow = (judged(plans[policy].placement) for policy in SOLVED_POLICIES)
    figures["placer"] = {**follow, "fixed": fixed["fixed"]}
    return figures
