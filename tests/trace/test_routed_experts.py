"""Responses laid out as SGLang and vLLM send them become traces, and lies are caught."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.errors import PlacerError
from placer.trace import Chunk, Trace
from placer.trace.imported import ImportOptions, import_file
from placer.trace.npz import read_exflow
from placer.trace.routed_experts import read_sglang_routed, read_vllm_routed

PROMPT, OUTPUT = [5, 6, 7], [8, 9]


def routed(
    seed: int, num_layers: int = 4, moe_layers: tuple[int, ...] = (1, 3)
) -> np.ndarray:
    """Experts [4, hidden layers, 2] of five tokens, the last of which was never run."""
    rng = np.random.default_rng(seed)
    experts = np.zeros((len(PROMPT) + len(OUTPUT) - 1, num_layers, 2), np.int32)
    for layer in moe_layers:
        experts[:, layer] = np.argsort(rng.random((len(experts), 8)), axis=1)[:, :2]
    return experts


def sglang_response(experts: np.ndarray, **meta: Any) -> dict[str, Any]:
    raw = base64.b64encode(experts.astype("<i4").tobytes()).decode()
    return {
        "text": "...",
        "output_ids": OUTPUT,
        "prompt_token_ids": PROMPT,
        "meta_info": {"id": "x", "prompt_tokens": 3, "routed_experts": raw, **meta},
    }


def vllm_response(*choices: np.ndarray, **fields: Any) -> dict[str, Any]:
    def encoded(experts: np.ndarray) -> str:
        content = io.BytesIO()
        np.save(content, experts.astype(np.uint8))
        return base64.b64encode(content.getvalue()).decode()

    return {
        "usage": {"prompt_tokens": 3},
        "prompt_token_ids": PROMPT,
        "choices": [
            {"index": n, "token_ids": OUTPUT, "routed_experts": encoded(one)}
            for n, one in enumerate(choices)
        ],
    } | fields


def write(path: Path, *responses: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in responses))
    return path


def told(read: Any, path: Path, model: Path) -> tuple[Chunk, list[str]]:
    """Import, and return the tokens and what the user was told."""
    remarks: list[str] = []
    options = ImportOptions(model_directory=model, warn=remarks.append)
    import_file(read, "x", path, path.with_suffix(".trace"), options)
    return Trace(path.with_suffix(".trace")).read(), remarks


def check(tokens: Chunk, expected: list[np.ndarray]) -> None:
    experts = np.concatenate(expected)
    assert [ids.tolist() for ids in tokens.experts] == [
        experts[:, layer].tolist() for layer in (1, 3)
    ]
    n = len(expected)
    assert tokens.sequence_ids.tolist() == np.repeat(np.arange(n), 4).tolist()
    assert tokens.positions.tolist() == [0, 1, 2, 3] * n
    assert tokens.phase.tolist() == [0, 0, 0, 1] * n
    assert tokens.token_ids.tolist() == [5, 6, 7, 8] * n


def test_sglang_responses(tiny_model: Path, tmp_path: Path) -> None:
    given = [routed(0), routed(1)]
    path = write(tmp_path / "a.jsonl", *(sglang_response(one) for one in given))
    tokens, _ = told(read_sglang_routed, path, tiny_model)
    check(tokens, given)


def test_sglang_openai_responses_without_ids(tiny_model: Path, tmp_path: Path) -> None:
    raw = sglang_response(routed(0))["meta_info"]["routed_experts"]
    usage = {"prompt_tokens": 2, "completion_tokens": 3}
    response = {"sglext": {"routed_experts": raw}, "usage": usage}
    path = write(tmp_path / "a.jsonl", response)
    tokens, _ = told(read_sglang_routed, path, tiny_model)
    assert tokens.token_ids is None
    assert tokens.phase.tolist() == [0, 0, 1, 1]


def test_vllm_responses_with_two_choices(tiny_model: Path, tmp_path: Path) -> None:
    given = [routed(0), routed(1), routed(2)]
    path = write(tmp_path / "a.jsonl", vllm_response(*given[:2]), vllm_response(given[2]))
    tokens, _ = told(read_vllm_routed, path, tiny_model)
    check(tokens, given)


def test_rows_missing_at_the_start_were_cached(tiny_model: Path, tmp_path: Path) -> None:
    """Prefix-cached tokens were never recomputed: positions go on after them."""
    path = write(tmp_path / "a.jsonl", vllm_response(routed(0)[2:]))
    tokens, _ = told(read_vllm_routed, path, tiny_model)
    assert tokens.positions.tolist() == [2, 3]
    assert tokens.token_ids.tolist() == [7, 8]
    assert tokens.phase.tolist() == [0, 1]


@pytest.mark.parametrize("num_choices", [1, 2])
def test_experts_of_the_prompt_may_be_kept_apart(
    num_choices: int, tiny_model: Path, tmp_path: Path
) -> None:
    """As vLLM 0.21 returned them: once for all choices of a prompt."""
    given = [routed(0), routed(1)][:num_choices]
    given[-1][:3] = given[0][:3]
    response = vllm_response(*(one[3:] for one in given))
    whole = vllm_response(given[0][:3])["choices"][0]["routed_experts"]
    response["prompt_routed_experts"] = whole
    path = write(tmp_path / "a.jsonl", response)
    tokens, _ = told(read_vllm_routed, path, tiny_model)
    check(tokens, given)
    response["prompt_routed_experts"] = vllm_response(routed(0)[:3, :3])["choices"][0][
        "routed_experts"
    ]
    path = write(tmp_path / "b.jsonl", response)
    with pytest.raises(PlacerError, match="prompt_routed_experts has shape"):
        told(read_vllm_routed, path, tiny_model)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda one: {"request": {"text": "..."}, "output": one},
        lambda one: {"time": 1, "result": {"data": [{"response": {"body": one}}]}},
        lambda one: {"inputs": {"outputs": 3}, "outputs": {"any": [[1], one]}},
    ],
)
def test_responses_are_found_under_any_key(
    wrapped: Any, tiny_model: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", wrapped(sglang_response(routed(0))))
    tokens, _ = told(read_sglang_routed, path, tiny_model)
    check(tokens, [routed(0)])


@pytest.mark.parametrize("read", [read_sglang_routed, read_vllm_routed])
def test_experts_may_be_bytes_with_type_and_shape(
    read: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """As programs of reinforcement learning write them down."""
    given = routed(0)
    data = base64.b64encode(given.astype(np.int16).tobytes()).decode()
    written = {"encoding": "base64", "dtype": "int16", "shape": given.shape, "data": data}
    response = vllm_response(given)
    response["choices"][0]["routed_experts"] = written
    if read is read_sglang_routed:
        response = sglang_response(given, routed_experts=written)
    tokens, _ = told(read, write(tmp_path / "a.jsonl", response), tiny_model)
    check(tokens, [given])


def test_rows_of_an_output_are_never_missing(tiny_model: Path, tmp_path: Path) -> None:
    """Layers before tokens would else be taken for the last tokens of an output."""
    path = write(tmp_path / "a.jsonl", vllm_response(routed(0)[:0]))
    with pytest.raises(PlacerError, match="0 rows of experts for 3 tokens of a prompt"):
        told(read_vllm_routed, path, tiny_model)


def test_several_documents_over_many_lines_are_answered_with_jq(
    tiny_model: Path, tmp_path: Path
) -> None:
    text = json.dumps(vllm_response(routed(0)), indent=1)
    (tmp_path / "a.json").write_text(f"{text}\n{text}\n")
    with pytest.raises(PlacerError, match="line 1 is not valid JSON") as caught:
        told(read_vllm_routed, tmp_path / "a.json", tiny_model)
    assert "jq -c ." in caught.value.hint


IDS = {
    "token_ids": [8, 9],
    "prompt_token_ids": [5, 6, 7],
}


def vllm_batch(rows: list[int], prompts: list[int], output: int) -> Any:
    """One vLLM response to several prompts: its usage is of all of them together."""
    usage = {"prompt_tokens": sum(prompts), "completion_tokens": output}
    return vllm_response(*(routed(0).repeat(9, 0)[:n] for n in rows), usage=usage) | {
        "prompt_token_ids": None
    }


def test_prompts_of_one_request_have_each_their_own_phase(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Prompts of 3 and 5 tokens, 2 tokens of output each: 4 and 6 rows."""
    response = vllm_batch([4, 6], [3, 5], 4)
    for choice, length in zip(response["choices"], (3, 5), strict=True):
        choice |= {"prompt_token_ids": [*range(length)], "token_ids": [8, 9]}
    path = write(tmp_path / "ids.jsonl", response)
    tokens, remarks = told(read_vllm_routed, path, tiny_model)
    assert tokens.phase.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert tokens.positions.tolist() == [*range(4), *range(6)]
    assert tokens.token_ids.tolist() == [0, 1, 2, 8, 0, 1, 2, 3, 4, 8]
    assert not remarks
    for choice in response["choices"]:
        choice |= {"prompt_token_ids": None, "token_ids": None}
    path = write(tmp_path / "none.jsonl", response)
    tokens, remarks = told(read_vllm_routed, path, tiny_model)
    assert tokens.phase is None
    assert tokens.positions.tolist() == [*range(4), *range(6)]
    assert "2 of 2 outputs do not say where their prompt ends" in remarks[0]
    assert '"return_token_ids": true' in remarks[0]


