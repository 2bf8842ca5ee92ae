"""``placer trace links``: what experts say about experts of later layers."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placer.cli.output import (
    FoldOption,
    JsonOption,
    NotFoldOption,
    PhaseOption,
    parse_selection,
    print_json,
    print_line,
    print_next,
    print_table,
    print_verdict,
    warn,
)

if TYPE_CHECKING:
    from placer.report.links import Links


def links(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE", help="Trace directories.")
    ],
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the controls.")] = 0,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: PhaseOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Measure how well experts predict those of later layers.

    Shows mutual information in bits (mean over layers), of the trace and of copies of it
    that are shuffled so that one kind of structure is lost. Also shows how many layers
    links reach, and how much domains differ. Several traces, such as those of several
    training steps, are shown one after another.
    """
    from placer.report.links import links_of
    from placer.report.trace_verdicts import verdict_of_links
    from placer.trace import Trace
    from placer.trace.doubts import UNORDERED

    chosen = parse_selection(fold, not_fold, phase)
    opened = {str(path): Trace(path) for path in traces}
    found = {path: links_of(trace, chosen, seed=seed) for path, trace in opened.items()}
    for path, trace in opened.items():
        if not trace.header.experts_by_weight:
            warn(f"{path}: {UNORDERED}: no figures of top-1 experts are shown")
    verdict = verdict_of_links(found)
    if as_json:
        shown = {path: _json(one) for path, one in found.items()}
        print_json({"verdict": verdict.to_json()} | shown)
        return
    print_verdict(verdict, always=True)
    for path, one in found.items():
        print_line(f"\n{path}: {one.num_tokens:,} tokens")
        _show(one)
    print_next(verdict)


def _show(found: "Links") -> None:
    print_line("")
    print_table(
        ("bits", "top-1 next", "corrected", "all pairs", "within layer"),
        [tuple(asdict(row).values()) for row in found.information],
        title="mutual information: recorded, then with one kind of structure removed",
    )
    print_line("")
    if found.reach:
        _show_reach(found)
    if found.domains:
        _show_domains(found)


def _show_reach(found: "Links") -> None:
    print_table(
        ("layers apart", "top-1", "corrected", "top-1 hit rate"),
        [tuple(asdict(row).values()) for row in found.reach],
        title="mutual information of layers further apart",
    )
    print_line("")


def _show_domains(found: "Links") -> None:
    rows = zip(found.domains, found.domain_distance.tolist(), strict=True)
    print_table(
        ("domain", *found.domains),
        [(name, *row) for name, row in rows],
        title="distance between domains (Jensen-Shannon, bits)",
    )
    print_line("")


def _json(found: "Links") -> dict[str, object]:
    return asdict(found) | {"domain_distance": found.domain_distance.tolist()}
