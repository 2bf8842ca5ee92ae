"""Real runs on four gloo ranks send what brute force counts, and compute the same.

The expected copies are counted here, token by token with sets, from what the routers of
the model choose when it runs by itself.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from placer.errors import PlacerError, UsageError
from placer.model import Architecture, ModelSpec
from placer.placement import Placement, Plan
from placer.planning.tables import TableOptions, make_table
from placer.replay.replay import ReplayOptions, replay
from placer.run.documents import read_json
from placer.run.worker import Worker
from placer.target.hardware import Hardware
from placer.trace import Chunk, Trace, TraceWriter
from placer.trace.capture import RouterCapture
from placer.trace.loading import load_causal_model
from tests.families import build, legal_rows, randomise
from tests.plans import unsolved_plan

NUM_RANKS, NUM_NODES, LENGTH, PASSES = 4, 2, 12, 2
HIDDEN_BYTES = 32 * 4
# Router groups, shared experts and a dense layer; biases, sinks and windows; one expert
# per token; redundant experts; layers whose tokens cannot follow.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", {}),
    "gpt_oss": ("gpt_oss", {}),
    "top1": ("qwen3_moe", {"num_experts_per_tok": 1}),
    "replicas": ("qwen3_moe", {}),
    "afmoe": ("afmoe", {}),
}
WORKER = """
import sys
from pathlib import Path

import torch

from placer.target.hardware import Hardware, Link
from placer.replay.replay import ReplayOptions, replay
from placer.trace import Trace
from placer.run.worker import Worker


def links_of(name, latency):
    link = Link(bandwidth=1e15, latency=latency)
    figures = dict.fromkeys(("bf16_flops", "fp8_flops", "memory_bandwidth"), 1.0)
    return Hardware(name=name, fast=link, slow=link, processor_share=0.5, **figures)


torch.distributed.init_process_group("gloo")
options = ReplayOptions(
    sequence_length=12,
    sequences_per_rank=2,
    num_passes=2,
    repeats=1,
    hardware=links_of("here", 0.0),
    elsewhere=(links_of("the same", 0.0), links_of("a second each", 1.0)),
)
for name in sys.argv[2:]:
    folder = Path(sys.argv[1]) / name
    table = folder / "table"
    outcome = replay(
        folder / "plan.json",
        folder / "model",
        Trace(folder / "trace"),
        options,
        Worker.of_environment(),
        table_path=table if table.exists() else None,
    )
    if outcome is not None:
        torch.save(
            [
                {
                    "placement": run.placement,
                    "exchange": run.exchange,
                    "dispatch": torch.from_numpy(run.dispatch),
                    "combine": torch.from_numpy(run.combine),
                    "gathered": run.to_json()["gathered_bytes"],
                    "keys_and_values": run.to_json()["keys_and_values_bytes"],
                    "as_predicted": run.as_predicted,
                    "error": run.error,
                    "differently_routed": run.differently_routed,
                    "seconds": run.seconds,
                    "elsewhere": run.elsewhere,
                }
                for run in outcome.runs
            ],
            folder / "outcome",
        )
torch.distributed.destroy_process_group()
"""


@dataclass(frozen=True)
class Replayed:
    """What a replay of one model found, and what its routers choose."""

    folder: Path
    runs: dict[tuple[str, str], dict[str, Any]]
    placements: dict[str, Placement]
    routing: list[list[list[int]]]

    @property
    def homes(self) -> list[int]:
        """The rank of each token's sequence."""
        return [token // LENGTH % NUM_RANKS for token in range(len(self.routing[0]))]


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Replayed]:
    root = tmp_path_factory.mktemp("replay")
    for name in MODELS:
        prepare(root / name, name)
    script = root / "worker.py"
    script.write_text(WORKER)
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    done = subprocess.run(
        [sys.executable, *words, script, root, *MODELS],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: collect(root / name) for name in MODELS}