@pytest.mark.parametrize(
    ("rows", "output", "starts", "phase"),
    [
        # One prompt of 3 tokens, outputs of 2 and 3: the usage is of the one prompt.
        ([4, 5], 5, (0, 0), [0, 0, 0, 1, 0, 0, 0, 1, 1]),
        # As many rows as neither reading has: where they begin is not known.
        ([4, 3], 5, (None, None), None),
    ],
)
def test_choices_of_one_prompt(
    tiny_model: Path, tmp_path: Path, rows: list[int], output: int, starts: Any, phase: Any
) -> None:
    response = vllm_batch(rows, [3], output)
    for choice in response["choices"]:
        choice |= {"token_ids": None}
    path = write(tmp_path / "a.jsonl", response)
    tokens, remarks = told(read_vllm_routed, path, tiny_model)
    assert (None if tokens.phase is None else tokens.phase.tolist()) == phase
    assert bool(remarks) == (starts[0] is None)
    if remarks:
        assert "do not say at which token their rows begin" in remarks[0]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "sglang-openai"])
@pytest.mark.parametrize("with_ids", [True, False])
def test_a_prefix_that_was_not_asked_for_is_found_by_counts(
    tiny_model: Path, tmp_path: Path, engine: str, with_ids: bool
) -> None:
    """Of 3 + 2 tokens rows 2 and 3 come back, as routed_experts_prompt_start 2 asks."""
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    ids = IDS if with_ids else {}
    raw = base64.b64encode(routed(0)[2:].astype("<i4").tobytes()).decode()
    response = {
        "vllm": {
            "usage": usage,
            "choices": [
                {**vllm_response(routed(0)[2:])["choices"][0], "token_ids": None, **ids}
            ],
        },
        "sglang": {
            "meta_info": {**usage, "routed_experts": raw},
            "prompt_token_ids": ids.get("prompt_token_ids"),
            "output_ids": ids.get("token_ids"),
        },
        "sglang-openai": {
            "usage": usage,
            "sglext": {"routed_experts": raw},
            "choices": [{"index": 0, **ids}],
        },
    }[engine]
    path = write(tmp_path / "a.jsonl", response)
    read = read_vllm_routed if engine == "vllm" else read_sglang_routed
    tokens, remarks = told(read, path, tiny_model)
    assert tokens.positions.tolist() == [2, 3]
    assert tokens.phase.tolist() == [0, 1]
    assert tokens.token_ids is None if not with_ids else tokens.token_ids.tolist() == [7, 8]
    assert not remarks


