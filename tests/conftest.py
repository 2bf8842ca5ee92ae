"""Small real things that many tests share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from placer.model import ModelSpec
from placer.trace import Chunk, Trace, TraceWriter

# A busy machine is slow. Speed is measured in benchmarks, never here.
settings.register_profile(
    "any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any speed")

#: A real router trace, without token ids.
GPT_OSS = Path(__file__).resolve().parents[1] / "traces" / "gpt-oss-20b"


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a finder of real router traces, as ``.npz``, by name.

    ``gpt-oss-20b`` is written from the trace that ships here. All others, and its token
    ids, do not ship: ``PLACER_TRACES`` names the folder of them, or the test is skipped.
    """

    def find(name: str, *, with_token_ids: bool = False) -> Path:
        if name == GPT_OSS.name and not with_token_ids:
            return shipped()
        file = Path(os.environ.get("PLACER_TRACES", "")) / f"{name}.npz"
        if "PLACER_TRACES" not in os.environ or not file.is_file():
            pytest.skip(f"needs {name}.npz, which does not ship: set PLACER_TRACES=FOLDER")
        return file

    def shipped() -> Path:
        file = tmp_path_factory.getbasetemp() / "shipped" / f"{GPT_OSS.name}.npz"
        if not file.exists():
            tokens = Trace(GPT_OSS).read()
            file.parent.mkdir()
            np.savez(
                file,
                experts=np.stack(tokens.experts, axis=1).astype(np.uint16),
                sequence_ids=tokens.sequence_ids,
            )
        return file

    return find


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of two worker processes, whose tasks can import the tests."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: placer[ray]")
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent / "run")}}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        runtime_env=here,
    )
    yield
    ray.shutdown()


@pytest.fixture
def make_chunk() -> Callable[..., Chunk]:
    """Return a builder of random routing in which neighbouring layers are linked."""

    def build(
        *,
        num_tokens: int = 400,
        num_experts: tuple[int, ...] = (8, 8, 8),
        top_k: int = 2,
        num_sequences: int = 8,
        vocab_size: int = 50,
        seed: int = 0,
    ) -> Chunk:
        rng = np.random.default_rng(seed)
        token_ids = rng.integers(vocab_size, size=num_tokens)
        experts = []
        for layer, size in enumerate(num_experts):
            taste = np.random.default_rng(1000 + layer).gumbel(size=(vocab_size, size))
            score = taste[token_ids] + rng.gumbel(size=(num_tokens, size))
            experts.append(np.argsort(-score, axis=1)[:, :top_k].astype(np.uint8))
        sequence_ids = np.sort(rng.integers(num_sequences, size=num_tokens)).astype(
            np.int32
        )
        starts = np.searchsorted(sequence_ids, sequence_ids)
        return Chunk(
            experts=tuple(experts),
            token_ids=token_ids.astype(np.int32),
            sequence_ids=sequence_ids,
            positions=(np.arange(num_tokens) - starts).astype(np.int32),
        )

    return build


@pytest.fixture
def make_trace(tmp_path: Path, make_chunk: Callable[..., Chunk]) -> Callable[..., Trace]:
    """Return a builder of a trace on disk, with the routing of ``make_chunk``."""

    def build(name: str = "trace", **options: object) -> Trace:
        chunk = make_chunk(**options)
        sizes = options.get("num_experts", (8, 8, 8))
        model = ModelSpec(num_experts=sizes, top_k=chunk.experts[0].shape[1])
        with TraceWriter(directory=tmp_path / name, model=model) as writer:
            writer.append(chunk)
            writer.finish()
        return Trace(tmp_path / name)

    return build


TINY_TEXT = "def add(one, two):\n    return one + two\n\nThe sum of two numbers. " * 12


def _save_tiny(model: object, folder: Path, **options: object) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TINY_TEXT], trainer)
    model.save_pretrained(folder, **options)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of 4 layers, of which 1 and 3 are MoE layers of 8 experts, top 2."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        initializer_range=0.2,
    )
    return _save_tiny(
        Qwen3MoeForCausalLM(config), tmp_path_factory.mktemp("qwen") / "model"
    )


@pytest.fixture(scope="session")
def tiny_sharded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OLMoE of 2 layers of 8 experts, bfloat16, in shards that cut through layers."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(1)
    config = OlmoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    model = OlmoeForCausalLM(config).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("olmoe") / "model"
    return _save_tiny(model, folder, max_shard_size="20KB")


@pytest.fixture
def write_plan(tmp_path: Path) -> Callable[..., Path]:
    """Return a writer of a plan that was not solved: of a placement as it is given."""
    from placer.placement import Placement
    from tests.plans import unsolved_plan

    def write(
        model: ModelSpec,
        placement: Placement,
        name: str = "plan.json",
        **provenance: object,
    ) -> Path:
        unsolved_plan(model, placement, **provenance).write(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def make_plan(write_plan: Callable[..., Path]) -> Callable[..., Path]:
    """Return a writer of a plan that places experts of a checkpoint at random."""
    from placer.placement.reference import random

    def build(model_directory: Path, *, seed: int = 0, num_ranks: int = 4) -> Path:
        model = ModelSpec.from_checkpoint(model_directory)
        name = f"plan-{model_directory.parent.name}-{seed}.json"
        return write_plan(model, random(model.num_experts, num_ranks, seed=seed), name)

    return build
