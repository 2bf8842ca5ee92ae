"""Every reader that the fuzzers feed, each with small valid files to start from.

A reader may refuse what it is given by a :class:`PlacerError`. Any other exception is a
fault, and so is a reader that takes long.
"""

import base64
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from placer.affinity import Affinity
from placer.affinity.load_files import read_csv_loads, read_load_matrix
from placer.affinity.loads import read_sglang_stat
from placer.checkpoint.deepspeed import load_states
from placer.checkpoint.record import ExportRecord
from placer.checkpoint.shard import Shard
from placer.checkpoint.source import CheckpointSource
from placer.checkpoint.torch_shard import open_torch_shard
from placer.model import ModelSpec
from placer.placement import Plan
from placer.placement.world import read_costs
from placer.planning.certificate_file import read_certificate
from placer.runtime_map.maps import RUNTIMES, export_map, verify_map
from placer.shuffle import ShuffleTable
from placer.solver.params import SolverParams
from placer.table import Table
from placer.target.hardware import Hardware
from placer.target.map_formats import MAPS
from placer.trace import Trace
from placer.trace.csv_rows import read_csv
from placer.trace.imported import BoundModel
from placer.trace.json_rows import Keys, jsonl_reader, requests_reader
from placer.trace.npz import read_exflow, read_npz
from placer.trace.routed_experts import read_sglang_routed, read_vllm_routed
from placer.trace.sglang_dump import read_sglang_dump

OLD = Path(__file__).parents[1] / "data" / "schema1"


@dataclass(frozen=True)
class Target:
    """A reader: what it reads, valid files, and how their content is to be understood.

    Attributes
    ----------
    read
        Takes the bytes of a file and a folder to put it in.
    seeds
        Valid files.
    kind
        json, jsonl, text, safetensors, npz, npy or torch: what the mutations know of it.
    refusals
        Exceptions beside :class:`PlacerError` that the reader documents.
    """

    read: Callable[[bytes, Path], Any]
    seeds: tuple[bytes, ...]
    kind: str
    refusals: tuple[type[Exception], ...] = ()


def file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    def run(content: bytes, folder: Path) -> Any:
        (folder / name).write_bytes(content)
        return read(folder / name)

    return run