def test_what_has_no_experts_is_left_out_and_told(tiny_model: Path, tmp_path: Path) -> None:
    """An aborted request; and SGLang's OpenAI choices after the first one."""
    aborted = vllm_response(choices=[{"index": 0, "routed_experts": None}])
    path = write(tmp_path / "v.jsonl", aborted, vllm_response(routed(0)))
    tokens, remarks = told(read_vllm_routed, path, tiny_model)
    assert tokens.num_tokens == 4
    assert "1 of 2 outputs have no routed experts" in remarks[0]
    raw = sglang_response(routed(0))["meta_info"]["routed_experts"]
    response = {
        "usage": {"prompt_tokens": 8, "completion_tokens": 4},
        "sglext": {"routed_experts": raw},
        "choices": [{"index": 0, **IDS}, {"index": 1, "token_ids": [1]}],
    }
    path = write(tmp_path / "s.jsonl", response)
    tokens, remarks = told(read_sglang_routed, path, tiny_model)
    assert tokens.phase.tolist() == [0, 0, 0, 1]
    assert tokens.token_ids.tolist() == [5, 6, 7, 8]
    assert "1 of 2 outputs have no routed experts" in remarks[0]


def test_sglang_choices_with_experts_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    """Later versions return them with each choice, under sgl_ext."""
    choices = []
    for n in range(2):
        raw = sglang_response(routed(n))["meta_info"]["routed_experts"]
        choices.append({"index": n, **IDS, "sgl_ext": {"routed_experts": raw}})
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    path = write(tmp_path / "a.jsonl", {"choices": choices, "usage": usage})
    tokens, remarks = told(read_sglang_routed, path, tiny_model)
    check(tokens, [routed(0), routed(1)])
    assert not remarks


