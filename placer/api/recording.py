"""``placer.record``: run a model over text, and keep what its routers choose."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from placer.api.files import AnyPath, writing
from placer.api.shown import Result
from placer.errors import one_of
from placer.report.trace_verdicts import verdict_of_recording
from placer.run.worker import Worker
from placer.trace.corpus import name_corpora
from placer.trace.loading import DTYPES
from placer.trace.record import RecordOptions
from placer.trace.record import record as record_trace


def record(
    model: AnyPath,
    out: AnyPath,
    *,
    corpus: Sequence[AnyPath] | None = None,
    domain: Sequence[str] | None = None,
    field: str | None = None,
    sequence_length: int = 256,
    batch_size: int = 16,
    max_tokens: int | None = None,
    chunk_tokens: int = 65_536,
    weights: bool = True,
    dtype: str = "auto",
    device: str = "cpu",
    device_map: str | None = None,
    generate: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Result | None:
    """Record which experts the routers of a model choose for a text, as ``placer record``.

    A call that was interrupted continues if it is made again. Under torchrun every process
    makes the call, each with the whole model.

    Parameters
    ----------
    model
        A Hugging Face directory; the model runs in transformers.
    out
        The trace to write.
    corpus, domain
        Text, JSON lines or directories; with names of domains: ``"NAME=PATH"``.
    field
        Field of JSON lines that has a text or a chat.
    sequence_length, batch_size
        Limit on the tokens of a sequence, and sequences in one forward pass.
    max_tokens
        Limit on the tokens of each corpus.
    chunk_tokens
        Tokens in one file of the trace.
    weights
        Whether router weights are recorded.
    dtype
        ``auto``, ``float32``, ``bfloat16`` or ``float16``.
    device, device_map
        Torch device; ``auto`` or ``balanced`` spread the model over several.
    generate, temperature
        Tokens to generate after each sequence, and how they are sampled.
    seed
        Seed of all that is drawn.
    force
        Whether an earlier trace at ``out`` is replaced.
    progress
        Called with the number of tokens that are recorded.

    Returns
    -------
    Result or None
        On the first process; ``None`` on the others. ``open()`` opens the trace.

    Raises
    ------
    PlacerError
        If the model cannot be run, a text cannot be read, or ``out`` exists.
    UsageError
        If there is no text, or an option has no such value.
    """
    options = RecordOptions(
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
        chunk_tokens=chunk_tokens,
        with_weights=weights,
        dtype=one_of("--dtype", dtype, DTYPES),
        device=device,
        device_map=device_map,
        generate=generate,
        temperature=temperature,
        seed=seed,
    )
    corpora = name_corpora([Path(one) for one in corpus or ()], domain or (), field)
    directory, place, worker = Path(model), Path(out), Worker.of_environment()
    inputs = [directory, *(one.path for one in corpora)]
    claim = writing(place, inputs, force=force, kinds=["trace"], directory=True)
    with nullcontext() if worker.index else claim:
        header = record_trace(directory, corpora, place, options, progress, worker)
    if worker.index:
        return None
    return Result(
        title="trace",
        verdict=verdict_of_recording(header, directory, place),
        facts={
            "out": str(place),
            "num_tokens": header.num_tokens,
            "num_sequences": header.num_sequences,
            "domains": list(header.domains),
            "num_layers": header.model.num_layers,
            "num_experts": list(header.model.num_experts),
            "top_k": header.model.top_k,
        },
        out=place,
    )
