"""``placer import``: traces and loads that something else recorded."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.api.known import FORMATS, LOAD_FORMATS, MAP_FORMATS, TOKEN_FORMATS
from placer.cli.choices import among
from placer.cli.inputs import WORDS
from placer.cli.output import ForceOption, JsonOption, print_result


def _require_order(context: typer.Context, file: Path) -> Path:
    """Refuse a file and a format in each other's place."""
    given = context.params.get("format_")
    if str(file) in FORMATS and given not in FORMATS:
        swapped = {given: str(file), str(file): str(given)}
        words = [swapped.get(word, word) for word in context.meta[WORDS]]
        if not any(word.startswith("--out") for word in words):
            words += ["--out", "OUT"]
        raise placer.UsageError(
            f"{given} is not a format, but {file} is: the format comes first",
            shlex.join(["placer", "import", *words]),
        )
    return file


def import_(
    format_: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help=f"Tokens: {', '.join(TOKEN_FORMATS)}. Loads: {', '.join(LOAD_FORMATS)}. "
            f"Maps: {', '.join(MAP_FORMATS)}.",
            autocompletion=among(*FORMATS),
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="The file or folder to read.", callback=_require_order
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="The trace directory, affinity file or plan to write."),
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Checkpoint of the recorded model; its config.json is enough. It says "
            "which layers are MoE layers. Later commands then refuse another model.",
        ),
    ] = None,
    map_: Annotated[
        Path | None,
        typer.Option(
            "--map",
            metavar="FILE",
            help="With trtllm-statistic: the load balancer's map that the engine used.",
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="With a map: number of nodes.", show_default="1"),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=1, help="With a map: number of expert-parallel ranks on each node."
        ),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="With csv, jsonl or json-requests: the names of columns or keys in "
            "your file, as PLACER_NAME=YOUR_NAME: layer=layer_id,experts=topk_ids. "
            "docs/importing.md lists placer's names.",
        ),
    ] = None,
    num_experts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of experts in every layer, if --model is not given. Default: the "
            "largest id plus 1.",
        ),
    ] = None,
    skip_layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="MoE layers that were not recorded, as the model numbers them, such as "
            "0,1,2. Plans leave them out, and exports do not move their experts.",
        ),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Import what an engine recorded: a trace, loads or a map.

    Experts of each token become a trace (docs/importing.md has every field):

      npz               arrays experts [tokens, layers, top-k] and sequence_ids
      exflow            .npy array [tokens, layers]
      csv, jsonl        one row for each token and layer
      json-requests     one object per request: layer -> experts of its tokens
      sglang-routed     responses of SGLang with routed experts
      vllm-routed       responses of vLLM with routed experts
      sglang-dump       .pt file of SGLang's recorder in mode per_token

    Loads of experts become an affinity file, which is enough to balance:

      sglang-stat       .pt file of SGLang's recorder in mode stat
      trtllm-statistic  the directory that EXPERT_STATISTIC_PATH names
      csv-loads         columns layer, expert, count (or layer_id, expert_id)
      load-matrix       counts [layers, experts] as .npy, .npz, .pt or .json

    A map that placer export wrote, or that an engine uses, becomes a plan. It needs
    --gpus-per-node. It also needs --model if the map does not say which layers are MoE
    layers.
    """
    found = placer.import_file(
        format_,
        file,
        out,
        model=model,
        map=map_,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        keys=keys,
        num_experts=num_experts,
        skip_layers=skip_layers,
        force=force,
    )
    print_result(found, as_json=as_json, always=False)
