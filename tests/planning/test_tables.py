"""From a plan file and a trace to a table that is bound to both."""

import json

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from placer import __version__
from placer.errors import PlacerError
from placer.placement.reference import contiguous
from placer.planning.tables import TableOptions, make_table
from placer.run.files import sha256_file
from placer.trace import EVERYTHING, Chunk, Fold, Selection, Trace, TraceWriter


@pytest.fixture
def plan_of(write_plan):
    """Return a writer of the contiguous plan of a trace."""

    def write(trace, **provenance):
        return write_plan(trace.model, contiguous(trace.model.num_experts, 4), **provenance)

    return write


def write_checkpoint(folder, rows, num_experts=8):
    """A checkpoint of three MoE layers that holds its config, tokenizer and embedding."""
    folder.mkdir()
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "num_experts": num_experts,
        "num_experts_per_tok": 2,
        "hidden_size": rows.shape[1],
        "vocab_size": len(rows),
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    save_file(
        {"model.embed_tokens.weight": torch.as_tensor(rows, dtype=torch.bfloat16)},
        folder / "model.safetensors",
    )
    return folder


def test_the_table_names_the_files_that_it_depends_on(make_trace, plan_of):
    trace = make_trace()
    plan = plan_of(trace)
    table = make_table(plan, trace, fold=None, options=TableOptions()).table
    assert table.plan_sha256 == sha256_file(plan)
    assert table.trace_sha256 == trace.sha256
    assert table.model == trace.model
    assert table.provenance == {
        "placer": __version__,
        "fold": None,
        "phase": None,
        "shrinkage": 4.0,
        "max_home_imbalance": None,
        "unseen_ids": "prior",
        "exact_layers": [],
        "calibration": None,
    }


def test_the_profile_is_the_plans_own_unless_a_fold_is_given(make_trace, plan_of):
    trace = make_trace()
    plan = plan_of(trace, fold="0/2", trace_sha256=trace.sha256)
    own = make_table(plan, trace, fold=None, options=TableOptions())
    given = make_table(plan, trace, fold=Fold(1, 2), options=TableOptions())
    elsewhere = plan_of(trace, fold="0/2", trace_sha256="0" * 64)
    every = make_table(elsewhere, trace, fold=None, options=TableOptions())
    assert own.profile == Selection(Fold(0, 2))
    assert given.profile == Selection(Fold(1, 2))
    assert every.profile == EVERYTHING
    assert every.heldout is None
    assert own.heldout is not None
    assert not np.array_equal(own.table.token_confidence, given.table.token_confidence)


def test_held_out_figures_that_the_plan_has_seen_are_told(make_trace, plan_of):
    """The table has not seen them, but the placement was made for them."""
    trace = make_trace()
    plan = plan_of(trace, fold="0/2", trace_sha256=trace.sha256)

    def warnings(fold):
        result = make_table(plan, trace, fold=fold, options=TableOptions())
        return " ".join(w for w in result.warnings if "too good" in w)

    num_seen = len(np.unique(trace.read(Selection(Fold(0, 2))).sequence_ids))
    assert warnings(None) == warnings(Fold(0, 2)) == ""
    assert f"{num_seen} of the {num_seen} held-out sequences are in" in warnings(Fold(1, 2))


def test_the_vocabulary_of_an_unbound_trace_ends_at_the_largest_id(make_trace, plan_of):
    trace = make_trace()
    result = make_table(plan_of(trace), trace, fold=None, options=TableOptions())
    assert result.table.vocab_size == int(trace.read().token_ids.max()) + 1
    assert result.num_seen_ids == len(np.unique(trace.read().token_ids))


def test_a_checkpoint_gives_unseen_ids_a_row_and_the_tokenizer_a_hash(
    make_trace, plan_of, tmp_path
):
    """The trace of 50 ids knows that its vocabulary has 100; id 50 + n is like id n."""
    rows = np.random.default_rng(0).normal(size=(50, 16))
    folder = write_checkpoint(tmp_path / "model", np.vstack([rows, rows]))
    plain = make_trace()
    with TraceWriter(
        directory=tmp_path / "wide",
        model=msgspec.structs.replace(plain.model, vocab_size=100),
    ) as writer:
        writer.append(plain.read())
        writer.finish()
    trace = Trace(tmp_path / "wide")
    options = TableOptions(embeddings=folder)
    table = make_table(plan_of(trace), trace, fold=None, options=options).table
    own = np.unique(table.token_confidence[:, 50:], axis=1).shape[1]
    assert own > 1, "without the checkpoint all have one prior"
    assert table.tokenizer_sha256 == sha256_file(folder / "tokenizer.json")
    assert table.provenance["unseen_ids"] == "regression"


def test_a_checkpoint_of_another_model_is_refused(make_trace, plan_of, tmp_path):
    trace = make_trace()
    folder = write_checkpoint(tmp_path / "model", np.ones((50, 4)), num_experts=16)
    options = TableOptions(embeddings=folder)
    with pytest.raises(PlacerError, match="different models"):
        make_table(plan_of(trace), trace, fold=None, options=options)


def test_a_trace_without_token_ids_is_refused(make_trace, plan_of, tmp_path):
    plain = make_trace()
    tokens = plain.read()
    with TraceWriter(directory=tmp_path / "bare", model=plain.model) as writer:
        writer.append(
            Chunk(
                experts=tokens.experts,
                sequence_ids=tokens.sequence_ids,
                positions=tokens.positions,
            )
        )
        writer.finish()
    trace = Trace(tmp_path / "bare")
    with pytest.raises(PlacerError, match="no token ids") as error:
        make_table(plan_of(trace), trace, fold=None, options=TableOptions())
    assert "placer record MODEL" in error.value.hint
