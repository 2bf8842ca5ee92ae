"""Recording: run a transformers model over text and keep its routers' choices."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.errors import PlacerError, UsageError, one_of
from placer.model import Architecture, ModelSpec, read_config, tokenizer_of
from placer.run.files import canonical_json, utf8_name
from placer.run.resumable import partial_path
from placer.run.worker import ALONE, Worker, together
from placer.trace.capture import RouterCapture, to_host
from placer.trace.chunk import Chunk, expert_dtype
from placer.trace.corpus import (
    STANDARD_INPUT,
    Corpus,
    Document,
    Encode,
    token_sequences,
    tokenized,
)
from placer.trace.generate import DecodedBatch, Decoding, decode_batch
from placer.trace.header import TraceHeader
from placer.trace.loading import (
    DTYPES,
    Dtype,
    load_model,
    require_embedded,
    weights_sample_sha256,
)
from placer.trace.parts import assemble, part_of
from placer.trace.writer import TraceWriter
from placer.version import __version__

Progress = Callable[[int], None]
_PREFILL, _DECODE = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions:
    """How to run the model.

    Attributes
    ----------
    sequence_length
        Most tokens of a sequence.
    batch_size
        Sequences of one forward pass.
    max_tokens
        Most tokens per corpus, or ``None`` for all.
    chunk_tokens
        About how many tokens a chunk file holds; a killed recording loses at most these.
    with_weights
        Keep the router weights too.
    dtype
        Of the model's weights; ``auto`` takes the checkpoint's own.
    device
        Where to run it, as torch names devices.
    generate
        Most tokens to generate after each sequence, recorded as phase decode.
    temperature
        0 generates the most likely token; above it tokens are drawn.
    device_map
        How to spread a model over devices, as accelerate names it; or ``None``.
    seed
        Order in which documents are drawn when ``max_tokens`` cuts, and what is drawn
        when tokens are generated.
    """

    sequence_length: int = 256
    batch_size: int = 16
    max_tokens: int | None = None
    chunk_tokens: int = 65_536
    with_weights: bool = True
    dtype: Dtype = "auto"
    device: str = "cpu"
    generate: int = 0
    temperature: float = 0.0
    device_map: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for option, number, least in (
            ("--sequence-length", self.sequence_length, 2),
            ("--batch-size", self.batch_size, 1),
            ("--chunk-tokens", self.chunk_tokens, 1),
            ("--max-tokens", self.max_tokens, 2),
        ):
            if number is not None and number < least:
                raise UsageError(
                    f"{option} must be at least {least}, got {number}",
                    "leave it out for its default",
                )
        if self.generate < 0 or self.temperature < 0:
            raise UsageError(
                f"--generate {self.generate} and --temperature {self.temperature} must not "
                "be negative"
            )
        if self.seed < 0 or not math.isfinite(self.temperature):
            raise UsageError(
                f"--seed {self.seed} must not be negative, nor --temperature "
                f"{self.temperature} infinite"
            )
        if self.temperature and not self.generate:
            raise UsageError(
                f"--temperature {self.temperature} is for generated tokens, but "
                "--generate is 0",
                "for example --generate 128",
            )
        one_of("--dtype", self.dtype, DTYPES)


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One sequence to run: its domain and token ids."""

    domain: int
    ids: list[int]


