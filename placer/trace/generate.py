"""Generating from prompts while routers are captured: the decode phase of a trace."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from placer.arrays import AnyArray, IntArray
from placer.trace.capture import RouterCapture, to_host

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How to choose the next token.

    Attributes
    ----------
    num_tokens
        Most tokens to generate after each prompt.
    temperature
        0 takes the most likely token; above it tokens are drawn.
    end_ids
        Tokens that end a sequence; they are neither routed nor recorded.
    """

    num_tokens: int
    temperature: float
    end_ids: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodedBatch:
    """Prompts of equal length P and what was generated after them.

    Attributes
    ----------
    token_ids
        ``[B, P + N]`` int64.
    lengths
        ``[B]`` int64: tokens of each row that count; those after its end do not.
    experts, weights
        L arrays ``[B, P + N, k]``: the routers' choices.
    """

    token_ids: IntArray
    lengths: IntArray
    experts: tuple[AnyArray, ...]
    weights: tuple[AnyArray, ...]


def decode_batch(
    model: Any,
    capture: RouterCapture,
    prompts: IntArray,
    decoding: Decoding,
    seeds: Sequence[int],
) -> DecodedBatch:
    """Run prompts ``[B, P]`` and decode one token of each at a time, with a KV cache.

    Prompts of equal length need no padding, so every row that is routed is real. Each row
    draws from its own ``seeds`` entry, whatever is in the rest of the batch.
    """
    import torch

    device = model.device
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    num_prompts, prompt_length = prompts.shape
    rows: list[list[tuple[Any, ...]]] = []
    tokens = [prompts]
    lengths = np.full(num_prompts, prompt_length)
    running = np.ones(num_prompts, dtype=np.bool_)
    step, past = torch.from_numpy(prompts).to(device), None
    with torch.inference_mode():
        for number in range(decoding.num_tokens + 1):
            output = model(input_ids=step, past_key_values=past, use_cache=True)
            past = output.past_key_values
            rows.append(_routed(capture, num_prompts))
            if number == decoding.num_tokens:
                break
            chosen = _next_tokens(output.logits[:, -1].float().cpu(), decoding, draws)
            running &= ~np.isin(chosen, list(decoding.end_ids))
            if not running.any():
                break
            lengths += running
            tokens.append(chosen[:, None])
            step = torch.from_numpy(tokens[-1]).to(device)
    layers = list(zip(*rows, strict=True))
    return DecodedBatch(
        token_ids=np.concatenate(tokens, axis=1),
        lengths=lengths,
        experts=tuple(np.concatenate([ids for ids, _ in one], axis=1) for one in layers),
        weights=tuple(np.concatenate([w for _, w in one], axis=1) for one in layers),
    )


def _routed(capture: RouterCapture, num_prompts: int) -> list[tuple[Any, ...]]:
    """Return ids and weights of every layer, each ``[B, tokens of this pass, k]``."""
    return [
        tuple(one.reshape(num_prompts, -1, one.shape[-1]).numpy() for one in pair)
        for pair in to_host(capture.take())
    ]


def _next_tokens(
    logits: "torch.Tensor", decoding: Decoding, draws: Sequence["torch.Generator"]
) -> IntArray:
    """Return ``[B]``: the most likely tokens, or tokens drawn at the temperature."""
    import torch

    if decoding.temperature == 0:
        chosen: IntArray = logits.argmax(dim=-1).numpy()
        return chosen
    probability = torch.softmax(logits / decoding.temperature, dim=-1)
    return np.array(
        [
            int(torch.multinomial(row, 1, generator=draw))
            for row, draw in zip(probability, draws, strict=True)
        ],
        dtype=np.int64,
    )
