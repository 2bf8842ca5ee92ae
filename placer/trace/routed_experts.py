"""Reading the routed experts that SGLang and vLLM return with their responses.

JSON responses as the servers send them: one to a line, a list to a line (SGLang's answer
to a list of prompts), one list, or the lines of streams. Row i is the token at position
``start + i``; the last token was never run, so it has none. Both record logical ids, and
zeros for dense layers.
"""

import base64
import binascii
import io
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.errors import PlacerError
from placer.run.archives import UNREADABLE, unreadable_reason
from placer.run.documents import require_object
from placer.trace.imported import BoundModel, ImportedTokens
from placer.trace.json_lines import json_values
from placer.trace.streams import whole_responses

Array = npt.NDArray[Any]
_NEEDS_MODEL = "name the model, because a row has one entry per layer: --model DIR"


@dataclass(frozen=True, slots=True, kw_only=True)
class _RequestFields:
    """How an engine is asked for routed experts, and for the ids of tokens."""

    name: str
    experts: str
    ids: str
    other: str

    def require_own(self, response: Mapping[str, Any], file: Path) -> None:
        """Refuse responses of the other engine, and name the format that reads them."""
        if self.name == _engine_of(response):
            return
        if _engine_of(response) == self.other:
            format_ = f"{self.other.lower()}-routed"
            raise PlacerError(
                f"these look like {self.other}'s responses, not {self.name}'s",
                f"placer import {format_} {shlex.quote(str(file))} --model DIR --out OUT",
            )