def inside(name: str, read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    return file(name, lambda path: read(path.parent))


def imported(
    name: str,
    read: Callable[[Path, BoundModel | None], Any],
    content: bytes,
    kind: str,
    model: BoundModel | None = None,
) -> Target:
    """A file that ``placer import`` reads."""
    return Target(file(name, lambda path: read(path, model)), (content,), kind)


def chunk(content: bytes, folder: Path) -> Any:
    """A chunk with a header that vouches for it, as whoever forges one would write it."""
    header = json.loads((OLD / "trace" / "trace.json").read_text())
    header["chunks"][0]["sha256"] = sha256(content).hexdigest()
    (folder / "trace.json").write_text(json.dumps(header))
    (folder / header["chunks"][0]["file"]).write_bytes(content)
    return Trace(folder).read()


def checkpoint(content: bytes, folder: Path) -> Any:
    """The index of a checkpoint whose one shard is sound."""
    shutil.copy(OLD / "model" / "model.safetensors", folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(content)
    return CheckpointSource.open(folder)


def torch_bytes(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def npz_bytes(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npy_bytes(value: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, value)
    return stream.getvalue()


def lines(*values: Any) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in values)


def _experts(num_tokens: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = [[rng.permutation(8)[:2] for _ in range(2)] for _ in range(num_tokens)]
    return np.asarray(rows)


def _maps() -> dict[str, Target]:
    found = {}
    plan, model = OLD / "plan.json", OLD / "model"
    kinds = {".json": "json", ".pt": "torch", ".npz": "npz", ".safetensors": "safetensors"}
    with tempfile.TemporaryDirectory() as folder:
        for name, runtime in RUNTIMES.items():
            for suffix in MAPS[name].suffixes:
                out = Path(folder) / f"{name}{suffix}"
                export_map(name, plan, model, out)
                seeds, kind = (out.read_bytes(),), kinds.get(suffix, "text")

                def both(path: Path, runtime: Any = runtime) -> None:
                    try:
                        runtime.parse(path, path.suffix)
                    finally:
                        verify_map(path, plan, model)

                read = file(f"map{suffix}", both)
                found[f"{name} map {suffix}"] = Target(read, seeds, kind)
    return found


def _readers() -> dict[str, Target]:
    experts = _experts()
    ids = {"output_ids": [8, 9], "prompt_token_ids": [5, 6, 7]}
    model = BoundModel.of(OLD / "model")
    served = np.zeros((4, model.num_hidden_layers, model.spec.top_k), "<i4")
    served[:] = np.arange(model.spec.top_k)
    raw = base64.b64encode(served.tobytes()).decode()
    packed = base64.b64encode(npy_bytes(experts[:4].astype(np.int16))).decode()
    sglang = {
        **ids,
        "text": "x",
        "meta_info": {"prompt_tokens": 3, "completion_tokens": 2, "routed_experts": raw},
    }
    vllm = {
        "choices": [{"routed_experts": packed, "token_ids": [8, 9]}],
        "prompt_token_ids": [5, 6, 7],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    dump = {
        "records": [
            {
                "forward_pass_id": 0,
                "forward_mode": 1,
                "extend_seq_lens": [6],
                "input_ids": list(range(6)),
                "positions": list(range(6)),
                "topk_ids_of_layer": torch.from_numpy(experts.transpose(1, 0, 2).copy()),
            }
        ],
        "last_physical_to_logical_map": torch.arange(8).repeat(2, 1),
    }
    rows = [
        {"sequence_id": 0, "position": t, "layer": n, "experts": experts[t, n].tolist()}
        for t in range(3)
        for n in range(2)
    ]
    table = "sequence_id,position,layer,e0,e1,token_id,phase,w0,w1\n" + "".join(
        f"0,{t},{n},{experts[t, n, 0]},{experts[t, n, 1]},5,prefill,0.6,0.4\n"
        for t in range(3)
        for n in range(2)
    )
    counts = np.arange(16).reshape(2, 8)
    loads = "layer,expert,count\n" + "".join(f"{n},{e},3\n" for n in (0, 1) for e in (0, 1))
    archive = npz_bytes(
        experts=experts,
        sequence_ids=np.zeros(6, np.int64),
        token_ids=np.arange(6),
        weights=np.full(experts.shape, 0.5),
        domain_of_sequence=np.zeros(1, np.int64),
        domain_names=np.array(["a"]),
    )
    hardware = (
        b"bf16_flops = 1e12\nfp8_flops = 1e12\nmemory_bandwidth = 1e12\n"
        b'notes = ["a"]\nfast = { bandwidth = 1e9, latency = 1e-6 }\n'
        b"[slow]\nbandwidth = 1e9\nlatency = 1e-6\nboth_ways = [[0, 1], [1, 2]]\n"
        b"one_way = [[0, 1], [1, 2]]\n"
    )
    expert_key = "m.deepspeed_moe.experts.deepspeed_experts.0.w"
    shard = (OLD / "model" / "model.safetensors").read_bytes()
    layer = {
        **{"bound": 9, "proved_by": "prices", "most_load": 8, "most_cost": 8},
        **{"together": [[0, 1]], "apart": [0, 1], "prices": [3, -2]},
        **{"cuts": [[0, 1, 2]], "cut_prices": [-1]},
    }
    certificate = {
        **{"schema_version": 2, "kind": "certificate", "plan_sha256": "0" * 64},
        **{"trace_sha256": "1" * 64, "fold": "0/2", "phase": None, "num_ranks": 2},
        **{"num_tokens": 8, "max_imbalance": 1.1, "scale": 1024, "layers": [layer]},
        "sha256": None,
    }
    index = {"metadata": {}, "weight_map": dict.fromkeys(["a", "b"], "model.safetensors")}

    def named(name: str) -> bytes:
        return (OLD / name).read_bytes()

    return {
        "plan": Target(
            file("plan.json", Plan.read),
            (
                named("plan.json"),
                *(
                    json.dumps(Plan.read(OLD / one).to_json() | {"sha256": None}).encode()
                    for one in ("plan.json", "replicas.json", "token.json", "balance.json")
                ),
            ),
            "json",
        ),
        "affinity": Target(
            file("a", Affinity.read), (named("affinity.safetensors"),), "safetensors"
        ),
        "table": Target(
            file("t", Table.read), (named("table.safetensors"),), "safetensors"
        ),
        "table of a runtime": Target(
            file("t", ShuffleTable.read),
            (named("table.safetensors"),),
            "safetensors",
            (ValueError,),
        ),
        "trace header": Target(
            inside("trace.json", Trace), (named("trace/trace.json"),), "json"
        ),
        "chunk": Target(chunk, (named("trace/chunk-00000.safetensors"),), "safetensors"),
        "export record": Target(
            inside("placer.json", ExportRecord.read),
            (named("checkpoint/placer.json"),),
            "json",
        ),
        "certificate": Target(
            file("c.json", read_certificate), (json.dumps(certificate).encode(),), "json"
        ),
        "config": Target(
            inside("config.json", ModelSpec.from_checkpoint),
            (named("model/config.json"),),
            "json",
        ),
        "index": Target(checkpoint, (json.dumps(index).encode(),), "json"),
        "shard": Target(file("x.safetensors", Shard.open), (shard,), "safetensors"),
        "torch shard": Target(
            file("x.bin", partial(open_torch_shard, name="x")),
            (torch_bytes({"a": torch.zeros(2, 3), "b": torch.ones(4)}),),
            "torch",
        ),
        "deepspeed": Target(
            file("x.pt", load_states),
            (torch_bytes({"module": {expert_key: torch.zeros(2)}, "steps": [1, 2]}),),
            "torch",
        ),
        "topology": Target(file("c", read_costs), (b"[[0, 1], [1, 0]]",), "json"),
        "hardware": Target(
            file("h.toml", lambda path: Hardware.named(str(path))), (hardware,), "text"
        ),
        "parameters": Target(
            file("p.toml", SolverParams.read),
            (b"num_sweeps = 32\ncooling = 0.5\n",),
            "text",
        ),
        "npz": imported("r.npz", read_npz, archive, "npz"),
        "exflow": imported("r.npy", read_exflow, npy_bytes(experts[:, :, 0]), "npy"),
        "csv": imported("r.csv", read_csv, table.encode(), "text"),
        "json lines": imported(
            "r.jsonl", jsonl_reader(Keys(named={})), lines(*rows), "jsonl"
        ),
        "requests": imported(
            "r.jsonl",
            requests_reader(Keys(named={})),
            lines({str(n): experts[:, n].tolist() for n in range(2)}),
            "jsonl",
        ),
        "sglang responses": imported(
            "r.jsonl", read_sglang_routed, lines(sglang), "jsonl", model
        ),
        "vllm responses": imported("r.jsonl", read_vllm_routed, lines(vllm), "jsonl"),
        "sglang dump": imported("r.pt", read_sglang_dump, torch_bytes(dump), "torch"),
        "sglang statistics": imported(
            "r.pt",
            read_sglang_stat,
            torch_bytes({"logical_count": torch.from_numpy(counts)}),
            "torch",
        ),
        "csv loads": imported("r.csv", read_csv_loads, loads.encode(), "text"),
        "matrix .npy": imported("m.npy", read_load_matrix, npy_bytes(counts), "npy"),
        "matrix .json": imported(
            "m.json",
            read_load_matrix,
            json.dumps({"counts": counts.tolist()}).encode(),
            "json",
        ),
    }


TARGETS: dict[str, Target] = {**_readers(), **_maps()}
#: The five whose parsers take bytes or JSON first, before anything else has checked them.
GUIDED = ("shard", "plan", "trtllm map .yaml", "sglang responses", "config")
