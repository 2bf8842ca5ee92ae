"""Every format of ``placer import`` reads its smallest file and is described."""

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from placer.affinity import Affinity
from placer.api.known import LOAD_FORMATS, TOKEN_FORMATS
from placer.cli.import_ import import_
from placer.cli.main import main
from placer.trace import Trace

# Three tokens of one sequence, two MoE layers of four experts, two for each token.
EXPERTS = np.array([[[0, 1], [3, 2]], [[2, 0], [1, 3]], [[3, 0], [0, 2]]])
LOADS = [[3, 1, 1, 1], [1, 1, 2, 2]]  # counted by hand
CONFIG = {
    "model_type": "deepseek_v2",
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 8,
    "vocab_size": 16,
}


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, experts=EXPERTS, sequence_ids=np.zeros(3, dtype=int))


def write_exflow(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, EXPERTS[:, :, 0])


def write_csv(path: Path) -> None:
    rows = [f"0,{t},{n},{e[0]},{e[1]}" for (t, n), e in by_token_and_layer()]
    path.write_text("\n".join(["sequence_id,position,layer,e0,e1", *rows]) + "\n")


def write_jsonl(path: Path) -> None:
    rows = [
        {"layer": n, "token_idx": t, "topk_ids": e, "request_id": "a"}
        for (t, n), e in by_token_and_layer()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json_requests(path: Path) -> None:
    path.write_text(json.dumps({str(n): EXPERTS[:, n].tolist() for n in range(2)}) + "\n")


def write_sglang_routed(path: Path) -> None:
    raw = base64.b64encode(EXPERTS.astype("<i4").tobytes()).decode()
    meta = {"id": "x", "prompt_tokens": 2, "routed_experts": raw}
    one = {"output_ids": [7, 8], "prompt_token_ids": [5, 6], "meta_info": meta}
    path.write_text(json.dumps(one) + "\n")


def write_vllm_routed(path: Path) -> None:
    content = io.BytesIO()
    np.save(content, EXPERTS.astype(np.uint8))
    raw = base64.b64encode(content.getvalue()).decode()
    choice = {"index": 0, "token_ids": [7, 8], "routed_experts": raw}
    usage = {"prompt_tokens": 2}
    one = {"usage": usage, "prompt_token_ids": [5, 6], "choices": [choice]}
    path.write_text(json.dumps(one) + "\n")


def write_sglang_dump(path: Path) -> None:
    ids = torch.full((2, 3, 8), -1, dtype=torch.int32)
    ids[:, :, :2] = torch.tensor(EXPERTS.transpose(1, 0, 2))
    record = {
        "forward_pass_id": 1,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": [5, 6, 7],
        "positions": [0, 1, 2],
        "extend_seq_lens": [3],
        "forward_mode": 1,
        "topk_ids_of_layer": ids,
        "misc_objects": [],
    }
    slots = torch.arange(4).repeat(2, 1)
    torch.save({"records": [record], "last_physical_to_logical_map": slots}, path)


def write_sglang_stat(path: Path) -> None:
    torch.save({"rank": 0, "logical_count": torch.tensor([LOADS])}, path)


def write_trtllm_statistic(path: Path) -> None:
    path.mkdir()
    meta = {"num_experts": 4, "num_experts_per_token": 2}
    (path / "meta_info.json").write_text(json.dumps(meta))
    tensors = {f"100_{n}": torch.tensor(row) for n, row in enumerate(LOADS)}
    save_file(tensors, path / "rank0.safetensors")


def write_csv_loads(path: Path) -> None:
    rows = [
        f"{n},{e},{count}" for n, row in enumerate(LOADS) for e, count in enumerate(row)
    ]
    path.write_text("\n".join(["layer,expert,count", *rows]) + "\n")


def write_load_matrix(path: Path) -> None:
    path.write_text(json.dumps(LOADS))


def by_token_and_layer() -> list[tuple[tuple[int, int], Any]]:
    """Return the experts of each token and layer, as lists."""
    return [((t, n), EXPERTS[t, n].tolist()) for t in range(3) for n in range(2)]


#: How each format's smallest file is written, and the end of its name.
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "npz": (write_npz, ".npz"),
    "exflow": (write_exflow, ".npy"),
    "csv": (write_csv, ".csv"),
    "jsonl": (write_jsonl, ".jsonl"),
    "json-requests": (write_json_requests, ".jsonl"),
    "sglang-routed": (write_sglang_routed, ".jsonl"),
    "sglang-dump": (write_sglang_dump, ".pt"),
    "vllm-routed": (write_vllm_routed, ".jsonl"),
    "sglang-stat": (write_sglang_stat, ".pt"),
    "trtllm-statistic": (write_trtllm_statistic, ""),
    "csv-loads": (write_csv_loads, ".csv"),
    "load-matrix": (write_load_matrix, ".json"),
}
NEED_MODEL = {"sglang-routed"}


def test_every_format_has_a_file_a_line_of_help_and_a_row_in_the_docs() -> None:
    names = (*TOKEN_FORMATS, *LOAD_FORMATS)
    assert set(FILES) == set(names)
    listed = re.findall(r"^ {6}(\S.*?)  ", import_.__doc__ or "", re.MULTILINE)
    assert sorted(", ".join(listed).split(", ")) == sorted(names)
    docs = Path(__file__).parents[2] / "docs" / "importing.md"
    rows = re.findall(r"^\| `([^`]+)` \|", docs.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(names) <= set(rows)


@pytest.mark.parametrize("name", FILES)
def test_the_smallest_file_comes_in_as_it_was_written(name: str, tmp_path: Path) -> None:
    write, suffix = FILES[name]
    file, out = tmp_path / f"recorded{suffix}", tmp_path / "out"
    write(file)
    words = ["import", name, str(file), "--out", str(out)]
    if name in NEED_MODEL:
        config = tmp_path / "config.json"
        config.write_text(json.dumps(CONFIG))
        words += ["--model", str(config)]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code in (None, 0)
    if name in LOAD_FORMATS:
        assert [row.tolist() for row in Affinity.read(out).load] == LOADS
        return
    read = Trace(out).read()
    expected = EXPERTS[:, :, :1] if name == "exflow" else EXPERTS
    assert np.stack(read.experts, axis=1).tolist() == expected.tolist()
    assert read.sequence_ids.tolist() == [0, 0, 0]