def prepare(folder: Path, name: str) -> None:
    """Write a model, a trace of its tokens, a plan and its table."""
    model_type, options = MODELS[name]
    randomise(build(model_type, **options)).save_pretrained(folder / "model")
    spec = ModelSpec.from_checkpoint(folder / "model")
    rng = np.random.default_rng(3)
    num_sequences = PASSES * NUM_RANKS * 2 + 1
    sequences = np.repeat(np.arange(num_sequences, dtype=np.int32), LENGTH)
    rows = [
        np.argsort(rng.random((len(sequences), size)))[:, : spec.top_k]
        for size in spec.num_experts
    ]
    with TraceWriter(directory=folder / "trace", model=spec, provenance={}) as writer:
        writer.append(
            Chunk(
                experts=tuple(ids.astype(np.uint8) for ids in rows),
                token_ids=rng.integers(3, 60, len(sequences)).astype(np.int32),
                sequence_ids=sequences,
                positions=np.tile(np.arange(LENGTH, dtype=np.int32), num_sequences),
            )
        )
        writer.finish()
    slots = legal_rows(spec, seed=5)
    if name == "replicas":  # a second replica of an expert of the rank before
        slots = [
            [e for r in range(NUM_RANKS) for e in (*row[2 * r : 2 * r + 2], row[2 * r - 1])]
            for row in slots
        ]
    write_plan(folder / "plan.json", spec, slots)
    if name != "replicas":
        made = make_table(
            folder / "plan.json",
            Trace(folder / "trace"),
            fold=None,
            # The combined rule, and once the plain one.
            options=TableOptions(with_token_score=True, with_combined=name != "top1"),
        )
        made.table.write(folder / "table")


def write_plan(
    path: Path,
    spec: ModelSpec,
    slots: list[list[int]],
    *,
    num_ranks: int = NUM_RANKS,
    num_nodes: int = NUM_NODES,
) -> None:
    placement = Placement.from_json(
        slots, spec.num_experts, num_ranks=num_ranks, num_nodes=num_nodes
    )
    unsolved_plan(spec, placement).write(path)


def collect(folder: Path) -> Replayed:
    runs = torch.load(folder / "outcome", weights_only=True)
    spec = ModelSpec.from_checkpoint(folder / "model")
    slots = [list(range(size)) for size in spec.num_experts]
    model = load_causal_model(folder / "model", dtype="float32", device="cpu")
    architecture = Architecture.of(
        read_json(folder / "model/config.json", "config"), folder
    )
    tokens = Trace(folder / "trace").read().token_ids
    assert tokens is not None
    count = PASSES * NUM_RANKS * 2
    ids = torch.from_numpy(tokens[: count * LENGTH].astype(np.int64)).reshape(count, LENGTH)
    with RouterCapture(model, architecture, spec) as capture, torch.inference_mode():
        model(input_ids=ids)
        routing = [layer.ids.tolist() for layer in capture.take()]
    return Replayed(
        folder=folder,
        runs={(run["placement"], run["exchange"]): run for run in runs},
        placements={
            "contiguous": Placement.from_json(
                slots, spec.num_experts, num_ranks=NUM_RANKS, num_nodes=NUM_NODES
            ),
            "plan": Plan.read(folder / "plan.json").placement,
        },
        routing=routing,
    )


