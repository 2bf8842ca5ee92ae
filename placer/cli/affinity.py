"""``placer affinity``: count a trace."""

from pathlib import Path
from typing import Annotated

import typer

from placer.cli.output import (
    FoldOption,
    ForceOption,
    JsonOption,
    NotFoldOption,
    PhaseOption,
    claim,
    parse_selection,
    print_facts,
    print_json,
    print_next,
    print_verdict,
    warn,
)
from placer.errors import UsageError, one_of


def affinity(
    context: typer.Context,
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE", help="Trace directories. With --merge: affinity files."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="The affinity file to write (.safetensors).")
    ],
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="Add up affinity files, such as those of several machines."
        ),
    ] = False,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: PhaseOption = "all",
    rows: Annotated[
        str,
        typer.Option(
            help="Also count experts by token id: none, tokens (for each id) or sequences "
            "(for each id and sequence)."
        ),
    ] = "none",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of processes.", show_default="all cores; 1 with a GPU"
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="Where to count: processes on this machine, or ray (tasks of a Ray "
            "cluster)."
        ),
    ] = "processes",
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster whose nodes can read the traces. Default: "
            "start one here."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Device to count on: cpu or cuda.")] = "cpu",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Count expert loads and which experts are used together.

    Counts are exact: loads, pairs of experts that a token uses in one layer
    (co-activation), and pairs in neighbouring layers (transitions). Several traces of one
    model are added up in one file.
    """
    import os

    from placer.affinity.from_traces import affinity_of_traces, merged_affinity
    from placer.affinity.sums import ROWS
    from placer.report.verdicts import verdict_of_affinity
    from placer.run.devices import CPU
    from placer.run.parallel import BACKENDS, Backend
    from placer.trace import EVERYTHING, Trace

    claim(context, out, traces, force=force, kinds=["affinity"])

    chosen = parse_selection(fold, not_fold, phase)
    if merge and chosen != EVERYTHING:
        raise UsageError(
            "affinity files hold counts: tokens can no longer be selected",
            f"select when counting: placer affinity TRACE {chosen.options} --out AFFINITY",
        )
    if merge:
        counted = merged_affinity(traces, warn)
    else:
        opened = [Trace(path) for path in traces]
        where = Backend(name=one_of("--backend", backend, BACKENDS), address=ray_address)
        most = workers or (os.cpu_count() if device == CPU else None) or 1
        counted = affinity_of_traces(
            opened,
            chosen,
            most,
            where,
            rows=one_of("--rows", rows, ROWS),
            device=device,
            warn=warn,
        )
    counted.write(out)
    facts = {
        "out": str(out),
        "num_tokens": counted.num_tokens,
        "num_layers": counted.model.num_layers,
        "num_experts": list(counted.model.num_experts),
        "top_k": counted.model.top_k,
        "transition_pairs": int(sum(pairs.sum() for pairs in counted.transition)),
        "coactivated_pairs": int(sum(pairs.sum() for pairs in counted.coactivation)) // 2,
        "token_rows": counted.token_expert is not None,
    }
    verdict = verdict_of_affinity(counted, out)
    if as_json:
        print_json({"verdict": verdict.to_json()} | facts)
        return
    print_verdict(verdict)
    print_facts("affinity", facts)
    print_next(verdict)
