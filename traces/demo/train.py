"""Train the demo model from nothing: tokenizer, model and held-out losses.

    python traces/demo/train.py --out build/demo-training

A Qwen3-MoE of 7.2 million parameters (8 MoE layers, 32 experts, top 4) learns the
standard library's sources, docstrings and language reference (``placer.demo.text``).
About an hour on 2 cores. Checkpoints are ordinary Hugging Face directories; the traces
that ship beside the model are then made by ``make demo-traces``.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from placer.demo.text import (
    DOMAINS,
    documents,
)

VOCABULARY_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
SEQUENCE_LENGTH = 256
BATCH_SIZE = 16
NUM_STEPS = 4000
NUM_WARMUP_STEPS = 100
PEAK_LEARNING_RATE = 2e-3
EARLIER_CHECKPOINTS = (200, 800, 2000)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text is representable, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=1024,
    )


def build_model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=64,
        num_experts=32,
        num_experts_per_tok=4,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        router_aux_loss_coef=0.005,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    config._experts_implementation = "grouped_mm"
    return Qwen3MoeForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one stream of ids, each ended by the end-of-text token."""
    stream: list[int] = []
    for text in texts:
        stream.extend(tokenizer(text, verbose=False)["input_ids"])
        stream.append(tokenizer.eos_token_id)
    return np.asarray(stream, dtype=np.int64)


def batches(stream: np.ndarray, num_steps: int, seed: int):
    """Windows of the stream in a random order, drawn anew (and shifted) every epoch."""
    rng = np.random.default_rng(seed)
    window = SEQUENCE_LENGTH + 1
    queue: list[int] = []
    for _ in range(num_steps):
        if len(queue) < BATCH_SIZE:
            starts = np.arange(rng.integers(window), len(stream) - window, window)
            queue = rng.permutation(starts).tolist()
        chosen = [queue.pop() for _ in range(BATCH_SIZE)]
        yield torch.from_numpy(np.stack([stream[s : s + window] for s in chosen]))


def learning_rate(step: int) -> float:
    if step < NUM_WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / NUM_WARMUP_STEPS
    progress = (step - NUM_WARMUP_STEPS) / (NUM_STEPS - NUM_WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def heldout_loss(model: Qwen3MoeForCausalLM, stream: np.ndarray) -> float:
    """Mean next-token cross-entropy in nats over windows of the stream."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(stream) - 1, SEQUENCE_LENGTH):
        window = torch.from_numpy(stream[start : start + SEQUENCE_LENGTH + 1])[None]
        logits = model(input_ids=window[:, :-1]).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum")
        total, count = total + float(loss), count + window.shape[1] - 1
    model.train()
    return total / count


def unigram_cross_entropy(train: np.ndarray, stream: np.ndarray) -> float:
    """Nats per token of a model that knows token frequencies only (add-one smoothed)."""
    counts = np.bincount(train, minlength=VOCABULARY_SIZE) + 1.0
    return float(-np.log(counts / counts.sum())[stream].mean())


def save(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    """Write an ordinary bfloat16 Hugging Face directory without touching ``model``."""
    copy = Qwen3MoeForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)


def report(checkpoint: Path, train: np.ndarray, streams: dict[str, np.ndarray]) -> dict:
    """Held-out loss per domain of the checkpoint as written, beside unigram entropy."""
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return {
        domain: {
            "heldout_tokens": len(stream),
            "heldout_loss_nats": round(heldout_loss(model, stream), 4),
            "unigram_cross_entropy_nats": round(unigram_cross_entropy(train, stream), 4),
        }
        for domain, stream in streams.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)

    texts = {split: documents(split) for split in ("train", "heldout")}
    tokenizer = train_tokenizer([one.text for one in texts["train"]])
    train = encode(tokenizer, [one.text for one in texts["train"]])
    heldout = {
        domain: encode(tokenizer, [d.text for d in texts["heldout"] if d.domain == domain])
        for domain in DOMAINS
    }
    print({name: len(stream) for name, stream in heldout.items()}, len(train), flush=True)

    model = build_model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    start = time.monotonic()
    for step, window in enumerate(batches(train, NUM_STEPS, args.seed), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        output = model(input_ids=window[:, :-1], labels=None, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1), window[:, 1:].flatten()
        )
        (loss + model.config.router_aux_loss_coef * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == 1:
            elapsed = time.monotonic() - start
            print(f"step {step} loss {loss.item():.3f} after {elapsed:.0f} s", flush=True)
        if step in EARLIER_CHECKPOINTS:
            save(model, tokenizer, args.out / f"step-{step:05d}")
            losses = {
                domain: heldout_loss(model, stream) for domain, stream in heldout.items()
            }
            print(f"step {step} held out {losses}", flush=True)
    save(model, tokenizer, args.out / "model")

    summary = {
        "num_steps": NUM_STEPS,
        "tokens_seen": NUM_STEPS * BATCH_SIZE * SEQUENCE_LENGTH,
        "train_tokens": len(train),
        "seconds": round(time.monotonic() - start),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": args.seed,
        "domains": report(args.out / "model", train, heldout),
    }
    (args.out / "model" / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
