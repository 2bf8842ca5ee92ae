"""Reading the routed experts that SGLang and vLLM return with their responses.

One JSON response per line, as the servers send them, asked for with
``return_routed_experts``. Row i is the token at position ``start + i``; the last token was
never run, so it has none. Both record logical ids, and zeros for dense layers.
"""

import base64
import binascii
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.errors import PlacerError
from placer.run.documents import parse_json, require_object
from placer.run.files import (
    open_regular,
    unreadable_reason,
)
from placer.trace.imported import (
    UNREADABLE,
    BoundModel,
    ImportedTokens,
)

Array = npt.NDArray[Any]
_NEEDS_MODEL = "name the model, which says how many layers a row has: --model DIR"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sequence:
    """One response: experts [N, L, k], its first position, prompt length and token ids."""

    experts: Array
    start: int
    prompt_tokens: int | None
    token_ids: list[int] | None

    def __post_init__(self) -> None:
        for value in (self.prompt_tokens, *(self.token_ids or ())):
            if value is not None and type(value) is not int:
                raise PlacerError(f"a count or id of tokens is {value!r}, no whole number")


def read_sglang_routed(file: Path, model: BoundModel | None) -> ImportedTokens:
    """Read responses of SGLang (0.5): base64 of raw int32 ``[N, hidden layers, k]``.

    The ids stand in ``meta_info.routed_experts`` (native) or ``sglext.routed_experts``
    (OpenAI). The bytes have no header, so the model has to be known.

    Raises
    ------
    PlacerError
        If no model is given, or a line holds no routed experts of its shape.
    """
    if model is None:
        raise PlacerError("SGLang's routed experts have no header", _NEEDS_MODEL)
    return _read(file, lambda response: _sglang_sequences(response, model))


def read_vllm_routed(file: Path, model: BoundModel | None) -> ImportedTokens:
    """Read responses of vLLM (0.33): base64 of ``.npy`` ``[N, hidden layers, k]``.

    The ids stand in ``choices[].routed_experts``; each choice becomes a sequence.

    Raises
    ------
    PlacerError
        If a line holds no routed experts.
    """
    return _read(file, _vllm_sequences)


def _read(
    file: Path, sequences_of: Callable[[Mapping[str, Any]], Iterator[_Sequence]]
) -> ImportedTokens:
    sequences: list[_Sequence] = []
    with open_regular(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                sequences += sequences_of(require_object(parse_json(line, "it"), "it"))
            except PlacerError as error:
                raise PlacerError(f"line {number}: {error}", error.hint) from error
            except UNREADABLE as error:
                raise PlacerError(
                    f"line {number} is no such response: {unreadable_reason(error)}"
                ) from error
    if not sequences:
        raise PlacerError("holds no response", "ask the server for return_routed_experts")
    shapes = {one.experts.shape[1:] for one in sequences}
    if len(shapes) > 1:
        raise PlacerError(f"responses have different layers or top-k: {sorted(shapes)}")
    return _joined(sequences)


def _joined(sequences: list[_Sequence]) -> ImportedTokens:
    lengths = [len(one.experts) for one in sequences]
    positions = np.concatenate(
        [one.start + np.arange(n) for one, n in zip(sequences, lengths, strict=True)]
    )
    prompts = [n for one in sequences if (n := one.prompt_tokens) is not None]
    has_phase = len(prompts) == len(sequences)
    has_ids = all(one.token_ids is not None for one in sequences)
    return ImportedTokens(
        experts=np.concatenate([one.experts for one in sequences]),
        sequence_ids=np.repeat(np.arange(len(sequences)), lengths),
        positions=positions,
        phase=(positions >= np.repeat(prompts, lengths)).astype(np.uint8)
        if has_phase
        else None,
        token_ids=np.concatenate([np.asarray(one.token_ids) for one in sequences])
        if has_ids
        else None,
    )


def _sglang_sequences(
    response: Mapping[str, Any], model: BoundModel
) -> Iterator[_Sequence]:
    meta = response.get("meta_info") or {}
    text = meta.get("routed_experts") or (response.get("sglext") or {}).get(
        "routed_experts"
    )
    raw = np.frombuffer(_decoded(text), dtype="<i4")
    num_layers = _num_recorded_layers(raw.size, model)
    prompt = meta.get("prompt_tokens") or (response.get("usage") or {}).get("prompt_tokens")
    ids = _token_ids(response.get("prompt_token_ids"), response.get("output_ids"))
    yield _sequence(raw.reshape(-1, num_layers, model.spec.top_k), prompt, ids)


def _vllm_sequences(response: Mapping[str, Any]) -> Iterator[_Sequence]:
    prompt = (response.get("usage") or {}).get("prompt_tokens")
    for choice in response["choices"]:
        content = io.BytesIO(_decoded(choice.get("routed_experts")))
        experts = np.load(content, allow_pickle=False)
        if experts.ndim != 3:
            raise PlacerError(f"routed_experts has shape {list(experts.shape)}")
        prompt_ids = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
        yield _sequence(experts, prompt, _token_ids(prompt_ids, choice.get("token_ids")))


def _sequence(experts: Array, prompt: int | None, ids: list[int] | None) -> _Sequence:
    """Build a sequence; with ids known, rows missing at its start were cached."""
    start = 0 if ids is None else len(ids) - 1 - len(experts)
    if start < 0:
        raise PlacerError(f"{len(experts)} rows of experts for {len(ids or ())} token ids")
    return _Sequence(
        experts=experts,
        start=start,
        prompt_tokens=prompt,
        token_ids=None if ids is None else ids[start : start + len(experts)],
    )


def _num_recorded_layers(num_ids: int, model: BoundModel) -> int:
    """Return how many layers a row has: all hidden layers of the model."""
    if num_ids % (model.num_hidden_layers * model.spec.top_k):
        raise PlacerError(
            f"{num_ids} ids are no whole rows of {model.num_hidden_layers} hidden layers x "
            f"top-{model.spec.top_k}",
            "check that --model is the model that was served",
        )
    return model.num_hidden_layers


def _decoded(text: Any) -> bytes:
    if not isinstance(text, str):
        raise PlacerError(
            "it has no routed_experts",
            "start the server with --enable-return-routed-experts and ask for "
            "return_routed_experts",
        )
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise PlacerError(f"routed_experts is no base64: {error}") from error


def _token_ids(prompt: Any, output: Any) -> list[int] | None:
    if not isinstance(prompt, list) or not isinstance(output, list):
        return None
    return [*prompt, *output]
