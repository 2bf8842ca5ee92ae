"""``placer import``: traces that something else recorded."""

from pathlib import Path
from typing import Annotated

import typer

from placer.cli.output import JsonOption, OutOption, print_json, print_table, warn
from placer.errors import UsageError

_FORMATS = ("npz", "exflow", "csv", "sglang-routed", "sglang-dump", "vllm-routed")


def import_(
    format_: Annotated[
        str, typer.Argument(metavar="FORMAT", help=f"One of: {', '.join(_FORMATS)}.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to read.")],
    out: OutOption,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Checkpoint that the trace is of: binds it."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn routing that something else recorded into a trace.

    npz: arrays experts [T, L, k], sequence_ids [T] and optional others. exflow: .npy
    [tokens, layers]. csv: one row per token and layer. sglang-routed, vllm-routed: JSON
    lines of responses with return_routed_experts. sglang-dump: the recorder's .pt file of
    mode per_token.
    """
    from placer.trace.csv_rows import read_csv
    from placer.trace.imported import import_file
    from placer.trace.npz import read_exflow, read_npz
    from placer.trace.routed_experts import read_sglang_routed, read_vllm_routed
    from placer.trace.sglang_dump import read_sglang_dump

    readers = (
        read_npz,
        read_exflow,
        read_csv,
        read_sglang_routed,
        read_sglang_dump,
        read_vllm_routed,
    )
    if format_ not in _FORMATS:
        raise UsageError(
            f"format {format_!r} is not known", f"known formats: {', '.join(_FORMATS)}"
        )
    reader = dict(zip(_FORMATS, readers, strict=True))[format_]
    header = import_file(reader, format_, file, out, model)
    if not header.model.bound:
        warn(
            "the trace is bound to no checkpoint: the number of experts is the largest id "
            "+ 1; bind it with --model DIR"
        )
    facts = {
        "out": str(out),
        "num_tokens": header.num_tokens,
        "num_sequences": header.num_sequences,
        "num_layers": header.model.num_layers,
        "num_experts": list(header.model.num_experts),
        "top_k": header.model.top_k,
        "domains": list(header.domains),
    }
    if as_json:
        print_json(facts)
    else:
        print_table(("trace", ""), [(name, str(value)) for name, value in facts.items()])
