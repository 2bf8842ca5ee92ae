"""Counting speed: all counts of ``placer affinity`` beside a bare loop of bincount."""

import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from placer.affinity import count_affinity
from placer.affinity.count import count_pairs
from placer.affinity.sums import Rows
from placer.model import ModelSpec
from placer.trace import Chunk, Trace, TraceWriter

TOKENS, LAYERS, TOP_K, EXPERTS = 65_536, 26, 6, 64
VOCABULARY = 150_000
ROUNDS = 5
LARGE_CHUNKS = (38, 77, 153)  # the last is 10 million tokens
MODEL = ModelSpec(num_experts=(EXPERTS,) * LAYERS, top_k=TOP_K)


def chunk(seed: int) -> Chunk:
    rng = np.random.default_rng(seed)
    return Chunk(
        experts=tuple(
            rng.permuted(np.tile(np.arange(EXPERTS, dtype=np.uint8), (TOKENS, 1)), axis=1)[
                :, :TOP_K
            ].copy()
            for _ in range(LAYERS)
        ),
        sequence_ids=np.repeat(np.arange(TOKENS // 256), 256).astype(np.int32),
        positions=np.tile(np.arange(256), TOKENS // 256).astype(np.int32),
        # Words of a text: a few are frequent, most are rare (Zipf's law).
        token_ids=(rng.zipf(1.2, TOKENS) % VOCABULARY).astype(np.int32),
    )


def plain_transitions(tokens: Chunk) -> list[np.ndarray]:
    """The yardstick: nothing but one bincount per pair of columns."""
    found = []
    for first, second in zip(tokens.experts, tokens.experts[1:], strict=False):
        counts = np.zeros(EXPERTS * EXPERTS, np.int64)
        for a in range(TOP_K):
            for b in range(TOP_K):
                keys = first[:, a].astype(np.intp) * EXPERTS + second[:, b]
                counts += np.bincount(keys, minlength=EXPERTS * EXPERTS)
        found.append(counts)
    return found


def test_counting_speed() -> None:
    tokens = chunk(0)
    ratios: dict[str, list[float]] = {"transitions": [], "pairs": [], "rows": []}
    for _ in range(ROUNDS):
        began = time.perf_counter()
        expected = plain_transitions(tokens)
        bare = time.perf_counter() - began
        began = time.perf_counter()
        for one, other in itertools.pairwise(tokens.experts):
            count_pairs(one, other, EXPERTS, EXPERTS)
        ratios["transitions"].append(bare / (time.perf_counter() - began))
        began = time.perf_counter()
        counted = count_affinity([tokens], MODEL, {})
        ratios["pairs"].append(bare / (time.perf_counter() - began))
        began = time.perf_counter()
        count_affinity([tokens], MODEL, {}, rows="tokens")
        ratios["rows"].append(bare / (time.perf_counter() - began))
    for one, other in zip(counted.transition, expected, strict=True):
        assert (one.ravel() == other).all()
    speed = {name: statistics.median(values) for name, values in ratios.items()}
    print(
        f"\n{TOKENS:,} tokens x {LAYERS} layers x top {TOP_K} of {EXPERTS}, one core, "
        "times as fast as a bare bincount loop over the transitions: "
        f"transitions {speed['transitions']:.2f}, load and co-activation too "
        f"{speed['pairs']:.2f}, experts per token id too {speed['rows']:.2f}"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("rows", ["none", "tokens"])
def test_counting_on_a_gpu(rows: Rows) -> None:
    tokens = chunk(0)
    took: dict[str, list[float]] = {"cpu": [], "cuda": []}
    for _ in range(ROUNDS + 1):
        for device, seconds in took.items():
            began = time.perf_counter()
            count_affinity([tokens] * 8, MODEL, {}, rows=rows, device=device)
            seconds.append(time.perf_counter() - began)
    # The first round loads kernels.
    speed = {name: 8 * TOKENS / statistics.median(one[1:]) for name, one in took.items()}
    print(
        f"\nrows {rows}: {speed['cpu']:,.0f} tokens/s on one core, {speed['cuda']:,.0f} on "
        f"{torch.cuda.get_device_name()}"
    )


def large_traces(directory: Path) -> list[Path]:
    """Write traces of the same few chunks over and over, with sequences of their own."""
    few = [chunk(seed) for seed in range(4)]
    written = []
    for number in LARGE_CHUNKS:
        path = directory / f"chunks-{number}"
        with TraceWriter(directory=path, model=MODEL) as writer:
            for n in range(number):
                one = few[n % len(few)]
                sequences = one.sequence_ids + np.int32(n * TOKENS // 256)
                writer.append(
                    Chunk(
                        experts=one.experts,
                        sequence_ids=sequences,
                        positions=one.positions,
                        token_ids=one.token_ids,
                    )
                )
            writer.finish()
        written.append(path)
    return written


def run(trace: Path, workers: int) -> tuple[float, float]:
    """Return the seconds of ``placer affinity``, and GiB of its largest process."""
    out = trace.with_suffix(".safetensors")
    out.unlink(missing_ok=True)
    code = (
        "import resource, sys; from placer.cli.main import app\n"
        "try: app()\n"
        "finally:\n"
        "    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)\n"
        "    peak = max(resource.getrusage(one).ru_maxrss for one in who)\n"
        "    print('peak', peak, file=sys.stderr)"
    )
    options = ["--out", str(out), "--workers", str(workers), "--json"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "affinity", str(trace), *options],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - began
    return seconds, int(done.stderr.split("peak ")[1]) / 2**20


def test_large_traces(tmp_path: Path) -> None:
    traces = large_traces(tmp_path)
    tokens = next(iter(Trace(traces[0]).chunks(stop=1)))
    bare = []
    print()
    for path in traces:
        num_tokens = Trace(path).header.num_tokens
        for workers in (1, 2):
            if workers > (os.cpu_count() or 1):
                continue
            runs = []
            for _ in range(3):
                began = time.perf_counter()
                plain_transitions(tokens)
                bare.append(time.perf_counter() - began)
                runs.append(run(path, workers))
            seconds = statistics.median(one for one, _ in runs)
            of_bare = statistics.median(bare) / TOKENS * num_tokens / seconds / workers
            print(
                f"{num_tokens:,} tokens, {workers} processes: {seconds:.1f} s, "
                f"{num_tokens / seconds:,.0f} tokens/s, {of_bare:.2f} of a bare bincount "
                f"loop per core, at most {max(peak for _, peak in runs):.2f} GiB"
            )