def ranks_of(placement: Placement, layer: int) -> dict[int, int]:
    row = placement.physical_to_logical_map[layer].tolist()
    return {e: slot // (len(row) // NUM_RANKS) for slot, e in enumerate(row)}


def copies(exchange: str, served: list[int], home: int) -> Iterator[tuple[int, int]]:
    """What one token sends: pairs of ranks."""
    if exchange == "all_to_all":
        yield from ((home, rank) for rank in served if rank != home)
    elif exchange == "placer-per-node":
        for node in {rank // 2 for rank in served}:
            landing = node * 2 + home % 2
            if node != home // 2:
                yield home, landing
            yield from (
                (landing, rank)
                for rank in set(served)
                if rank // 2 == node and rank != landing
            )
    else:
        yield from ((home, rank) for rank in set(served) if rank != home)


def matrix(counts: Counter[tuple[int, int]]) -> list[list[int]]:
    return [
        [counts[a, b] * HIDDEN_BYTES for b in range(NUM_RANKS)] for a in range(NUM_RANKS)
    ]


def without_diagonal(bytes_sent: torch.Tensor) -> list[list[int]]:
    result: list[list[int]] = bytes_sent.clone().fill_diagonal_(0).tolist()
    return result


FIXED = ("all_to_all", "placer-dedup", "placer-per-node")


@pytest.mark.parametrize("exchange", FIXED)
@pytest.mark.parametrize("placement", ["contiguous", "plan"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "top1"])
def test_every_rank_sends_every_other_what_brute_force_counts(
    replayed: dict[str, Replayed], name: str, placement: str, exchange: str
) -> None:
    one = replayed[name]
    run = one.runs[placement, exchange]
    for layer, routed in enumerate(one.routing):
        rank_of = ranks_of(one.placements[placement], layer)
        there: Counter[tuple[int, int]] = Counter()
        for experts, home in zip(routed, one.homes, strict=True):
            there.update(copies(exchange, [rank_of[e] for e in experts], home))
        back = Counter({(b, a): count for (a, b), count in there.items()})
        assert without_diagonal(run["dispatch"][layer]) == matrix(there)
        assert without_diagonal(run["combine"][layer]) == matrix(back)


@pytest.mark.parametrize("placement", ["contiguous", "plan"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "top1"])
def test_padded_bytes_are_those_of_the_capacity_that_no_token_exceeds(
    replayed: dict[str, Replayed], name: str, placement: str
) -> None:
    one = replayed[name]
    run = one.runs[placement, "padded"]
    half = len(one.homes) // PASSES
    for layer, routed in enumerate(one.routing):
        rows = 0
        for start in range(0, len(routed), half):
            chosen = zip(routed[start : start + half], one.homes[start:], strict=False)
            counts = Counter((home, e) for experts, home in chosen for e in experts)
            rows += max(counts.values())
        held = len(one.placements[placement].physical_to_logical_map[layer]) // NUM_RANKS
        for way in ("dispatch", "combine"):
            sent = set(run[way][layer].flatten().tolist())
            assert sent == {rows * held * HIDDEN_BYTES}


@pytest.mark.parametrize("placement", ["contiguous", "plan"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "top1"])
def test_tokens_that_follow_send_what_brute_force_counts(
    replayed: dict[str, Replayed], name: str, placement: str
) -> None:
    one = replayed[name]
    run = one.runs[placement, "placer-follow"]
    homes = one.homes
    for layer, routed in enumerate(one.routing):
        rank_of = ranks_of(one.placements[placement], layer)
        there: Counter[tuple[int, int]] = Counter()
        back: Counter[tuple[int, int]] = Counter()
        after = []
        for experts, home in zip(routed, homes, strict=True):
            served = [rank_of[e] for e in experts]
            most = max(served.count(rank) for rank in served)
            following = next(rank for rank in served if served.count(rank) == most)
            there.update((home, rank) for rank in set(served) if rank != home)
            back.update((rank, following) for rank in set(served) if rank != following)
            after.append(following)
        assert without_diagonal(run["dispatch"][layer]) == matrix(there)
        assert without_diagonal(run["combine"][layer]) == matrix(back)
        homes = after
    if name == "top1":
        assert int(run["combine"].sum()) == 0


def test_all_runs_are_as_predicted_and_compute_the_same(
    replayed: dict[str, Replayed],
) -> None:
    fixed = {*FIXED, "padded"}
    for name, one in replayed.items():
        moving = {"placer-shuffle", "placer-follow"}
        wanted = fixed if name == "replicas" else fixed | moving
        wanted = wanted - {"placer-follow"} if name == "afmoe" else wanted
        assert {
            exchange for placement, exchange in one.runs if placement == "plan"
        } == wanted
        for run in one.runs.values():
            assert run["as_predicted"]
            assert run["error"] < 1e-5
            assert run["differently_routed"] == 0
            assert run["seconds"] > 0


def test_a_pass_elsewhere_takes_what_its_collectives_take_there(
    replayed: dict[str, Replayed],
) -> None:
    """Where each lasts a second more, a pass lasts as many whole seconds more.

    Every MoE layer has two at least, whose bytes are known to the receivers by a third.
    """
    for one in replayed.values():
        for run in one.runs.values():
            assert set(run["elsewhere"]) == {"the same", "a second each"}
            assert run["elsewhere"]["the same"] == pytest.approx(run["seconds"])
            more = run["elsewhere"]["a second each"] - run["seconds"]
            assert more == pytest.approx(round(more), abs=1e-6)
            assert round(more) >= 3 * len(one.routing)


def test_predictions_that_cannot_be_told_are_refused() -> None:
    h100 = Hardware.named("h100")
    with pytest.raises(
        UsageError, match="--elsewhere h100 needs the links of this machine"
    ):
        ReplayOptions(elsewhere=(h100,))
    with pytest.raises(UsageError, match="only used with --elsewhere"):
        ReplayOptions(hardware=h100)
    with pytest.raises(UsageError, match="repeats is 0"):
        ReplayOptions(hardware=h100, elsewhere=(h100,), repeats=0)
    with pytest.raises(UsageError, match="have one name: h100, h100"):
        ReplayOptions(hardware=h100, elsewhere=(h100, h100))


@pytest.mark.parametrize(
    ("option", "asked"),
    [
        ("--sequence-length", {"sequence_length": 0}),
        ("--sequences-per-rank", {"sequences_per_rank": 0}),
        ("--passes", {"num_passes": 0}),
        ("--repeats", {"repeats": -1}),
    ],
)
def test_numbers_out_of_range_are_refused_by_their_option(
    option: str, asked: dict[str, int]
) -> None:
    with pytest.raises(UsageError, match=f"^{option} must") as error:
        ReplayOptions(**asked)
    assert error.value.hint


def test_a_table_gives_every_rank_the_same_share(replayed: dict[str, Replayed]) -> None:
    """The outputs of equal slices go to all other ranks, whatever the table says."""
    for name in ("deepseek_v3", "gpt_oss", "top1"):
        run = replayed[name].runs["plan", "placer-shuffle"]
        tokens, layers = len(replayed[name].routing[0]), len(replayed[name].routing)
        assert run["gathered"] == tokens * layers * HIDDEN_BYTES * (NUM_RANKS - 1)


def test_keys_and_values_of_every_token_go_to_every_other_rank(
    replayed: dict[str, Replayed],
) -> None:
    """gpt-oss here: 2 heads of keys and of values, 8 wide, in 4 layers."""
    config = read_json(replayed["gpt_oss"].folder / "model/config.json", "config")
    kv = 2 * config["num_key_value_heads"] * config["head_dim"] * 4
    tokens = len(replayed["gpt_oss"].routing[0])
    expected = tokens * config["num_hidden_layers"] * kv * (NUM_RANKS - 1)
    for (_, exchange), run in replayed["gpt_oss"].runs.items():
        assert run["keys_and_values"] == (expected if exchange == "placer-follow" else 0)


def test_copies_of_an_expert_serve_at_home(
    replayed: dict[str, Replayed],
) -> None:
    """A pair whose expert has a copy at home does not leave it."""
    one = replayed["replicas"]
    run = one.runs["plan", "all_to_all"]
    for layer, routed in enumerate(one.routing):
        row = one.placements["plan"].physical_to_logical_map[layer].reshape(NUM_RANKS, -1)
        away = sum(
            expert not in row[home]
            for experts, home in zip(routed, one.homes, strict=True)
            for expert in experts
        )
        assert (
            sum(map(sum, without_diagonal(run["dispatch"][layer]))) == away * HIDDEN_BYTES
        )


def test_plans_and_tokens_that_cannot_be_run_are_refused(
    replayed: dict[str, Replayed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any worker loads the model."""
    folder = replayed["top1"].folder
    spec = ModelSpec.from_checkpoint(folder / "model")

    def run(plan: str, trace: Path = folder / "trace", **options: Any) -> None:
        replay(
            Path(plan),
            folder / "model",
            Trace(trace),
            ReplayOptions(sequence_length=LENGTH, **options),
            Worker(number=1 if "alone" in plan else NUM_RANKS),
        )

    slots = [list(range(size)) for size in spec.num_experts]
    write_plan(tmp_path / "alone.json", spec, slots, num_ranks=1, num_nodes=1)
    with pytest.raises(UsageError, match="one rank, which sends nothing"):
        run(f"{tmp_path}/alone.json")
    with pytest.raises(UsageError, match="--dtype int8 is not known"):
        run(f"{folder}/plan.json", dtype="int8")
    with monkeypatch.context() as older:
        older.setitem(sys.modules, "transformers.distributed.expert_parallel", None)
        with pytest.raises(PlacerError, match="needs a transformers whose exchange"):
            run(f"{folder}/plan.json")
    chunk = Trace(folder / "trace").read()
    assert chunk.token_ids is not None
    chunk.token_ids[-NUM_RANKS * LENGTH :] = 64
    with TraceWriter(directory=tmp_path / "trace", model=spec, provenance={}) as writer:
        writer.append(chunk)
        writer.finish()
    with pytest.raises(PlacerError, match=r"token id 64, but the vocabulary of .* has 64"):
        run(f"{folder}/plan.json", tmp_path / "trace", num_passes=9, sequences_per_rank=1)
