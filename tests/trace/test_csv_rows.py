"""CSV rows in any order give the tokens that were written; gaps are named."""

import csv
import gzip
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from placer.errors import PlacerError
from placer.trace import Chunk, Trace
from placer.trace.csv_rows import read_csv
from placer.trace.imported import ImportOptions, import_file


def rows_of(chunk: Chunk) -> list[list[object]]:
    return [
        [chunk.sequence_ids[t], chunk.positions[t], chunk.token_ids[t], layer, *ids[t]]
        for t in range(chunk.num_tokens)
        for layer, ids in enumerate(chunk.experts)
    ]


def write(path: Path, rows: list[list[object]], header: str) -> Path:
    with path.open("w", newline="", errors="surrogateescape") as stream:
        writer = csv.writer(stream)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return path


HEADER = "sequence_id,position,token_id,layer,e0,e1"


def test_tokens_come_back_whatever_the_order(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    chunk = make_chunk(num_tokens=60)
    rows = rows_of(chunk)
    random.Random(0).shuffle(rows)
    path = write(tmp_path / "t.csv", rows, HEADER)
    import_file(read_csv, "csv", path, tmp_path / "t")
    read = Trace(tmp_path / "t").read()
    for ids, expected in zip(read.experts, chunk.experts, strict=True):
        assert np.array_equal(ids, expected)
    assert read.token_ids.tolist() == chunk.token_ids.tolist()
    assert read.positions.tolist() == chunk.positions.tolist()


@pytest.mark.parametrize(
    "header",
    [
        "Sequence_ID,POSITION,Token_Id,Layer,E0,E1",
        "request_id,position,token_id,layer,topk_1,topk_2",
        "request_id,position,token_id,layer,expert_id_0,expert_id_1",
    ],
)
def test_other_headers_mean_the_same(
    header: str, make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    chunk = make_chunk(num_tokens=60)
    import_file(
        read_csv, "csv", write(tmp_path / "t.csv", rows_of(chunk), header), tmp_path / "t"
    )
    read = Trace(tmp_path / "t").read()
    for ids, expected in zip(read.experts, chunk.experts, strict=True):
        assert np.array_equal(ids, expected)
    assert read.token_ids.tolist() == chunk.token_ids.tolist()


@pytest.mark.parametrize(
    ("change", "header", "words"),
    [
        (lambda rows: rows[:-1], HEADER, "does not have each of the layers 0 to 2 once"),
        (lambda rows: [*rows, rows[0]], HEADER, "does not have each of the layers"),
        (lambda rows: rows, HEADER.replace("layer", "depth"), "has no column layer"),
        (lambda rows: rows, HEADER.replace("e1", "e2"), "has no column e1"),
        (lambda rows: [["x", *rows[0][1:]], *rows], HEADER, "column sequence_id holds"),
        (lambda rows: [[*rows[0][:5], -1], *rows[1:]], HEADER, "1 of 30 tokens have -1"),
        (lambda rows: [[*rows[0][:4], 1, 1], *rows[1:]], HEADER, "twice"),
        (lambda rows: rows, HEADER.removesuffix(",e1"), "more values than the header"),
        (
            lambda rows: [[*one[:3], -1, *one[4:]] for one in rows],
            HEADER,
            "layer -1 is negative",
        ),
        (
            lambda rows: [[*rows[0][:3], 10**18, *rows[0][4:]]],
            HEADER,
            "is negative or beyond",
        ),
        (
            lambda rows: [[int(one[0]) + 2**31, *one[1:]] for one in rows],
            HEADER,
            "sequence_ids holds 21474836.., expected 0 to 2147483647",
        ),
        (lambda rows: [["\udcff", *rows[0][1:]]], HEADER, "is not a CSV file"),
    ],
)
def test_what_cannot_be_a_trace_is_refused(
    make_chunk: Callable[..., Chunk],
    tmp_path: Path,
    change: Callable[[list], list],
    header: str,
    words: str,
) -> None:
    rows = change(rows_of(make_chunk(num_tokens=30)))
    path = write(tmp_path / "t.csv", rows, header)
    with pytest.raises(PlacerError, match=words):
        import_file(read_csv, "csv", path, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_gzipped_file_is_read_and_one_that_unpacks_to_far_too_much_is_refused(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    chunk = make_chunk(num_tokens=60)
    plain = write(tmp_path / "t.csv", rows_of(chunk), HEADER).read_bytes()
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(plain))
    import_file(read_csv, "csv", tmp_path / "t.csv.gz", tmp_path / "t")
    for ids, expected in zip(
        Trace(tmp_path / "t").read().experts, chunk.experts, strict=True
    ):
        assert np.array_equal(ids, expected)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(plain + b"\n" * 70_000_000))
    with pytest.raises(PlacerError, match="unpacks to more than 100 times its size"):
        import_file(read_csv, "csv", tmp_path / "b.csv.gz", tmp_path / "b")


@pytest.mark.parametrize("columns", ["expert,weight", "expert,choice", "expert"])
def test_a_row_for_each_choice(
    columns: str, make_chunk: Callable[..., Chunk], tmp_path: Path
) -> None:
    """Choices are ordered by weight, by their number, or by the order of rows."""
    chunk = make_chunk(num_tokens=60)
    rows = [
        [*row[:4], expert, *([0.75 - choice / 4] if "weight" in columns else [choice])][
            : 4 + len(columns.split(","))
        ]
        for row in rows_of(chunk)
        for choice, expert in enumerate(row[4:])
    ]
    if columns != "expert":
        random.Random(0).shuffle(rows)
    header = f"sequence_id,position,token_id,layer,{columns}"
    told: list[str] = []
    path = write(tmp_path / "t.csv", rows, header)
    import_file(read_csv, "csv", path, tmp_path / "t", ImportOptions(warn=told.append))
    read = Trace(tmp_path / "t").read()
    for ids, expected in zip(read.experts, chunk.experts, strict=True):
        assert np.array_equal(ids, expected)
    assert read.token_ids.tolist() == chunk.token_ids.tolist()
    assert "2 rows in each layer" in told[0]
    assert ("No column choice or weight" in told[0]) is (columns == "expert")
    with pytest.raises(PlacerError, match="have 1 to 2 rows in a layer"):
        import_file(read_csv, "csv", write(path, rows[:-1], header), tmp_path / "u")