def record(
    directory: Path,
    corpora: Sequence[Corpus],
    out: Path,
    options: RecordOptions,
    progress: Progress | None = None,
    worker: Worker = ALONE,
) -> TraceHeader:
    """Record a trace; after a kill, continue after the finished chunks.

    Under torchrun every worker runs the model over its share of the chunks; the trace is
    the same.

    Parameters
    ----------
    directory
        A Hugging Face model directory with its tokenizer.
    corpora
        The text, one domain each.
    out
        The trace directory to write; until it is complete, ``OUT.placer-partial``.
    options
        How to run the model.
    progress
        Called with the number of tokens recorded so far, after every chunk.
    worker
        Which of several processes this is (``Worker.of_environment``).

    Returns
    -------
    TraceHeader
        The header of the finished trace.

    Raises
    ------
    PlacerError
        If the model cannot be loaded or is of no known family, a corpus holds no text,
        ``out`` exists, or an unfinished recording there had other options.
    """
    if not worker.alone:
        _require_files(corpora)
    spec = ModelSpec.from_checkpoint(directory)
    _architecture(directory).require_recorded(directory)
    domains = tuple(corpus.domain for corpus in corpora)
    provenance = _provenance(directory, corpora, options)
    part = part_of(worker, out)
    with together(worker):
        # Alone, the part is the trace: what --force replaces is not gone on with.
        if not worker.alone and part.exists():
            num_chunks = _chunks_of_part(part, provenance)
        else:
            with TraceWriter(
                directory=part,
                model=spec,
                domains=domains,
                provenance=provenance,
                resumable=True,
            ) as writer:
                if options.device == "cuda" and not worker.alone:
                    worker.use_own_gpu()
                local = replace(options, device=worker.device(options.device))
                runner = _Runner(directory, spec, local)
                _record_chunks(writer, runner, corpora, worker, progress)
                num_chunks = writer.num_chunks
                if num_chunks or worker.index == 0:
                    writer.finish()
        if not worker.alone:
            assemble(out, worker, num_chunks)
    return TraceHeader.read(out)


def _require_files(corpora: Sequence[Corpus]) -> None:
    if any(corpus.path == STANDARD_INPUT for corpus in corpora):
        raise UsageError(
            "several workers cannot share standard input", "give a file: --corpus FILE"
        )


def _chunks_of_part(part: Path, provenance: Mapping[str, Any]) -> int:
    """Return how many chunks a part has that an earlier run finished."""
    found = TraceHeader.read(part)
    if canonical_json(found.provenance) != canonical_json(provenance):
        raise PlacerError(
            f"{part} was recorded with another model, corpus or options",
            "use the same ones to continue; to start again, move it away",
        )
    return len(found.chunks)


def _record_chunks(
    writer: TraceWriter,
    runner: "_Runner",
    corpora: Sequence[Corpus],
    worker: Worker,
    progress: Progress | None,
) -> None:
    """Record the worker's chunks that are not yet written."""
    options = runner.options
    sequences = _sequences(corpora, runner.encode, options)
    skipped, first_sequence = writer.num_chunks, 0
    recorded = _Recorded(progress)
    recorded.keep(writer.num_tokens)
    with runner.capture:
        for number, group in enumerate(_chunks_of(sequences, options.chunk_tokens)):
            if worker.takes(number):
                if skipped:
                    skipped -= 1
                else:
                    writer.append(runner.run(group, first_sequence, recorded))
                    recorded.keep(writer.num_tokens)
            first_sequence += len(group)
    if skipped:
        raise PlacerError(
            f"{partial_path(writer.directory)} holds {skipped} more chunks than the text",
            "move it away to start again",
        )


@dataclass(slots=True)
class _Recorded:
    """How many tokens were recorded; tells it before each batch and after each chunk."""

    progress: Progress | None
    num_kept: int = 0
    num_new: int = 0

    def batch(self, num_tokens: int) -> None:
        """Tell that a batch begins; it has ``num_tokens`` when it is done."""
        if self.progress is not None and self.num_new:
            self.progress(self.num_kept + self.num_new)
        self.num_new += num_tokens

    def keep(self, num_tokens: int) -> None:
        """Tell that this many are in finished files."""
        self.num_kept, self.num_new = num_tokens, 0
        if self.progress is not None:
            self.progress(num_tokens)