@pytest.mark.parametrize("layout", ["list in a line", "one list", "indented", "blank line"])
def test_lists_of_responses(tiny_model: Path, tmp_path: Path, layout: str) -> None:
    responses = [sglang_response(routed(0)), sglang_response(routed(1))]
    path = tmp_path / "a.jsonl"
    if layout == "list in a line":
        write(path, responses[:1], responses[1:])
    else:
        text = json.dumps(responses, indent=None if layout == "one list" else 2)
        path.write_text(f"\n{text}" if layout == "blank line" else text)
    tokens, _ = told(read_sglang_routed, path, tiny_model)
    check(tokens, [routed(0), routed(1)])


@pytest.mark.parametrize(
    ("read", "asked"),
    [
        (read_vllm_routed, "start vLLM with --enable-return-routed-experts; requests need"),
        (read_sglang_routed, '"return_routed_experts": true in every request'),
    ],
)
def test_the_hint_is_the_engines_own(
    tiny_model: Path, tmp_path: Path, read: Any, asked: str
) -> None:
    path = write(tmp_path / "a.jsonl", vllm_response(choices=[{"routed_experts": None}]))
    with pytest.raises(PlacerError, match="none of 1 outputs has routed_experts") as caught:
        told(read, path, tiny_model)
    assert asked in caught.value.hint


@pytest.mark.parametrize(
    ("read", "response", "said"),
    [
        (read_vllm_routed, sglang_response, "look like SGLang's responses, not vLLM's"),
        (read_sglang_routed, vllm_response, "look like vLLM's responses, not SGLang's"),
    ],
)
def test_responses_of_the_other_engine_are_named(
    tiny_model: Path, tmp_path: Path, read: Any, response: Any, said: str
) -> None:
    path = write(tmp_path / "a.jsonl", response(routed(0)))
    with pytest.raises(PlacerError, match=said) as caught:
        told(read, path, tiny_model)
    other = "vllm" if read is read_sglang_routed else "sglang"
    assert caught.value.hint.startswith(f"placer import {other}-routed {path}")


PHYSICAL = np.where(routed(0) == 0, 0, routed(0) + 8)


@pytest.mark.parametrize(
    ("response", "match"),
    [
        (vllm_response(np.zeros((4, 4, 2))), "lists an expert twice|is all zeros"),
        (vllm_response(PHYSICAL), "ids up to 15, the model has 8 experts"),
        (vllm_response(routed(0)[:, :3]), "experts has 3 layers"),
        (vllm_response(routed(0).repeat(2, 0)), "8 rows of experts for 3 tokens"),
        (vllm_response(choices=[{"index": 0}]), "none of 1 outputs has routed_experts"),
        (vllm_response(choices=[{"routed_experts": 7}]), "routed_experts is 7, not a text"),
        (vllm_response(choices=[{"routed_experts": "%%"}]), "not base64"),
        (
            vllm_response(choices=[{"routed_experts": "AAAA"}]),
            "line 1 is not such a response",
        ),
        ([1, 2], "line 1: it is 1, not a JSON object"),
        (
            vllm_response(routed(0), usage={"prompt_tokens": "3"}),
            "is '3', not a whole number",
        ),
        (vllm_response(routed(0), prompt_token_ids=[5, 6, [7]]), r"is \[7\], not a whole"),
        (vllm_response(routed(0), prompt_token_ids=[5, 6, 2**70]), "expected"),
        ({}, "none of 1 outputs has routed_experts"),
        ([], "holds no response"),
        ("text", 'line 1: it is "text", not a JSON object'),
    ],
)
def test_responses_that_lie_are_refused(
    tiny_model: Path, tmp_path: Path, response: Any, match: str
) -> None:
    path = write(tmp_path / "a.jsonl", response)
    with pytest.raises(PlacerError, match=match) as caught:
        told(read_vllm_routed, path, tiny_model)
    assert caught.value.hint
    assert [*tmp_path.iterdir()] == [path]


