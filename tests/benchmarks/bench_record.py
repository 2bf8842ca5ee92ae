"""What recording costs beside the same forward passes without it."""

import statistics
import time
from pathlib import Path

import numpy as np
import torch

from placer.demo.road import shipped_model
from placer.demo.text import documents
from placer.model import Architecture, ModelSpec
from placer.run.documents import read_json
from placer.trace.capture import RouterCapture
from placer.trace.loading import load_model

PAIRS = 15
BATCH, LENGTH = 16, 256


def forward(
    model: torch.nn.Module, batch: torch.Tensor, capture: RouterCapture | None
) -> float:
    began = time.perf_counter()
    with torch.inference_mode():
        model.base_model(
            input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False
        )
    if capture is not None:
        for output in capture.take():
            output.ids.numpy().astype(np.uint8)
            output.weights.to(torch.float16).numpy()
    return time.perf_counter() - began


def test_recording_overhead() -> None:
    directory: Path = shipped_model()
    model, tokenizer = load_model(directory, dtype="auto", device="cpu")
    spec = ModelSpec.from_checkpoint(directory)
    architecture = Architecture.of(
        read_json(directory / "config.json", "config"), directory
    )
    text = "".join(one.text for one in documents("heldout"))[:200_000]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: BATCH * LENGTH])
    batch = ids.view(BATCH, LENGTH)
    plain, recorded = [], []
    forward(model, batch, None)
    for _ in range(PAIRS):
        plain.append(forward(model, batch, None))
        with RouterCapture(model, architecture, spec) as capture:
            recorded.append(forward(model, batch, capture))
    ratios = [b / a for a, b in zip(plain, recorded, strict=True)]
    print(
        f"\nrecording, demo model, {BATCH} x {LENGTH} tokens, {PAIRS} pairs: "
        f"median ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}), "
        f"{batch.numel() / statistics.median(recorded):,.0f} tokens/s"
    )