class _Runner:
    """A loaded model with hooks on its routers."""

    def __init__(self, directory: Path, spec: ModelSpec, options: RecordOptions) -> None:
        self.directory = directory
        self.spec = spec
        self.options = options
        self.model, self.tokenizer = load_model(
            directory,
            dtype=options.dtype,
            device=options.device,
            device_map=options.device_map,
        )
        self.capture = RouterCapture(self.model, _architecture(directory), spec)

    def encode(self, document: Document) -> list[int]:
        ids = tokenized(self.tokenizer, document)
        require_embedded(ids, self.model, self.directory)
        return ids

    def run(
        self, group: Sequence[_Sequence], first_sequence: int, recorded: _Recorded
    ) -> Chunk:
        """Run the sequences of one chunk, ``batch_size`` at a time."""
        size = self.options.batch_size
        if self.options.generate:
            return self._generate(group, first_sequence, recorded)
        parts = []
        for start in range(0, len(group), size):
            batch = group[start : start + size]
            recorded.batch(sum(len(one.ids) for one in batch))
            parts.append(self._run_batch(batch, first_sequence + start))
        return Chunk.concatenate(parts)

    def _run_batch(self, batch: Sequence[_Sequence], first_sequence: int) -> Chunk:
        import torch

        lengths = np.asarray([len(one.ids) for one in batch])
        # Padding is on the right and is masked, so it changes no real token.
        width = int(lengths.max())
        ids = np.zeros((len(batch), width), dtype=np.int64)
        real = np.arange(width) < lengths[:, None]
        ids[real] = np.concatenate([one.ids for one in batch])
        device = self.model.device
        with torch.inference_mode():
            # The base model has all the routers, and no output head to compute.
            self.model.base_model(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(real.astype(np.int64)).to(device),
                use_cache=False,
            )
        kept = torch.from_numpy(real.ravel())
        experts, weights = [], []
        for layer, (chosen, weight) in enumerate(to_host(self.capture.take())):
            dtype = expert_dtype(self.spec.num_experts[layer])
            experts.append(chosen[kept].numpy().astype(dtype))
            weights.append(weight[kept].numpy())
        return Chunk(
            experts=tuple(experts),
            weights=tuple(weights) if self.options.with_weights else None,
            token_ids=ids[real].astype(np.int32),
            sequence_ids=np.repeat(
                np.arange(first_sequence, first_sequence + len(batch), dtype=np.int32),
                lengths,
            ),
            positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
            domain_ids=np.repeat(
                np.asarray([one.domain for one in batch], dtype=np.uint8), lengths
            ),
            phase=np.full(int(lengths.sum()), _PREFILL, dtype=np.uint8),
        )

    def _generate(
        self, group: Sequence[_Sequence], first_sequence: int, recorded: _Recorded
    ) -> Chunk:
        """Run the sequences of one chunk as prompts, and generate after them."""
        parts: dict[int, Chunk] = {}
        for places in _of_equal_length(group, self.options.batch_size):
            numbers = [first_sequence + place for place in places]
            lengths = (len(group[place].ids) for place in places)
            recorded.batch(sum(lengths) + len(places) * self.options.generate)
            batch = decode_batch(
                self.model,
                self.capture,
                np.asarray([group[place].ids for place in places], dtype=np.int64),
                Decoding(
                    num_tokens=self.options.generate,
                    temperature=self.options.temperature,
                    end_ids=_end_ids(self.model),
                ),
                [_draw_seed(self.options.seed, number) for number in numbers],
            )
            for row, (place, number) in enumerate(zip(places, numbers, strict=True)):
                parts[place] = self._decoded(batch, row, group[place], number, numbers[0])
        return Chunk.concatenate([parts[place] for place in range(len(group))])

    def _decoded(
        self, batch: DecodedBatch, row: int, prompt: _Sequence, number: int, first: int
    ) -> Chunk:
        """Return one row of a batch as a chunk; ``first`` is the batch's first sequence."""
        length, prompt_length = int(batch.lengths[row]), len(prompt.ids)
        positions = np.arange(length, dtype=np.int32)
        step = np.maximum(positions - prompt_length + 1, 0)
        weights = tuple(one[row, :length] for one in batch.weights)
        return Chunk(
            experts=tuple(
                ids[row, :length].astype(expert_dtype(size))
                for ids, size in zip(batch.experts, self.spec.num_experts, strict=True)
            ),
            weights=weights if self.options.with_weights else None,
            token_ids=batch.token_ids[row, :length].astype(np.int32),
            sequence_ids=np.full(length, number, dtype=np.int32),
            positions=positions,
            domain_ids=np.full(length, prompt.domain, dtype=np.uint8),
            phase=np.where(positions < prompt_length, _PREFILL, _DECODE).astype(np.uint8),
            step_ids=_step_ids(first, self.options.generate, step),
        )