def test_dense_layers_need_the_model(tmp_path: Path, tiny_model: Path) -> None:
    path = write(tmp_path / "a.jsonl", vllm_response(routed(0)))
    with pytest.raises(PlacerError, match="layer 0 is all zeros") as caught:
        import_file(read_vllm_routed, "vllm-routed", path, tmp_path / "t")
    assert "--model DIR" in caught.value.hint
    path = write(tmp_path / "b.jsonl", sglang_response(routed(0)))
    with pytest.raises(PlacerError, match="have no header") as caught:
        import_file(read_sglang_routed, "sglang-routed", path, tmp_path / "t")
    assert "--model DIR" in caught.value.hint
    path = write(tmp_path / "c.jsonl", sglang_response(routed(0)[:3, :3]))
    with pytest.raises(
        PlacerError, match="18 ids do not divide into rows of 4 hidden layers"
    ):
        told(read_sglang_routed, path, tiny_model)


def as_lists(response: dict[str, Any], experts: np.ndarray) -> dict[str, Any]:
    for holder in (response.get("meta_info"), *response.get("choices", ())):
        if holder is not None:
            holder["routed_experts"] = experts.tolist()
    return response


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("how", ["lists", "batch", "log", "offline", "bare"])
def test_responses_that_somebody_wrote_down(
    engine: str, how: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Lists in place of base64, OpenAI's batch output, a log, vLLM's offline outputs."""
    experts = [routed(0), routed(1)]
    build = vllm_response if engine == "vllm" else sglang_response
    responses = [build(one) for one in experts]
    if how == "lists":
        responses = [as_lists(r, e) for r, e in zip(responses, experts, strict=True)]
    elif how == "batch":
        responses = [{"id": "b", "response": {"body": r}} for r in responses]
    elif how == "log":
        responses = [{"request": {"prompt": "x"}, "response": r} for r in responses]
    elif how == "bare":
        of_output = "token_ids" if engine == "vllm" else "output_ids"
        kept = {"prompt_token_ids": PROMPT, of_output: OUTPUT}
        responses = [kept | {"routed_experts": one.tolist()} for one in experts]
    elif engine == "vllm":
        for response in responses:
            response["outputs"] = response.pop("choices")
            del response["usage"]
    path = write(tmp_path / "x.jsonl", *responses)
    read = read_vllm_routed if engine == "vllm" else read_sglang_routed
    tokens, _ = told(read, path, tiny_model)
    check(tokens, experts)


def as_stream(*chunks: dict[str, Any]) -> str:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([": ping\n\n", *lines, "data: [DONE]\n\n"])


def vllm_chunks(experts: np.ndarray, name: str) -> list[dict[str, Any]]:
    """As vLLM 0.30's scale_out/token_in_token_out/serving.py streams them."""
    whole = vllm_response(experts)["choices"][0]
    tokens = [{"index": 0, "token_ids": [one], "routed_experts": None} for one in OUTPUT]
    tokens[-1]["routed_experts"] = whole["routed_experts"]
    chunks = [{"request_id": name, "choices": [one]} for one in tokens]
    chunks[0]["prompt_token_ids"] = PROMPT
    return [*chunks, {"request_id": name, "choices": [], "usage": {"prompt_tokens": 3}}]


def sglang_chunks(experts: np.ndarray, name: str, increments: bool) -> list[dict[str, Any]]:
    """As SGLang 0.5.23's /generate streams them: all ids so far, or the new ones."""
    whole = sglang_response(experts, id=name, completion_tokens=2)
    meta = {"id": name, "prompt_tokens": 3, "completion_tokens": 1}
    first = {"output_ids": OUTPUT[:1], "prompt_token_ids": PROMPT, "meta_info": meta}
    return [first, {**whole, "output_ids": OUTPUT[1:] if increments else OUTPUT}]


@pytest.mark.parametrize("how", ["vllm", "sglang", "sglang increments"])
@pytest.mark.parametrize("order", ["in turn", "interleaved", "same id"])
def test_streams_are_put_together(
    how: str, order: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Two responses, one after the other or their chunks in turn, are two sequences."""
    given = [routed(0), routed(1)]
    names = ["x", "x"] if order == "same id" else ["x", "y"]
    if how == "vllm":
        read: Any = read_vllm_routed
        parts = [vllm_chunks(*one) for one in zip(given, names, strict=True)]
    else:
        read, increments = read_sglang_routed, "increments" in how
        parts = [sglang_chunks(*one, increments) for one in zip(given, names, strict=True)]
    if order == "interleaved":
        text = as_stream(*(one for pair in zip(*parts, strict=True) for one in pair))
    else:
        text = "".join(as_stream(*chunks) for chunks in parts)
    (tmp_path / "log").write_text(text)
    tokens, _ = told(read, tmp_path / "log", tiny_model)
    check(tokens, given)


@pytest.mark.parametrize("num_choices", [1, 2])
def test_experts_of_sglangs_openai_stream(
    num_choices: int, tiny_model: Path, tmp_path: Path
) -> None:
    """They come by themselves; with two choices SGLang does not say of which they are."""
    experts = sglang_response(routed(0))["meta_info"]["routed_experts"]
    ids = [
        {
            "id": "x",
            "choices": [{"index": n, "token_ids": [one], "prompt_token_ids": PROMPT}],
        }
        for one in OUTPUT
        for n in range(num_choices)
    ]
    last = {"id": "x", "choices": [], "sglext": {"routed_experts": experts}}
    (tmp_path / "log").write_text(as_stream(*ids, last))
    tokens, _ = told(read_sglang_routed, tmp_path / "log", tiny_model)
    if num_choices == 1:
        check(tokens, [routed(0)])
    else:
        assert len(tokens.positions) == 4
        assert (tokens.token_ids, tokens.phase) == (None, None)


@pytest.mark.parametrize("line", ["data: {", "data: [1]", "data: 3"])
def test_streams_that_are_cut_are_refused(
    line: str, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text(as_stream(*vllm_chunks(routed(0), "x")) + line + "\n")
    with pytest.raises(PlacerError, match=r"line \d+ is"):
        told(read_vllm_routed, tmp_path / "log", tiny_model)
    assert [*tmp_path.iterdir()] == [tmp_path / "log"]


def test_lists_that_hold_no_numbers_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    response = as_lists(vllm_response(routed(0)), routed(0).astype(str))
    path = write(tmp_path / "x.jsonl", response)
    with pytest.raises(PlacerError, match="not a whole number"):
        import_file(read_vllm_routed, "x", path, tmp_path / "t", ImportOptions())


def test_sglang_lists_of_other_axes_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Layers before tokens, and MoE layers only: their ids divide into rows as well."""
    experts = np.concatenate([routed(0), routed(1)])
    for n, other in enumerate((experts.swapaxes(0, 1), experts[:, [1, 3]])):
        response = as_lists(sglang_response(experts), other)
        path = write(tmp_path / f"{n}.jsonl", response)
        with pytest.raises(PlacerError, match=r"expected \[tokens, 4, 2\]") as caught:
            told(read_sglang_routed, path, tiny_model)
        assert caught.value.hint


def test_pickles_inside_are_never_loaded(tiny_model: Path, tmp_path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.asarray([{}], dtype=object), allow_pickle=True)
    text = base64.b64encode(content.getvalue()).decode()
    path = write(tmp_path / "a.jsonl", vllm_response(choices=[{"routed_experts": text}]))
    with pytest.raises(PlacerError, match="pickled objects, which placer never loads"):
        told(read_vllm_routed, path, tiny_model)


def test_exflow_arrays_become_blocks_of_top_1(tmp_path: Path) -> None:
    experts = np.random.default_rng(0).integers(0, 16, (600, 3))
    np.save(tmp_path / "a.npy", experts)
    header = import_file(read_exflow, "exflow", tmp_path / "a.npy", tmp_path / "t")
    tokens = Trace(tmp_path / "t").read()
    assert header.model.top_k == 1
    assert header.model.num_experts == (16, 16, 16)
    assert np.stack([ids[:, 0] for ids in tokens.experts], 1).tolist() == experts.tolist()
    assert np.bincount(tokens.sequence_ids).tolist() == [256, 256, 88]
    np.save(tmp_path / "b.npy", experts[0])
    with pytest.raises(PlacerError, match=r"shape \[3\], expected \[tokens, layers\]"):
        import_file(read_exflow, "exflow", tmp_path / "b.npy", tmp_path / "u")