_SGLANG = _RequestFields(
    name="SGLang",
    other="vLLM",
    experts="start SGLang with --enable-return-routed-experts, and ask for "
    '"return_routed_experts": true in every request',
    ids='ask for "return_prompt_token_ids": true (/generate), with "return_token_ids": '
    "true (OpenAI)",
)
_VLLM = _RequestFields(
    name="vLLM",
    other="SGLang",
    experts="start vLLM with --enable-return-routed-experts; requests need no field",
    ids='ask for "return_token_ids": true in every request',
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sequence:
    """The tokens that an engine ran for one output.

    Attributes
    ----------
    experts
        ``[N, L, k]``.
    start
        Position of the first row; ``None`` where the response does not say.
    prompt_tokens
        Length of the prompt, or ``None``.
    token_ids
        ``[N]``, or ``None``.
    """

    experts: Array
    start: int | None
    prompt_tokens: int | None
    token_ids: Sequence[int] | None

    def __post_init__(self) -> None:
        for value in (self.prompt_tokens, *(self.token_ids or ())):
            _require_whole(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What one response holds, and how many of its outputs came without experts."""

    sequences: tuple[_Sequence, ...]
    num_without: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """The length of an output's prompt and its first position, as far as counts show."""

    prompt: int | None = None
    start: int | None = None


# Keys of a response itself, and what they hold; ``routed_experts`` is any value.
_OF_RESPONSE: Mapping[str, type] = {
    "choices": list,
    "outputs": list,
    "meta_info": dict,
    "sglext": dict,
    "sgl_ext": dict,
    "routed_experts": object,
}
_Finder = Callable[[Mapping[str, Any]], _Found]


def read_sglang_routed(file: Path, model: BoundModel | None) -> ImportedTokens:
    """Read responses of SGLang (0.5): base64 of raw int32 ``[N, hidden layers, k]``.

    The ids are in ``meta_info.routed_experts`` (native) or ``sglext.routed_experts``
    (OpenAI, of the first choice only) or ``sgl_ext`` of each choice. The bytes have no
    header, so the model has to be known.

    Raises
    ------
    PlacerError
        If no model is given, no response holds routed experts, or some are not of its
        shape.
    """
    if model is None:
        raise PlacerError("SGLang's routed experts have no header", _NEEDS_MODEL)
    return _read(file, lambda response: _sglang_found(response, model), _SGLANG)


def read_vllm_routed(file: Path, model: BoundModel | None) -> ImportedTokens:
    """Read responses of vLLM (0.30): base64 of ``.npy`` ``[N, hidden layers, k]``.

    The ids are in ``choices[].routed_experts``; each choice becomes a sequence. vLLM 0.21
    kept those of the prompt apart, in ``prompt_routed_experts`` of the response.

    Raises
    ------
    PlacerError
        If no response holds routed experts, or they have different shapes.
    """
    return _read(file, _vllm_found, _VLLM)


def _read(file: Path, found_in: _Finder, asked: _RequestFields) -> ImportedTokens:
    sequences: list[_Sequence] = []
    num_without = 0
    for where, value in whole_responses(json_values(file)):
        try:
            value = require_object(value, "it")
            for response in [*_responses_in(value)] or [value]:
                asked.require_own(response, file)
                found = found_in(response)
                sequences += found.sequences
                num_without += found.num_without
        except PlacerError as error:
            raise PlacerError(f"{where}: {error}", error.hint) from error
        except UNREADABLE as error:
            raise PlacerError(
                f"{where} is not such a response: {unreadable_reason(error)}"
            ) from error
    if not sequences:
        raise PlacerError(
            f"none of {num_without} outputs has routed_experts"
            if num_without
            else "it holds no response",
            asked.experts,
        )
    shapes = {one.experts.shape[1:] for one in sequences}
    if len(shapes) > 1:
        raise PlacerError(f"responses have different layers or top-k: {sorted(shapes)}")
    remarks = tuple(_remarks(sequences, num_without, asked))
    return _joined(sequences, remarks)


def _engine_of(response: Mapping[str, Any]) -> str | None:
    """Return which engine a response with routed experts is from, by its keys."""
    found = response.get("choices") or response.get("outputs") or []
    choices = [one for one in found if isinstance(one, Mapping)]
    meta = response.get("meta_info")
    if any("sglext" in one or "sgl_ext" in one for one in (response, *choices)) or (
        isinstance(meta, Mapping) and "routed_experts" in meta
    ):
        return "SGLang"
    if "prompt_routed_experts" in response or any(
        one.get("routed_experts") is not None for one in choices
    ):
        return "vLLM"
    return None  # also where a response is no more than the experts


def _responses_in(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the responses in a log of requests or in the output of a batch.

    OpenAI's batches, and vLLM's ``run_batch``, keep them in ``response.body``; logs of
    other programs under any key, also in lists.
    """
    if any(
        key in value and isinstance(value[key], kind) for key, kind in _OF_RESPONSE.items()
    ):
        yield value
        return
    for inner in value.values():
        for one in inner if isinstance(inner, list) else [inner]:
            if isinstance(one, dict):
                yield from _responses_in(one)


def _joined(sequences: Sequence[_Sequence], remarks: tuple[str, ...]) -> ImportedTokens:
    lengths = [len(one.experts) for one in sequences]
    positions = np.concatenate(
        [(one.start or 0) + np.arange(n) for one, n in zip(sequences, lengths, strict=True)]
    )
    prompts = [one.prompt_tokens for one in sequences if one.start is not None]
    known = [n for n in prompts if n is not None]
    has_phase = len(known) == len(sequences)
    has_ids = any(one.token_ids is not None for one in sequences)
    return ImportedTokens(
        experts=np.concatenate([one.experts for one in sequences]),
        sequence_ids=np.repeat(np.arange(len(sequences)), lengths),
        positions=positions,
        phase=(positions >= np.repeat(known, lengths)).astype(np.uint8)
        if has_phase
        else None,
        token_ids=np.concatenate(
            [
                np.full(n, -1) if one.token_ids is None else np.asarray(one.token_ids)
                for one, n in zip(sequences, lengths, strict=True)
            ]
        )
        if has_ids
        else None,
        remarks=remarks,
    )


def _remarks(
    sequences: Sequence[_Sequence], num_without: int, asked: _RequestFields
) -> Iterator[str]:
    if num_without:
        yield (
            f"{num_without} of {num_without + len(sequences)} outputs have no routed "
            "experts and are left out. Aborted requests have none, and SGLang's OpenAI "
            "responses have only those of the first choice"
        )
    unplaced = sum(one.start is None for one in sequences)
    unknown = sum(one.start is not None and one.prompt_tokens is None for one in sequences)
    if unplaced:
        yield (
            f"{unplaced} of {len(sequences)} outputs do not say at which token their rows "
            "begin, so positions count from 0 and the phase is not recorded. To record "
            f"both, {asked.ids}"
        )
    if unknown:
        yield (
            f"{unknown} of {len(sequences)} outputs do not say where their prompt ends, "
            f"so the phase is not recorded. To record it, {asked.ids}"
        )


def _sglang_found(response: Mapping[str, Any], model: BoundModel) -> _Found:
    meta = response.get("meta_info") or {}
    choices = response.get("choices") or [{}]
    texts = [_sglang_text(choice) for choice in choices]
    if texts[0] is None:  # of the response itself: of its first choice
        text = meta.get("routed_experts") or _sglang_text(response)
        texts[0] = text or response.get("routed_experts")
    num_layers, top_k = model.num_hidden_layers, model.spec.top_k
    found = []
    for choice, text in zip(choices, texts, strict=True):
        if text is None:
            continue
        if isinstance(text, str):
            raw = np.frombuffer(_decoded(text), dtype="<i4")
        else:
            raw = _written(text)
            _require_last_axes(raw.shape, model)
        _require_whole_rows(raw.size, model)
        found.append((choice, raw.reshape(-1, num_layers, top_k)))
    counted = _of_choices(
        meta or response.get("usage"), len(choices), [len(experts) for _, experts in found]
    )
    return _Found(
        sequences=tuple(
            _sequence(
                experts,
                counted,
                _ids(choice, response, meta, name="prompt_token_ids"),
                _ids(choice, name="token_ids") or _ids(response, name="output_ids"),
            )
            for choice, experts in found
        ),
        num_without=len(choices) - len(found),
    )


def _sglang_text(holder: Mapping[str, Any]) -> Any:
    """Return the routed experts of SGLang's extension of an OpenAI response."""
    extensions = (holder.get(name) or {} for name in ("sglext", "sgl_ext"))
    return next(
        (one["routed_experts"] for one in extensions if "routed_experts" in one), None
    )


def _vllm_found(response: Mapping[str, Any]) -> _Found:
    choices = response.get("choices") or response.get("outputs") or [response]
    of_prompt = response.get("prompt_routed_experts")
    before = () if of_prompt is None else (_vllm_array(of_prompt),)
    found = []
    for choice in choices:
        routed = choice.get("routed_experts")
        if routed is None:
            continue
        experts = _vllm_array(routed)
        if before and before[0].shape[1:] != experts.shape[1:]:
            raise PlacerError(
                f"prompt_routed_experts has shape {list(before[0].shape)}, routed_experts "
                f"{list(experts.shape)}"
            )
        found.append((choice, np.concatenate([*before, experts])))
    counted = _of_choices(
        response.get("usage"), len(choices), [len(experts) for _, experts in found]
    )
    return _Found(
        sequences=tuple(
            _sequence(
                experts,
                counted,
                _ids(choice, response, name="prompt_token_ids"),
                _ids(choice, name="token_ids"),
            )
            for choice, experts in found
        ),
        num_without=len(choices) - len(found),
    )


def _vllm_array(routed: Any) -> Array:
    """Return ``[N, L, k]``."""
    if isinstance(routed, str):
        experts = np.load(io.BytesIO(_decoded(routed)), allow_pickle=False)
    else:
        experts = _written(routed)
    if not isinstance(experts, np.ndarray):  # an archive, which is not unpacked
        raise PlacerError("routed_experts is not one array")
    if experts.ndim != 3:
        raise PlacerError(f"routed_experts has shape {list(experts.shape)}")
    return experts


def _of_choices(usage: Any, num_choices: int, rows: Sequence[int]) -> _Counted:
    """Return what the usage of a response says about each of its choices.

    It counts every prompt once and all outputs: choices are of one prompt (``n``) or of
    one prompt each, and their rows show which, if none is missing.
    """
    prompt, output = _counts(usage)
    if num_choices == 1 and rows:
        return _Counted(prompt=prompt, start=_start(prompt, output, rows[0]))
    if prompt is None or output is None or len(rows) < num_choices:
        return _Counted()
    outputs = output - num_choices  # the last token of each was never run
    if sum(rows) == num_choices * prompt + outputs:
        return _Counted(prompt=prompt, start=0)
    return _Counted(start=0) if sum(rows) == prompt + outputs else _Counted()


def _sequence(
    experts: Array,
    counted: _Counted,
    prompt_ids: list[int] | None,
    output_ids: list[int] | None,
) -> _Sequence:
    """Build a sequence; rows missing at its start were cached, or not requested."""
    prompt = counted.prompt if prompt_ids is None else len(prompt_ids)
    if prompt_ids is None or output_ids is None:
        return _Sequence(
            experts=experts, start=counted.start, prompt_tokens=prompt, token_ids=None
        )
    ids = [*prompt_ids, *output_ids]
    start = _start(len(prompt_ids), len(output_ids), len(experts)) or 0
    return _Sequence(
        experts=experts,
        start=start,
        prompt_tokens=prompt,
        token_ids=ids[start : start + len(experts)],
    )


def _start(prompt: int | None, output: int | None, num_rows: int) -> int | None:
    """Return the position of the first of the rows, which end before the last token."""
    if prompt is None or output is None:
        return None
    most = prompt + output - 1
    start = most - num_rows
    # Rows may lack at the start of the prompt only: all of the output was run.
    if start < 0 or start > prompt:
        raise PlacerError(
            f"{num_rows} rows of experts for {prompt} tokens of a prompt and {output} of "
            f"its output: expected {max(output - 1, 0)} to {most}, because the last token "
            "is not run",
            "check --model, and that each row is one token",
        )
    return start


def _require_whole_rows(num_ids: int, model: BoundModel) -> None:
    """Refuse ids that are no rows of all hidden layers of the model."""
    if num_ids % (model.num_hidden_layers * model.spec.top_k):
        raise PlacerError(
            f"{num_ids} ids do not divide into rows of {model.num_hidden_layers} hidden "
            f"layers x top-{model.spec.top_k}",
            "check that --model is the model that was served",
        )


def _require_last_axes(shape: tuple[int, ...], model: BoundModel) -> None:
    """Refuse axes that are not tokens, hidden layers and experts in this order."""
    num_layers, top_k = model.num_hidden_layers, model.spec.top_k
    joined = len(shape) == 2 and shape[1] in (top_k, num_layers * top_k)
    if len(shape) > 1 and not joined and shape[-2:] != (num_layers, top_k):
        raise PlacerError(
            f"routed_experts has shape {list(shape)}, expected [tokens, {num_layers}, "
            f"{top_k}]: {num_layers} hidden layers and top-{top_k}",
            "check that --model is the model that was served, and write the ids of a token "
            "together, layer after layer",
        )


def _written(routed: Any) -> Array:
    """Return ids that somebody wrote down as lists, or as bytes with type and shape."""
    if isinstance(routed, dict) and {"data", "dtype", "shape"} <= routed.keys():
        experts = np.frombuffer(_decoded(routed["data"]), np.dtype(routed["dtype"]))
        experts = experts.reshape(routed["shape"])
    elif isinstance(routed, list):
        experts = np.asarray(routed)
    else:
        raise PlacerError(f"routed_experts is {routed!r:.40}, not a text or a list")
    if not np.issubdtype(experts.dtype, np.integer):
        raise PlacerError("routed_experts holds a value that is not a whole number")
    return experts


def _decoded(text: Any) -> bytes:
    if not isinstance(text, str):
        raise PlacerError(f"routed_experts is {text!r:.40}, not a text")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise PlacerError(f"routed_experts is not base64: {error}") from error


def _counts(usage: Any) -> tuple[int | None, int | None]:
    """Return the tokens of prompts and outputs that a response counts."""
    usage = usage or {}
    prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
    _require_whole(prompt)
    _require_whole(output)
    return prompt, output


def _ids(*places: Mapping[str, Any], name: str) -> list[int] | None:
    """Return the first list of that name."""
    found = (place.get(name) for place in places)
    return next((one for one in found if isinstance(one, list)), None)


def _require_whole(value: Any) -> None:
    if value is not None and type(value) is not int:
        raise PlacerError(f"a count or id of tokens is {value!r}, not a whole number")
