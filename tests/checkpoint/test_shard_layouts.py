"""Any layout of shards, any spelling of headers: the export is right and undone exactly.

The oracle is the safetensors library, by name; the files are written here byte by byte.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from placer.checkpoint.export import export_checkpoint, prepare_restore
from placer.model import ModelSpec
from placer.placement import Placement

# Twelve experts: the numbers have one digit or two, so headers change their length.
NUM_EXPERTS = 12
LAYER_IDS = (0, 2)
CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "hidden_size": 2,
    "vocab_size": 3,
}
ROUTER = "model.layers.{}.mlp.gate.weight"
EXPERT = "model.layers.{}.mlp.experts.{}.{}"
PARTS = ("up_proj.weight", "up_proj.weight_scale_inv")


def all_tensors() -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor with bytes of its own: dtype, shape, content."""
    rng = np.random.default_rng(0)
    found = {"model.embed_tokens.weight": ("F16", [3, 2], rng.bytes(12))}
    for layer in LAYER_IDS:
        found[ROUTER.format(layer)] = ("BF16", [NUM_EXPERTS, 2], rng.bytes(48))
        for expert in range(NUM_EXPERTS):
            name = EXPERT.format(layer, expert, "{}")
            found[name.format(PARTS[0])] = ("F8_E4M3", [3, 1], rng.bytes(3))
            found[name.format(PARTS[1])] = ("F32", [1], rng.bytes(4))
    return found


TENSORS = all_tensors()


def write_model(
    folder: Path, shard_of: list[int], order: list[str], indent: int | None, padding: int
) -> None:
    """Write shards whose keys and data are in ``order``, with odd padding."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.txt").write_bytes(b"not\r\nread")
    names: dict[int, list[str]] = {}
    for name in order:
        names.setdefault(shard_of[order.index(name)], []).append(name)
    weight_map = {}
    for shard, held in names.items():
        header, data = {"__metadata__": {"format": "pt"}}, b""
        for name in held:
            dtype, shape, content = TENSORS[name]
            offsets = [len(data), len(data) + len(content)]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            data += content
            weight_map[name] = f"part-{shard}.safetensors"
        text = json.dumps(header, indent=indent).encode() + b" " * padding
        content = len(text).to_bytes(8, "little") + text + data
        (folder / f"part-{shard}.safetensors").write_bytes(content)
    index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_bytes(
        index.replace("\n", "\r\n").encode()
    )


def read_model(folder: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """All tensors' bytes and the shard of each, as the library reads them."""
    tensors, where = {}, {}
    for path in folder.glob("*.safetensors"):
        for name, info in deserialize(path.read_bytes()):
            tensors[name], where[name] = bytes(info["data"]), path.name
    return tensors, where


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_experts_cross_shards_and_come_back(
    data: st.DataObject, tmp_path: Path, write_plan: Callable[..., Path]
) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    order = data.draw(st.permutations(sorted(TENSORS)))
    count = len(order)
    shard_of = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    indent = data.draw(st.sampled_from([None, 0, 3]))
    padding = data.draw(st.integers(0, 9))
    rows = [data.draw(st.permutations(range(NUM_EXPERTS))) for _ in LAYER_IDS]
    write_model(folder / "model", shard_of, order, indent, padding)
    model = ModelSpec.from_checkpoint(folder / "model")
    assert model.layer_ids == LAYER_IDS
    placement = Placement.from_json(rows, model.num_experts, num_ranks=4, num_nodes=1)
    plan = write_plan(model, placement)

    export_checkpoint(plan, folder / "model", folder / "out")

    old, _ = read_model(folder / "model")
    new, where = read_model(folder / "out")
    index = json.loads((folder / "out" / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"] == where
    expected = dict(old)
    for layer, row in zip(LAYER_IDS, rows, strict=True):
        router = old[ROUTER.format(layer)]
        expected[ROUTER.format(layer)] = b"".join(router[4 * e : 4 * e + 4] for e in row)
        for e, source in enumerate(row):
            for part in PARTS:
                expected[EXPERT.format(layer, e, part)] = old[
                    EXPERT.format(layer, source, part)
                ]
    assert new == expected

    prepare_restore(folder / "out").write(folder / "back")
    assert contents(folder / "back") == contents(folder / "model")
