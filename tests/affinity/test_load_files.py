"""Bare counts, as matrices and CSV, become the loads of the right layers."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from placer.affinity import Affinity
from placer.affinity.load_files import read_csv_loads, read_load_matrix
from placer.affinity.loads import import_loads, trtllm_statistic_reader
from placer.errors import PlacerError
from placer.trace.imported import ImportOptions
from tests.affinity.test_loads import CONFIG, COUNTS, statistic

DENSE = [[0, 0, 0, 0], *COUNTS]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


def loads(
    read: Any, path: Path, model: Path | None, told: list[str] | None = None
) -> list[list[int]]:
    out = path.with_suffix(".counts")
    out.unlink(missing_ok=True)
    told = [] if told is None else told
    import_loads(
        read, "x", path, out, ImportOptions(model_directory=model, warn=told.append)
    )
    return [row.tolist() for row in Affinity.read(out).load]


@pytest.mark.parametrize("matrix", [COUNTS, DENSE, [DENSE, DENSE]])
@pytest.mark.parametrize("suffix", [".npy", ".pt", ".json", "logical_count.json"])
def test_matrices(tmp_path: Path, model: Path, matrix: Any, suffix: str) -> None:
    """MoE layers, all hidden layers, or several passes that add up."""
    path = tmp_path / f"m{suffix}"
    if suffix == ".npy":
        np.save(path, np.asarray(matrix, dtype=np.float64))
    elif suffix == ".pt":
        torch.save(torch.tensor(matrix), path)
    else:
        value = {"logical_count": matrix} if suffix != ".json" else matrix
        path.write_text(json.dumps(value))
    times = 2 if len(np.shape(matrix)) == 3 else 1
    expected = (times * np.asarray(COUNTS)).tolist()
    assert loads(read_load_matrix, path, model) == expected


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dense_row", [False, True])
def test_layers_of_csv_are_places_or_the_models_own_numbers(
    first: int, dense_row: bool, tmp_path: Path, model: Path
) -> None:
    """Numbers up to the last hidden layer are no places among the MoE layers behind it."""
    lines = ["Layer,Expert,Count"]
    lines += ["0,3,0"] if dense_row and first else []
    lines += [
        f"{layer + first},{expert},{count}"
        for layer, row in enumerate(COUNTS)
        for expert, count in enumerate(row)
    ]
    (tmp_path / "c.csv").write_text("\n".join(lines) + "\n")
    assert loads(read_csv_loads, tmp_path / "c.csv", model) == COUNTS


def test_layers_may_be_an_object_under_a_name(tmp_path: Path, model: Path) -> None:
    value = {"model": "x", "load": {f"layer_{n}": row for n, row in enumerate(DENSE)}}
    (tmp_path / "m.json").write_text(json.dumps(value))
    assert loads(read_load_matrix, tmp_path / "m.json", model) == COUNTS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["whole", "named", "layers", "object"])
def test_float_tensors_of_whole_numbers(
    tmp_path: Path, model: Path, dtype: torch.dtype, layout: str
) -> None:
    """NumPy has no bfloat16: what PyTorch counts in it is read all the same."""
    matrix = torch.tensor(COUNTS, dtype=dtype)
    values: dict[str, Any] = {
        "whole": matrix,
        "named": {"expert_load": matrix},
        "layers": list(matrix),
        "object": {str(n + 1): row for n, row in enumerate(matrix)},
    }
    torch.save(values[layout], tmp_path / "m.pt")
    assert loads(read_load_matrix, tmp_path / "m.pt", model) == [*COUNTS]
    torch.save(matrix + 0.5, tmp_path / "half.pt")
    with pytest.raises(PlacerError, match="not a whole number"):
        loads(read_load_matrix, tmp_path / "half.pt", model)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([[1.5, 2]], "holds a value that is not a whole number"),
        ([1, 2], r"has shape \[2\], expected \[L, E\]"),
        ([[1, 2], [3]], "is not an array"),
        ({"rows": [[1]]}, "it holds rows, and none of logical_count"),
        ([[1, 2, 3, 4]], "it has 1 layers, the model 2 MoE layers of 3 hidden layers"),
        ([[1, 0, 0, 0], *COUNTS], "layer 0 has counts, but the model's MoE layers"),
    ],
)
def test_matrices_that_are_none(
    tmp_path: Path, model: Path, value: Any, match: str
) -> None:
    (tmp_path / "m.json").write_text(json.dumps(value))
    with pytest.raises(PlacerError, match=match) as caught:
        loads(read_load_matrix, tmp_path / "m.json", model)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"layer_1_a": [1, 2], "layer_1_b": [3, 4]}, "layer 1 has counts twice"),
        ({"1": {"e1_a": 1, "e1_b": 2}}, "layer 1, expert 1 has counts twice"),
        ({"1": {"0": [1, 2]}}, r"layer 1, expert 0 holds \[1, 2\], expected one count"),
        ({"1": {"999999999": 1}}, "placer supports at most"),
        ({"1": 5}, "layer 1 holds 5, expected a list of counts"),
        ({"1": [[1, 2], [3]], "2": [1, 2]}, "expected a list of counts"),
        ({"0": [[1, 2], [3, 4]], "1": [[1, 2], [3, 4]]}, "expected a list of counts"),
    ],
)
def test_layers_that_are_none(tmp_path: Path, value: Any, match: str) -> None:
    (tmp_path / "m.json").write_text(json.dumps(value))
    with pytest.raises(PlacerError, match=match):
        read_load_matrix(tmp_path / "m.json", None)


def test_an_expert_without_a_key_has_no_tokens(tmp_path: Path, model: Path) -> None:
    """The last expert of the first layer, of layers counted over MoE layers."""
    value = [dict(enumerate(row)) for row in COUNTS]
    del value[0][len(COUNTS[0]) - 1]
    (tmp_path / "m.json").write_text(json.dumps(dict(enumerate(value))))
    found = loads(read_load_matrix, tmp_path / "m.json", model)
    assert found == [[*COUNTS[0][:-1], 0], *COUNTS[1:]]


def test_columns_of_experts_stand_in_any_order(tmp_path: Path, model: Path) -> None:
    """Sorted as text, 10 stands before 2."""
    counts = np.arange(1, 12)
    for first in (0, 1):
        names = [f"e{n + first}" for n in range(11)]
        order = sorted(range(11), key=names.__getitem__)
        lines = ["layer," + ",".join(names[n] for n in order)]
        lines += ["0," + ",".join(str(counts[n]) for n in order)]
        (tmp_path / "m.csv").write_text("\n".join(lines))
        assert loads(read_csv_loads, tmp_path / "m.csv", None) == [counts.tolist()]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("layer,e0,e1\n0,1,2\n0,3,4\n", "layer 0 has counts twice"),
        ("layer,e0,e1\n-1,1,2\n", "row 1 after the header holds -1 in column layer"),
        ("layer,e0,e2\n0,1,2\n", r"2 columns of experts have the numbers \[0, 2\]"),
        ("layer,e0,e00\n0,1,2\n", r"2 columns of experts have the numbers \[0, 0\]"),
        ("layer,e1,e2,e3\n1,1,2,3\n", "number them from 0"),
        ("layer,e0,e0\n0,1,2\n", "its header names column e0 twice"),
        ("Layer,layer,expert,count\n0,0,1,2\n", "columns Layer and layer mean the same"),
        ("layer,expert,load,tokens\n0,1,2,2\n", "load and tokens mean the same: count"),
    ],
)
def test_csv_with_columns_or_layers_twice(
    tmp_path: Path, model: Path, text: str, match: str
) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(PlacerError) as caught:
        loads(read_csv_loads, tmp_path / "m.csv", model)
    assert re.search(match, f"{caught.value} {caught.value.hint}")


def test_a_column_of_its_usual_name_is_taken_first(tmp_path: Path, model: Path) -> None:
    lines = ["layer_id,layer_idx,expert_id,count,tokens"]
    lines += [f"{n},7,{e},{c},9" for n, row in LAYERS.items() for e, c in enumerate(row)]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    assert loads(read_csv_loads, tmp_path / "m.csv", model) == COUNTS


LAYERS = {n + 1: row for n, row in enumerate(COUNTS)}


@pytest.mark.parametrize(
    "value",
    [
        LAYERS,
        {f"layer_{n}": row for n, row in LAYERS.items()},
        {f"model.layers.{n}.mlp": row for n, row in LAYERS.items()},
        {n: dict(enumerate(row)) for n, row in LAYERS.items()},
        {"expert_load": COUNTS},
    ],
)
def test_counts_by_layer(tmp_path: Path, model: Path, value: Any) -> None:
    """Layers are the model's own: layer 0 is dense."""
    path = tmp_path / "m.json"
    path.write_text(json.dumps(value))
    assert loads(read_load_matrix, path, model) == COUNTS


