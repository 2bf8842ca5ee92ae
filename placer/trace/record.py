"""Recording: run a transformers model over text and keep what its routers choose."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from placer import __version__
from placer.errors import PlacerError, UsageError
from placer.files import partial_path, read_json, require_absent, sha256_file
from placer.model import Architecture, ModelSpec
from placer.trace.capture import RouterCapture
from placer.trace.chunk import Chunk, expert_dtype
from placer.trace.corpus import Corpus, Document, Encode, token_sequences
from placer.trace.header import TraceHeader
from placer.trace.writer import TraceWriter

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Progress = Callable[[int], None]
_PREFILL = 0


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
    seed
        Order in which documents are drawn when ``max_tokens`` cuts.
    """

    sequence_length: int = 256
    batch_size: int = 16
    max_tokens: int | None = None
    chunk_tokens: int = 65_536
    with_weights: bool = True
    dtype: Dtype = "auto"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_size", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise UsageError(f"max_tokens must be at least 2, got {self.max_tokens}")
        if self.sequence_length < 2:
            raise UsageError(
                f"sequence_length must be at least 2, got {self.sequence_length}"
            )
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UsageError(
                f"dtype {self.dtype} is not known",
                "choose auto, float32, bfloat16 or float16",
            )


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
) -> TraceHeader:
    """Record a trace; started again after a kill, go on after the finished chunks.

    Parameters
    ----------
    directory
        A Hugging Face model directory with its tokenizer.
    corpora
        The text, one domain each.
    out
        The trace directory to write; until it is complete, ``OUT.partial``.
    options
        How to run the model.
    progress
        Told the number of tokens recorded so far, after every chunk.

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
    require_absent(out)
    spec = ModelSpec.from_checkpoint(directory)
    provenance = _provenance(directory, corpora, options)
    with TraceWriter(
        directory=out,
        model=spec,
        domains=tuple(corpus.domain for corpus in corpora),
        provenance=provenance,
        resumable=True,
    ) as writer:
        runner = _Runner(directory, spec, options)
        sequences = _sequences(corpora, runner.encode, options)
        done = writer.num_sequences
        for skipped in range(done):
            if next(sequences, None) is None:
                raise PlacerError(
                    f"{partial_path(out)} holds {done} sequences, "
                    f"but the text has only {skipped}",
                    f"start anew: rm -r {partial_path(out)}",
                )
        if progress is not None:
            progress(writer.num_tokens)
        with runner.capture:
            for group in _chunks_of(sequences, options.chunk_tokens):
                writer.append(runner.run(group, first_sequence=done))
                done += len(group)
                if progress is not None:
                    progress(writer.num_tokens)
        writer.finish()
    return TraceHeader.read(out)


class _Runner:
    """A loaded model with hooks on its routers."""

    def __init__(self, directory: Path, spec: ModelSpec, options: RecordOptions) -> None:
        self.spec = spec
        self.options = options
        self.model, self.tokenizer = load_model(
            directory, dtype=options.dtype, device=options.device
        )
        architecture = Architecture.of(
            read_json(directory / "config.json", "config"), directory
        )
        self.capture = RouterCapture(self.model, architecture, spec)

    def encode(self, document: Document) -> list[int]:
        if isinstance(document, str):
            return list(self.tokenizer(document, verbose=False)["input_ids"])
        try:
            text = self.tokenizer.apply_chat_template(document, tokenize=False)
        except Exception as error:  # templates are programs, and raise what they like
            raise PlacerError(
                f"the tokenizer cannot apply a chat template: {error}",
                "give plain text in a field of its own: --field NAME",
            ) from error
        # The template has put the special tokens where they belong.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def run(self, group: Sequence[_Sequence], first_sequence: int) -> Chunk:
        """Run the sequences of one chunk, ``batch_size`` at a time."""
        size = self.options.batch_size
        parts = [
            self._run_batch(group[start : start + size], first_sequence + start)
            for start in range(0, len(group), size)
        ]
        return Chunk.concatenate(parts)

    def _run_batch(self, batch: Sequence[_Sequence], first_sequence: int) -> Chunk:
        import torch

        lengths = np.asarray([len(one.ids) for one in batch])
        # Padding stands on the right and is masked, so it changes no real token.
        width = int(lengths.max())
        ids = np.zeros((len(batch), width), dtype=np.int64)
        real = np.arange(width) < lengths[:, None]
        ids[real] = np.concatenate([one.ids for one in batch])
        device = self.options.device
        with torch.inference_mode():
            # The base model has all the routers, and no output head to compute.
            self.model.base_model(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(real.astype(np.int64)).to(device),
                use_cache=False,
            )
        kept = torch.from_numpy(real.ravel()).to(device)
        experts, weights = [], []
        for layer, output in enumerate(self.capture.take()):
            dtype = expert_dtype(self.spec.num_experts[layer])
            experts.append(output.ids[kept].cpu().numpy().astype(dtype))
            weights.append(output.weights[kept].to(torch.float16).cpu().numpy())
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


def load_model(directory: Path, *, dtype: Dtype, device: str) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer with transformers.

    Raises
    ------
    PlacerError
        If transformers is not installed or cannot load the directory.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise PlacerError(
            "running a model needs transformers, which is not installed",
            "pip install 'placer[record]'",
        ) from error
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # placer has its own
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise PlacerError(
            f"transformers cannot load {directory}: {reason[0] if reason else error!r}",
            f"check the directory: placer inspect {directory}",
        ) from error
    loaded: Any = model
    return loaded.to(device).eval(), tokenizer


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
    tokenizer = directory / "tokenizer.json"
    return {
        "placer": __version__,
        "source": "record",
        "corpora": [
            {"domain": corpus.domain, "name": corpus.path.name, "sha256": corpus.sha256()}
            for corpus in corpora
        ],
        "tokenizer_sha256": sha256_file(tokenizer) if tokenizer.is_file() else None,
        "sequence_length": options.sequence_length,
        "batch_size": options.batch_size,
        "chunk_tokens": options.chunk_tokens,
        "max_tokens": options.max_tokens,
        "dtype": options.dtype,
        "with_weights": options.with_weights,
        "seed": options.seed,
    }
