"""DeepSpeed itself loads the permuted checkpoint and computes the same.

What it sends does not change: its all-to-all is of the experts' capacity, full or not.

Skipped where DeepSpeed is not installed; on CPUs: DS_BUILD_OPS=0 pip install deepspeed.
"""

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from placer.checkpoint.deepspeed import export_deepspeed
from placer.model import ModelSpec
from placer.placement import Placement

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
# Every rank has its share of the experts: of a plain layer of 4, top 2, and of a residual
# one of 8, top 1.
# Noise that the gate would add per expert is off: no permutation commutes with it.
ENGINE = """
import sys

import deepspeed
import torch
from deepspeed.moe.layer import MoE

from placer.replay.traffic import TrafficCounter

action, folder, result = sys.argv[1:]
deepspeed.init_distributed(dist_backend="gloo")
rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()


def layer(**options):
    expert = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)
    )
    return MoE(8, expert, ep_size=size, eval_capacity_factor=8.0, min_capacity=0, **options)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = layer(num_experts=4, k=2, top2_2nd_expert_sampling=False)
        self.b = layer(num_experts=8, k=1, use_residual=True)

    def forward(self, x):
        x = x + self.a(x)[0]
        return x + self.b(x)[0]


net = Net()
for number, (name, parameter) in enumerate(net.named_parameters()):
    torch.manual_seed(number + 1000 * rank * ("deepspeed_experts" in name))
    parameter.data = torch.randn_like(parameter) / 2
engine = deepspeed.initialize(model=net, config={"train_batch_size": size})[0]
if action == "save":
    engine.save_checkpoint(folder, tag="t")
else:
    for parameter in net.parameters():
        parameter.data.zero_()
    engine.load_checkpoint(folder, tag="t", load_module_only=True)
engine.eval()
torch.manual_seed(rank)
with torch.no_grad():
    counter = TrafficCounter(num_layers=1, num_ranks=size, hidden_size=8)
    with counter, counter.within(0, "exchange"):
        output = engine(torch.randn(6, 8))
    sent = counter.traffic()
    found = {"output": output, "sent": torch.from_numpy(sent.dispatch + sent.combine)[0]}
    torch.save(found, f"{result}.{rank}")
# Threads of gloo that are still there when Python ends abort the process, now and then.
torch.distributed.barrier()
deepspeed.comm.destroy_process_group()
"""


def run(
    tmp_path: Path, num_ranks: int, action: str, folder: Path, result: str
) -> list[dict[str, torch.Tensor]]:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc_per_node", num_ranks, script, action, folder, tmp_path / result]
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [tmp_path / f"{result}.{rank}" for rank in range(num_ranks)]
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_deepspeed_computes_and_sends_the_same_from_the_permuted_checkpoint(
    write_plan: Callable[..., Path], tmp_path: Path, num_ranks: int
) -> None:
    before = run(tmp_path, num_ranks, "save", tmp_path / "saved", "before")
    rows = [random.Random(1).sample(range(size), size) for size in (4, 8)]
    placement = Placement.from_json(rows, (4, 8), num_ranks=num_ranks, num_nodes=1)
    plan = write_plan(ModelSpec(num_experts=(4, 8), top_k=1), placement)
    export_deepspeed(plan, tmp_path / "saved", tmp_path / "permuted" / "t")
    after = run(tmp_path, num_ranks, "load", tmp_path / "permuted", "after")
    # 6 tokens; capacity 8 x 2 x 6 / 4 of the layer of 4 experts, 8 x 6 / 8 of that of 8;
    # out and back, 8 numbers of 4 bytes.
    padded = 2 * (4 * 24 + 8 * 6) * 8 * 4
    for old, new in zip(before, after, strict=True):
        assert old["output"].abs().max() > 1
        assert torch.allclose(old["output"], new["output"], rtol=1e-5, atol=1e-5)
        assert (
            old["sent"].tolist() == new["sent"].tolist() == [padded / num_ranks] * num_ranks
        )
