"""Large synthetic inputs, written piece by piece, and what commands take of a machine."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from placer.model import ModelSpec
from placer.trace import Chunk, TraceWriter

CHUNK_TOKENS = 65_536
SEQUENCE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What a process took: CPU seconds of user and system, peak memory in MiB."""

    cpu_s: float
    peak_mib: float
    wall_s: float


def measured(*words: object) -> Used:
    """Run a command of placer that must succeed, in a process of its own."""
    began = time.perf_counter()
    line = [sys.executable, "-m", "placer.cli.main", *map(str, words)]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        said = child.stderr.read().decode()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, said
    return Used(
        cpu_s=used.ru_utime + used.ru_stime,
        peak_mib=used.ru_maxrss / 1024,
        wall_s=time.perf_counter() - began,
    )


def tell(name: str, **facts: object) -> None:
    """Print a line of figures, and keep it where PLACER_FIGURES says."""
    line = json.dumps({"what": name, **facts})
    sys.stdout.write(line + "\n")
    if path := os.environ.get("PLACER_FIGURES"):
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def tokens(
    num_experts: tuple[int, ...], top_k: int, num_tokens: int, vocab_size: int = 0
) -> Iterator[Chunk]:
    """Yield chunks of tokens with ``top_k`` distinct experts: an arithmetic progression.

    Drawing without replacement would take longer than what is measured.
    """
    rng = np.random.default_rng(0)
    sequence = 0
    for start in range(0, num_tokens, CHUNK_TOKENS):
        size = min(CHUNK_TOKENS, num_tokens - start)
        topic = np.repeat(rng.integers(0, 8, size // SEQUENCE + 1), SEQUENCE)[:size]
        experts = []
        for layer, number in enumerate(num_experts):
            # Half of the tokens of a topic start near its place, so there is what to place.
            near = (topic * 37 + layer * 11 + rng.integers(0, 16, size)) % number
            first = np.where(rng.random(size) < 0.5, near, rng.integers(0, number, size))
            step = 1 + 2 * rng.integers(0, 8, size)
            ids = (first[:, None] + step[:, None] * np.arange(top_k)) % number
            experts.append(ids.astype(np.uint8 if number <= 256 else np.int16))
        within = np.arange(size)
        yield Chunk(
            experts=tuple(experts),
            token_ids=rng.integers(0, vocab_size, size, np.int32) if vocab_size else None,
            sequence_ids=(sequence + within // SEQUENCE).astype(np.int32),
            positions=(within % SEQUENCE).astype(np.int32),
        )
        sequence += -(-size // SEQUENCE)


def write_trace(
    directory: Path,
    num_experts: tuple[int, ...],
    top_k: int,
    num_tokens: int,
    vocab_size: int = 0,
) -> Path:
    """Write a trace of that many tokens; memory holds one chunk at a time."""
    model = ModelSpec(num_experts=num_experts, top_k=top_k, vocab_size=vocab_size or None)
    with TraceWriter(directory=directory, model=model) as writer:
        for chunk in tokens(num_experts, top_k, num_tokens, vocab_size):
            writer.append(chunk)
        writer.finish()
    return directory
