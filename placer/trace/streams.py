"""Responses that were streamed: the chunks of each become one response.

vLLM and SGLang send lines ``data: {...}``, and ``data: [DONE]`` at the end (server-sent
events). Each chunk names its response: ``id``, ``request_id`` (vLLM's
``scale_out/token_in_token_out/protocol.py``) or ``meta_info.id`` (SGLang's ``/generate``).
Routed experts come once, with one of the last chunks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from placer.trace.json_lines import Streamed

_Located = tuple[str, Any]
# Of one choice, in parts that follow each other.
_IN_PARTS = "token_ids"


def whole_responses(values: Iterable[_Located]) -> Iterator[_Located]:
    """Yield all values, and in place of chunks the responses that they are parts of."""
    open_chunks: dict[str, list[_Located]] = {}
    for where, value in values:
        if not isinstance(value, Streamed):
            yield where, value
        elif not value:  # the end of a stream; those that go on have no experts so far
            done = [key for key, chunks in open_chunks.items() if _has_experts(chunks)]
            yield from (_joined(open_chunks.pop(key)) for key in done)
        elif (key := _id_of(value)) is None:
            yield where, value
        else:
            open_chunks.setdefault(key, []).append((where, value))
    yield from map(_joined, open_chunks.values())


def _id_of(chunk: Mapping[str, Any]) -> str | None:
    meta = chunk.get("meta_info")
    found = meta.get("id") if isinstance(meta, dict) else chunk.get("id")
    found = chunk.get("request_id") if found is None else found
    return None if found is None else str(found)


def _has_experts(chunks: Sequence[_Located]) -> bool:
    response = _joined(chunks)[1]
    holders = (response, response.get("meta_info"), response.get("sglext"))
    return any(
        isinstance(one, dict) and one.get("routed_experts")
        for one in (*holders, *response.get("choices", ()))
    )


def _joined(chunks: Sequence[_Located]) -> _Located:
    response: dict[str, Any] = {}
    choices: dict[Any, dict[str, Any]] = {}
    for _, chunk in chunks:
        _update(response, {k: v for k, v in chunk.items() if k != "choices"})
        parts = chunk.get("choices")
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                _update(choices.setdefault(part.get("index", 0), {}), part)
    if choices:
        response["choices"] = [choices[index] for index in sorted(choices, key=str)]
    if len(choices) > 1 and "sglext" in response:
        # SGLang does not say of which choice the experts are.
        for choice in choices.values():
            choice.pop(_IN_PARTS, None)
    if "output_ids" in response:
        response["output_ids"] = _output_ids(response, [chunk for _, chunk in chunks])
    return chunks[0][0], response


def _update(whole: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add what a chunk says; what it leaves empty says nothing."""
    for key, value in part.items():
        old = whole.get(key)
        if key == _IN_PARTS and isinstance(old, list) and isinstance(value, list):
            whole[key] = old + value
        elif isinstance(old, dict) and isinstance(value, dict):
            whole[key] = {**old, **{k: v for k, v in value.items() if v is not None}}
        elif value is not None:
            whole[key] = value


def _output_ids(
    response: Mapping[str, Any], chunks: Sequence[Mapping[str, Any]]
) -> list[Any] | None:
    """Return all ids of SGLang's ``/generate``; ``None`` where chunks are missing.

    Each chunk has all ids so far, or with ``--incremental-streaming-output`` the new ones.
    """
    meta = response.get("meta_info")
    number = meta.get("completion_tokens") if isinstance(meta, dict) else None
    parts = [one["output_ids"] for one in chunks if isinstance(one.get("output_ids"), list)]
    every = [token for part in parts for token in part]
    if parts and len(parts[-1]) == number:
        return list(parts[-1])
    return every if len(every) == number else None