@pytest.mark.parametrize("name", ["arr_0", "load", "anything"])
def test_archives_of_a_matrix(tmp_path: Path, model: Path, name: str) -> None:
    np.savez(tmp_path / "m.npz", **{name: np.asarray(COUNTS)})
    assert loads(read_load_matrix, tmp_path / "m.npz", model) == COUNTS


def test_csv_under_other_names(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "m.csv"
    lines = [f"{n},{e},{c}.0" for n, row in LAYERS.items() for e, c in enumerate(row)]
    path.write_text("\n".join(["layer_idx,expert_idx,tokens", *lines]))
    assert loads(read_csv_loads, path, model) == COUNTS
    path.write_text(path.read_text().replace(".0", ".5"))
    with pytest.raises(PlacerError, match="not a whole number"):
        loads(read_csv_loads, path, model)
    path.write_text("layer,expert,count\n0,0,3\n0,1,-4\n")
    with pytest.raises(PlacerError, match="row 2 after the header holds -4 in column cou"):
        loads(read_csv_loads, path, model)
    wide = ["layer," + ",".join(f"expert_{e}" for e in range(len(COUNTS[0])))]
    wide += [",".join(map(str, (n, *row))) for n, row in LAYERS.items()]
    path.write_text("\n".join(wide))
    assert loads(read_csv_loads, path, model) == COUNTS


def test_pickles_in_a_matrix_are_never_loaded(tmp_path: Path, model: Path) -> None:
    np.save(tmp_path / "m.npy", np.asarray([{}], dtype=object), allow_pickle=True)
    with pytest.raises(PlacerError, match="no readable"):
        loads(read_load_matrix, tmp_path / "m.npy", model)
    torch.save([Path("x")], tmp_path / "m.pt")
    with pytest.raises(PlacerError, match="placer runs no code"):
        loads(read_load_matrix, tmp_path / "m.pt", model)


def test_sglangs_old_csv_has_the_models_own_layers(tmp_path: Path, model: Path) -> None:
    """``layer_id,expert_id,count``: layers 1 and 2, which are MoE layers 0 and 1."""
    lines = [f"{n + 1},{e},{c}" for n, row in enumerate(COUNTS) for e, c in enumerate(row)]
    path = tmp_path / "old.csv"
    path.write_text("\n".join(["layer_id,expert_id,count", *lines]))
    assert loads(read_csv_loads, path, model) == COUNTS
    assert loads(read_csv_loads, path, None) == COUNTS
    assert Affinity.read(path.with_suffix(".counts")).model.layer_ids == (1, 2)


def test_choices_are_counted(tmp_path: Path, model: Path) -> None:
    """``layer,expert``, one row for each choice of a token, as llama.cpp traces them."""
    rng = np.random.default_rng(0)
    rows = [
        (n + 1, e)
        for n, row in enumerate(COUNTS)
        for e, c in enumerate(row)
        for _ in range(c)
    ]
    text = "\n".join(f"{layer},{expert}" for layer, expert in rng.permutation(rows))
    (tmp_path / "c.csv").write_text(f"layer,expert\n{text}\n")
    assert loads(read_csv_loads, tmp_path / "c.csv", model) == COUNTS


def test_counts_of_drafting_layers_are_left_out_and_told(tmp_path: Path) -> None:
    """TensorRT-LLM counts the MTP layer under the number after the last one, here 3."""
    (tmp_path / "config.json").write_text(
        json.dumps(CONFIG | {"num_nextn_predict_layers": 1})
    )
    ranks = [{"7_1": COUNTS[0], "7_2": COUNTS[1], "7_3": [9, 9, 9, 9]}]
    told: list[str] = []
    path = statistic(tmp_path / "s", ranks, 4)
    found = loads(trtllm_statistic_reader(None), path, tmp_path / "config.json", told)
    assert found == COUNTS
    assert told == [
        "layer 3 is left out: it comes after the 3 hidden layers, so it is for "
        "multi-token prediction (MTP), and plans do not move its experts"
    ]


@pytest.mark.parametrize(
    "value", [[None, *COUNTS], {"0": None, "1": COUNTS[0], "2": COUNTS[1]}]
)
def test_null_is_a_layer_without_counts(value: Any, tmp_path: Path, model: Path) -> None:
    """Here of JSON that is gzipped and begins with a byte order mark."""
    text = "\ufeff" + json.dumps(value)
    (tmp_path / "m.json.gz").write_bytes(gzip.compress(text.encode()))
    assert loads(read_load_matrix, tmp_path / "m.json.gz", model) == COUNTS


@pytest.mark.parametrize("column", ["layer", "layer_id"])
def test_layers_of_csv_may_count_from_one(column: str, tmp_path: Path, model: Path) -> None:
    """Layers 2 and 3 can only be the model's layers 1 and 2."""
    lines = [f"{column},{column.replace('layer', 'expert')},count"]
    lines += [f"{n + 2},{e},{c}" for n, row in enumerate(COUNTS) for e, c in enumerate(row)]
    (tmp_path / "c.csv").write_text("\n".join(lines) + "\n")
    told: list[str] = []
    assert loads(read_csv_loads, tmp_path / "c.csv", model, told) == COUNTS
    assert "count from 1" in told[0]


@pytest.mark.parametrize(
    ("shape", "doubted"), [((24, 64), False), ((64, 24), True), ((24, 26), True)]
)
def test_a_matrix_that_may_be_transposed_is_doubted(
    shape: tuple[int, int], doubted: bool, tmp_path: Path
) -> None:
    """Not where the number of experts is given."""
    np.save(tmp_path / "m.npy", np.ones(shape, dtype=int))
    told: list[str] = []
    loads(read_load_matrix, tmp_path / "m.npy", None, told)
    words = f"{shape[0]} layers of {shape[1]} experts"
    assert [words in one for one in told] == [True] * doubted
    options = ImportOptions(num_experts=shape[1], warn=told.append)
    told.clear()
    import_loads(read_load_matrix, "x", tmp_path / "m.npy", tmp_path / "out", options)
    assert not told
