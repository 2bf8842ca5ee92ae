"""Responses laid out as SGLang and vLLM send them become traces, and lies are caught."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.errors import PlacerError
from placer.trace import Trace
from placer.trace.imported import import_file
from placer.trace.npz import read_exflow
from placer.trace.routed_experts import (
    read_sglang_routed,
    read_vllm_routed,
)

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


def check(trace: Path, expected: list[np.ndarray]) -> None:
    tokens = Trace(trace).read()
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
    import_file(read_sglang_routed, "sglang-routed", path, tmp_path / "t", tiny_model)
    check(tmp_path / "t", given)


def test_sglang_openai_responses_without_ids(tiny_model: Path, tmp_path: Path) -> None:
    raw = sglang_response(routed(0))["meta_info"]["routed_experts"]
    response = {"sglext": {"routed_experts": raw}, "usage": {"prompt_tokens": 2}}
    path = write(tmp_path / "a.jsonl", response)
    import_file(read_sglang_routed, "sglang-routed", path, tmp_path / "t", tiny_model)
    tokens = Trace(tmp_path / "t").read()
    assert tokens.token_ids is None
    assert tokens.phase.tolist() == [0, 0, 1, 1]


def test_vllm_responses_with_two_choices(tiny_model: Path, tmp_path: Path) -> None:
    given = [routed(0), routed(1), routed(2)]
    path = write(tmp_path / "a.jsonl", vllm_response(*given[:2]), vllm_response(given[2]))
    import_file(read_vllm_routed, "vllm-routed", path, tmp_path / "t", tiny_model)
    check(tmp_path / "t", given)


def test_rows_missing_at_the_start_were_cached(tiny_model: Path, tmp_path: Path) -> None:
    """Prefix-cached tokens were never recomputed: positions go on after them."""
    path = write(tmp_path / "a.jsonl", vllm_response(routed(0)[2:]))
    import_file(read_vllm_routed, "vllm-routed", path, tmp_path / "t", tiny_model)
    tokens = Trace(tmp_path / "t").read()
    assert tokens.positions.tolist() == [2, 3]
    assert tokens.token_ids.tolist() == [7, 8]
    assert tokens.phase.tolist() == [0, 1]


PHYSICAL = np.where(routed(0) == 0, 0, routed(0) + 8)


@pytest.mark.parametrize(
    ("response", "match"),
    [
        (vllm_response(np.zeros((4, 4, 2))), "lists an expert twice|is all zeros"),
        (vllm_response(PHYSICAL), "ids up to 15, the model has 8 experts"),
        (vllm_response(routed(0)[:, :3]), "experts has 3 layers"),
        (vllm_response(routed(0).repeat(2, 0)), "8 rows of experts for 5 token ids"),
        (vllm_response(choices=[{"index": 0}]), "line 1: it has no routed_experts"),
        (vllm_response(choices=[{"routed_experts": "%%"}]), "no base64"),
        (vllm_response(choices=[{"routed_experts": "AAAA"}]), "line 1 is no such response"),
        ([1, 2], r"line 1: it is \[1, 2\], not a JSON object"),
        (vllm_response(routed(0), usage={"prompt_tokens": "3"}), "is '3', no whole number"),
        (vllm_response(routed(0), prompt_token_ids=[5, 6, [7]]), r"is \[7\], no whole"),
        (vllm_response(routed(0), prompt_token_ids=[5, 6, 2**70]), "expected"),
        ({}, "line 1"),
    ],
)
def test_responses_that_lie_are_refused(
    tiny_model: Path, tmp_path: Path, response: Any, match: str
) -> None:
    path = write(tmp_path / "a.jsonl", response)
    with pytest.raises(PlacerError, match=match) as caught:
        import_file(read_vllm_routed, "vllm-routed", path, tmp_path / "t", tiny_model)
    assert caught.value.hint
    assert not (tmp_path / "t").exists()


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
    with pytest.raises(PlacerError, match="18 ids are no whole rows of 4 hidden layers"):
        import_file(read_sglang_routed, "sglang-routed", path, tmp_path / "t", tiny_model)


def test_pickles_inside_are_never_loaded(tiny_model: Path, tmp_path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.asarray([{}], dtype=object), allow_pickle=True)
    text = base64.b64encode(content.getvalue()).decode()
    path = write(tmp_path / "a.jsonl", vllm_response(choices=[{"routed_experts": text}]))
    with pytest.raises(PlacerError, match="pickled objects, which are never loaded"):
        import_file(read_vllm_routed, "vllm-routed", path, tmp_path / "t", tiny_model)


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
