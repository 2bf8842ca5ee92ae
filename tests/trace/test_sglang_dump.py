"""Dumps made as SGLang's recorder makes them: physical ids, -1 padding, dense layers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from placer.errors import PlacerError
from placer.trace import Trace
from placer.trace.imported import import_file
from placer.trace.sglang_dump import read_sglang_dump

# Layer 0 is dense; 4 logical experts in 6 slots.
MAP = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2], [1, 0, 3, 2, 2, 3]])


def forward_pass(number: int, mode: int, lengths: list[int] | None, rows: list) -> dict:
    """Return a record; ``rows`` are [MoE layer][token] pairs of physical ids."""
    num_tokens = len(rows[0])
    ids = torch.full((3, num_tokens, 8), -1, dtype=torch.int32)
    ids[1:, :, :2] = torch.tensor(rows, dtype=torch.int32)
    positions = [p for n in lengths or [] for p in range(n)] or [9] * num_tokens
    return {
        "forward_pass_id": number,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": list(range(100, 100 + num_tokens)),
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": ids,
        "misc_objects": [],
    }


def dump(path: Path, **changes: object) -> Path:
    records = [
        forward_pass(1, 1, [2, 1], [[[0, 1], [4, 2], [5, 3]], [[0, 2], [3, 1], [5, 0]]]),
        forward_pass(2, 2, None, [[[3, 0], [1, 2]], [[1, 4], [2, 0]]]),
    ]
    torch.save({"records": records, "last_physical_to_logical_map": MAP} | changes, path)
    return path


def test_physical_ids_become_logical_and_phases_are_known(tmp_path: Path) -> None:
    path = dump(tmp_path / "d.pt")
    header = import_file(read_sglang_dump, "sglang-dump", path, tmp_path / "t")
    tokens = Trace(tmp_path / "t").read()
    assert header.model.num_layers == 2, "the dense layer is left out"
    assert tokens.experts[0].tolist() == [[3, 2], [3, 1], [2, 0], [0, 3], [2, 1]]
    assert tokens.experts[1].tolist() == [[1, 3], [2, 0], [3, 1], [0, 2], [3, 1]]
    assert tokens.sequence_ids.tolist() == [0, 0, 1, 2, 3]
    assert tokens.positions.tolist() == [0, 1, 0, 9, 9]
    assert tokens.phase.tolist() == [0, 0, 0, 1, 1]
    assert tokens.token_ids.tolist() == [100, 101, 102, 100, 101]


def test_padded_rows_are_no_tokens(tmp_path: Path) -> None:
    record = forward_pass(
        1, 1, [3], [[[0, 1], [-1, -1], [5, 3]], [[0, 2], [-1, -1], [5, 0]]]
    )
    path = dump(tmp_path / "d.pt", records=[record])
    import_file(read_sglang_dump, "sglang-dump", path, tmp_path / "t")
    assert Trace(tmp_path / "t").read().token_ids.tolist() == [100, 102]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"records": []}, "not a dump of mode per_token"),
        ({"logical_count": torch.ones(1, 3, 4)}, "only counts \\(mode stat\\)"),
        ({"last_physical_to_logical_map": MAP[:2]}, "of 3 layers"),
        ({"last_physical_to_logical_map": MAP[:, :4]}, "physical expert 5"),
        (
            {"last_physical_to_logical_map": MAP.float()},
            "the map float32, expected integers",
        ),
        ({"last_physical_to_logical_map": "x"}, "expected integers"),
        ({"records": [1]}, "not a dump of mode per_token"),
        ({"records": [{"topk_ids_of_layer": 7}]}, "not a dump of mode per_token"),
        ({"records": [{"topk_ids_of_layer": MAP[:, :0, None]}]}, "not a dump of mode"),
    ],
)
def test_what_is_no_such_dump_is_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    path = dump(tmp_path / "d.pt", **changes)
    with pytest.raises(PlacerError, match=words) as caught:
        import_file(read_sglang_dump, "sglang-dump", path, tmp_path / "t")
    assert caught.value.hint
    assert not (tmp_path / "t").exists()


def test_a_dump_that_runs_code_is_not_opened(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    path = dump(tmp_path / "d.pt", more=Hostile())
    with pytest.raises(PlacerError, match="placer runs no code"):
        import_file(read_sglang_dump, "sglang-dump", path, tmp_path / "t")
    assert not (tmp_path / "ran").exists()


def test_dense_layers_stay_where_a_model_says_which_they_are(tmp_path: Path) -> None:
    path = dump(tmp_path / "d.pt")
    bound = read_sglang_dump(path, object())
    assert bound.experts.shape == (5, 3, 2)
    assert (bound.experts[:, 0] == 0).all()
    assert np.array_equal(bound.experts[:, 1:], read_sglang_dump(path, None).experts)