def _step_ids(
    first: int, num_generated: int, step: npt.NDArray[np.integer]
) -> npt.NDArray[np.int32]:
    """Return the numbers of the passes ``step`` [T] of the batch that begins at ``first``.

    A batch has at most one pass per generated token, and one for the prompts.

    Raises
    ------
    PlacerError
        If the number is beyond int32, the format's dtype.
    """
    passes = num_generated + 1
    if (first + 1) * passes > 2**31:
        raise PlacerError(
            f"forward passes of sequence {first} with --generate {num_generated} need "
            "numbers above int32",
            "record in parts, and join them: placer trace merge TRACE... --out TRACE",
        )
    return (np.int64(first * passes) + step).astype(np.int32)


def _draw_seed(seed: int, sequence: int) -> int:
    """Return the seed of what one sequence draws, whenever it is run."""
    return int(np.random.SeedSequence([seed, sequence]).generate_state(1)[0])


def _of_equal_length(group: Sequence[_Sequence], size: int) -> Iterator[list[int]]:
    """Yield places in ``group``, at most ``size`` at a time, of sequences as long."""
    by_length: dict[int, list[int]] = {}
    for place, one in enumerate(group):
        by_length.setdefault(len(one.ids), []).append(place)
    for places in by_length.values():
        for start in range(0, len(places), size):
            yield places[start : start + size]


def _end_ids(model: Any) -> frozenset[int]:
    """Return the token ids that end a generated sequence."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])


def _architecture(directory: Path) -> Architecture:
    return Architecture.of(read_config(directory), directory)


def _sequences(
    corpora: Sequence[Corpus], encode: Encode, options: RecordOptions
) -> Iterator[_Sequence]:
    for domain, corpus in enumerate(corpora):
        sequences = token_sequences(
            corpus,
            encode,
            sequence_length=options.sequence_length,
            max_tokens=options.max_tokens,
            seed=options.seed,
        )
        first = next(sequences, None)
        if first is None:
            raise PlacerError(
                f"corpus {corpus.path} holds no readable text",
                "give UTF-8 text of at least two tokens",
            )
        for ids in itertools.chain([first], sequences):
            yield _Sequence(domain, ids)


def _chunks_of(
    sequences: Iterator[_Sequence], chunk_tokens: int
) -> Iterator[list[_Sequence]]:
    """Group whole sequences into chunks, the same way however often it is started."""
    group: list[_Sequence] = []
    num_tokens = 0
    for sequence in sequences:
        group.append(sequence)
        num_tokens += len(sequence.ids)
        if num_tokens >= chunk_tokens:
            yield group
            group, num_tokens = [], 0
    if group:
        yield group


def _provenance(
    directory: Path, corpora: Sequence[Corpus], options: RecordOptions
) -> dict[str, Any]:
    return {
        "placer": __version__,
        "source": "record",
        "corpora": [
            {
                "domain": corpus.domain,
                "name": utf8_name(corpus.path.name),
                "sha256": corpus.sha256(),
            }
            for corpus in corpora
        ],
        "weights_sample_sha256": weights_sample_sha256(directory),
        "tokenizer_sha256": tokenizer_of(directory),
        "sequence_length": options.sequence_length,
        "batch_size": options.batch_size,
        "chunk_tokens": options.chunk_tokens,
        "max_tokens": options.max_tokens,
        "dtype": options.dtype,
        "with_weights": options.with_weights,
        "seed": options.seed,
    } | (
        {"generate": options.generate, "temperature": options.temperature}
        if options.generate
        else {}
    )
