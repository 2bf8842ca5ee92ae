"""``placer record``: run a model over text."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli.output import ForceOption, JsonOption, print_result, token_progress


def record(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The model: a Hugging Face directory.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The trace directory to write.")],
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Text to record on: a text or .jsonl file, a directory, or - for stdin. "
            "Repeatable.",
        ),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH", help="Like --corpus, with a domain name. Repeatable."
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Field of .jsonl lines that contains a text or a chat."
        ),
    ] = None,
    sequence_length: Annotated[
        int, typer.Option(help="Limit on the tokens of a sequence.")
    ] = 256,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Limit on the tokens of each corpus. Documents are then chosen at random."
        ),
    ] = None,
    chunk_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens in one file of the trace. An interrupted recording keeps its "
            "finished files."
        ),
    ] = 65_536,
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Also record the router weights.")
    ] = True,
    dtype: Annotated[
        str,
        typer.Option(
            help="Number type of the weights: auto (that of the checkpoint), float32, "
            "bfloat16 or float16."
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Torch device to run on, such as cpu or cuda:0.")
    ] = "cpu",
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Spread the model over several devices (accelerate): auto or balanced."
        ),
    ] = None,
    generate: Annotated[
        int,
        typer.Option(
            help="Generate this many tokens after each sequence. They are recorded as "
            "decode."
        ),
    ] = 0,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature of generated tokens. 0: greedy.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Record which experts the routers of a model choose for a text.

    The model runs in transformers. If the command is interrupted, it keeps its finished
    files, each of --chunk-tokens tokens. Run it again with the same options to record the
    rest. To use several GPUs, each with the whole model, start it with torchrun.
    """
    with token_progress() as progress:
        found = placer.record(
            model,
            out,
            corpus=corpus,
            domain=domain,
            field=field,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            chunk_tokens=chunk_tokens,
            weights=weights,
            dtype=dtype,
            device=device,
            device_map=device_map,
            generate=generate,
            temperature=temperature,
            seed=seed,
            force=force,
            progress=progress,
        )
    if found is not None:
        print_result(found, as_json=as_json, always=False)
