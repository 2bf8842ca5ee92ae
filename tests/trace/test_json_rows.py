"""JSON of other programs becomes the tokens that it was written from, whatever its keys."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from placer.errors import PlacerError, UsageError
from placer.trace import Chunk, Trace
from placer.trace.csv_rows import csv_reader, read_csv
from placer.trace.imported import ImportOptions, import_file
from placer.trace.json_rows import Keys, jsonl_reader, requests_reader

# Layer 0 is dense.
CONFIG = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 16,
    "vocab_size": 32,
}
RNG = np.random.default_rng(0)
# Two requests of three and two tokens: [T, L, k], and a probability of every expert.
EXPERTS = np.argsort(-RNG.random((5, 2, 8)), axis=2)[..., :2]
PROBABILITIES = RNG.random((5, 2, 8)).round(3)
REQUEST, TOKEN = [0, 0, 0, 1, 1], [0, 1, 2, 0, 1]


def rows(names: Mapping[str, str], first_layer: int = 0) -> list[dict[str, Any]]:
    """One row per token and layer, layer after layer, under the keys of a program."""
    found = []
    for layer in (1, 0):
        for t in range(5):
            row = {
                "layer": layer + first_layer,
                "token": TOKEN[t],
                "experts": EXPERTS[t, layer].tolist(),
                "probabilities": PROBABILITIES[t, layer].tolist(),
                "sequence": f"req-{REQUEST[t]}",
                "phase": "decode" if TOKEN[t] else "prefill",
            }
            found.append({names[key]: value for key, value in row.items() if key in names})
    return found


def read(reader: Any, path: Path, values: Any, **options: Any) -> tuple[Chunk, list[str]]:
    if not isinstance(values, str):
        values = "".join(json.dumps(one) + "\n" for one in values)
    path.write_text(values)
    told: list[str] = []
    given = ImportOptions(warn=told.append, **options)
    import_file(reader, "x", path, path.with_suffix(".trace"), given)
    return Trace(path.with_suffix(".trace")).read(), told


def ids(chunk: Chunk) -> list[Any]:
    return np.stack(chunk.experts, axis=1).tolist()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        ({"layer": "layer", "token": "token_idx", "experts": "topk_ids"}, None),
        (
            {"layer": "layer_id", "token": "position", "experts": "experts"}
            | {"sequence": "request_id", "phase": "phase"},
            None,
        ),
        (
            {"layer": "L", "token": "t", "experts": "e", "sequence": "r"},
            "layer=L,token=t,experts=e,sequence=r",
        ),
    ],
    ids=["no sequences", "usual names", "own names"],
)
def test_rows_of_any_program(tmp_path: Path, names: dict[str, str], keys: str) -> None:
    values = rows(names)
    if "sequence" not in names:  # token ids that go on from request to request
        for number, row in enumerate(values):
            row[names["token"]] = number % 5
    chunk, told = read(jsonl_reader(Keys.parse(keys)), tmp_path / "a.jsonl", values)
    assert ids(chunk) == EXPERTS.tolist()
    if "sequence" not in names:
        assert chunk.sequence_ids.tolist() == [0] * 5
        assert "no key gives the sequence" in told[0]
        return
    assert chunk.sequence_ids.tolist() == REQUEST
    assert chunk.positions.tolist() == TOKEN
    if "phase" in names:
        assert chunk.phase.tolist() == [0, 1, 1, 0, 1]


def test_weights_of_all_experts_order_the_chosen_ones(tmp_path: Path) -> None:
    names = {"layer": "layer", "token": "token", "experts": "experts"}
    names |= {"sequence": "seq_id", "probabilities": "gating_probs"}
    chunk, _ = read(jsonl_reader(Keys.parse(None)), tmp_path / "a.jsonl", rows(names))
    expected = [
        [sorted(e, key=lambda one: -p[one]) for e, p in zip(*token, strict=True)]
        for token in zip(EXPERTS.tolist(), PROBABILITIES.tolist(), strict=True)
    ]
    assert ids(chunk) == expected


def test_padding_may_have_weights_of_all_experts(tmp_path: Path) -> None:
    names = {"layer": "layer", "token": "token", "experts": "experts"}
    names |= {"sequence": "seq_id", "probabilities": "gating_probs"}
    values = rows(names)
    padding = [row | {"seq_id": "pad", "experts": [-1, -1]} for row in values[::5]]
    reader = jsonl_reader(Keys.parse(None))
    chunk, told = read(reader, tmp_path / "a.jsonl", values + padding)
    assert ids(chunk) == ids(read(reader, tmp_path / "b.jsonl", values)[0])
    assert "1 of 6 tokens have -1" in told[-1]


def test_layers_by_the_models_own_numbers(tmp_path: Path, model: Path) -> None:
    """Layers 1 and 2 behind a dense one; without the model they are all there are."""
    names = {"layer": "layer", "token": "token", "experts": "experts", "sequence": "seq_id"}
    reader = jsonl_reader(Keys.parse(None))
    values = rows(names, first_layer=1)
    chunk, _ = read(reader, tmp_path / "a.jsonl", values, model_directory=model)
    assert ids(chunk) == EXPERTS.tolist()
    chunk, told = read(reader, tmp_path / "b.jsonl", values)
    assert ids(chunk) == EXPERTS.tolist()
    assert "have the numbers 1 to 2: placer takes them as all" in told[0]
    with pytest.raises(PlacerError, match="it has layer 4, the model 3 hidden layers"):
        read(
            reader,
            tmp_path / "c.jsonl",
            rows(names, first_layer=3),
            model_directory=model,
        )


@pytest.mark.parametrize(
    ("values", "keys", "match"),
    [
        ([{"layer": 0, "token": 0}], None, "a row has no key for experts"),
        ([{"layer": 0, "token": 0, "e": [1]}], "experts=x", "has no key x; it has layer"),
        ("", None, "holds no JSON object"),
        ("{", None, "line 1 is not valid JSON"),
        ([{"layer": 0, "token": 0, "experts": [1.5]}], None, "experts holds a value"),
        (
            [
                {"layer": 0, "token": 0, "experts": [1, 2]},
                {"layer": 0, "token": 1, "experts": [1]},
            ],
            None,
            "experts differ in length",
        ),
        ([{"token": t, "experts": [1]} for t in (0, 1)], None, "no key for layer: its"),
        ([{"token": 0, "experts": []}], None, "no key for layer: its"),
        ([{"token": [], "layer": [], "experts": []}], None, "columns are empty: token,"),
        (
            [{"token": 0, "experts": [[1], [2]], "weights": [[0.5]]}],
            None,
            "row 1 has 2 lists in experts, and 1 in weights",
        ),
        (
            [{"layer": n // 2, "token": 0, "experts": [n]} for n in range(4)],
            None,
            "does not have each of the layers 0 to 1 once",
        ),
        (
            [{"layer": 0, "token": 0, "experts": [1], "phase": "both"}],
            None,
            "phase is 'both', expected prefill or decode",
        ),
    ],
)
def test_rows_that_are_none_are_refused(
    tmp_path: Path, values: Any, keys: str | None, match: str
) -> None:
    with pytest.raises(PlacerError, match=match) as caught:
        read(jsonl_reader(Keys.parse(keys)), tmp_path / "a.jsonl", values)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["layer", "layer=", "depth=x", "layer=a,layer=b"])
def test_keys_that_are_no_mapping_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--keys has"):
        Keys.parse(text)


def by_request(flat: bool, first_layer: int = 0) -> list[dict[str, Any]]:
    requests = []
    for chosen in (EXPERTS[:3], EXPERTS[3:]):
        layers = {str(n + first_layer): chosen[:, n].tolist() for n in range(2)}
        if flat:
            layers = {n: [e for token in one for e in token] for n, one in layers.items()}
        requests.append(layers)
    return requests


def test_json_per_request(tmp_path: Path, model: Path) -> None:
    reader = requests_reader(Keys.parse(None))
    chunk, _ = read(reader, tmp_path / "a.jsonl", by_request(flat=False))
    assert ids(chunk) == EXPERTS.tolist()
    assert chunk.sequence_ids.tolist() == REQUEST
    assert chunk.positions.tolist() == TOKEN
    flat = by_request(flat=True, first_layer=1)
    chunk, _ = read(reader, tmp_path / "b.jsonl", flat, model_directory=model)
    assert ids(chunk) == EXPERTS.tolist()
    with pytest.raises(
        PlacerError, match="does not hold a list of ids for each token"
    ) as caught:
        read(reader, tmp_path / "c.jsonl", flat)
    assert "--model DIR" in caught.value.hint
    inside = [{"id": "x", "moe": {f"layer_{n}": v for n, v in one.items()}} for one in flat]
    named = requests_reader(Keys.parse("experts=moe"))
    chunk, _ = read(named, tmp_path / "d.jsonl", inside, model_directory=model)
    assert ids(chunk) == EXPERTS.tolist()
    with pytest.raises(PlacerError, match="request 0 has no layers; its keys are id, moe"):
        read(reader, tmp_path / "e.jsonl", inside)


def test_csv_carries_phase_and_weights(tmp_path: Path) -> None:
    text = "sequence_id,position,layer,e0,e1,w0,w1,phase\n"
    for t in range(5):
        for layer in (0, 1):
            e, phase = EXPERTS[t, layer], "decode" if TOKEN[t] else "prefill"
            text += f"{REQUEST[t]},{TOKEN[t]},{layer},{e[0]},{e[1]},0.25,0.75,{phase}\n"
    chunk, _ = read(read_csv, tmp_path / "a.csv", text)
    assert chunk.phase.tolist() == [0, 1, 1, 0, 1]
    assert ids(chunk) == EXPERTS[..., ::-1].tolist(), "the heavier one stands second"
    assert chunk.weights[0].tolist() == [[0.75, 0.25]] * 5
    with pytest.raises(PlacerError, match="phase is 2, expected prefill"):
        read(
            read_csv,
            tmp_path / "b.csv",
            text.replace("prefill", "2").replace("decode", "1"),
        )


def same(chunk: Chunk) -> None:
    """The tokens are those that every file here was written from."""
    assert [ids.tolist() for ids in chunk.experts] == EXPERTS.transpose(1, 0, 2).tolist()
    assert chunk.sequence_ids.tolist() == REQUEST
    assert chunk.positions.tolist() == TOKEN


def of_tokens(change: Any) -> list[dict[str, Any]]:
    return [
        {"rid": REQUEST[t], "pos": TOKEN[t], **change(t, layer)}
        for t in range(5)
        for layer in range(2)
    ]


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (lambda t, n: {"layer_number": n, "topk_idx": EXPERTS[t, n].tolist()}, None),
        (
            lambda t, n: {"layer": f"model.layers.{n}.mlp", "experts": list(EXPERTS[t, n])},
            None,
        ),
        (lambda t, n: {"layer": n, "experts": str(EXPERTS[t, n].tolist())}, None),
        (lambda t, n: {"layer": n, "experts": " ".join(map(str, EXPERTS[t, n]))}, None),
        (
            lambda t, n: {
                "layer": float(n),
                "experts": EXPERTS[t, n].astype(float).tolist(),
            },
            None,
        ),
        (
            lambda t, n: {"at": {"layer": n}, "moe": {"ids": EXPERTS[t, n].tolist()}},
            "layer=at.layer,experts=moe.ids",
        ),
    ],
)
def test_rows_as_others_write_them(change: Any, keys: str | None, tmp_path: Path) -> None:
    values = json.loads(json.dumps(of_tokens(change), default=int))
    chunk, _ = read(jsonl_reader(Keys.parse(keys)), tmp_path / "x.jsonl", values)
    same(chunk)


def test_rows_of_all_layers(tmp_path: Path) -> None:
    values = [
        {"rid": REQUEST[t], "pos": TOKEN[t], "topk_ids": EXPERTS[t].tolist()}
        for t in range(5)
    ]
    same(read(jsonl_reader(Keys.parse(None)), tmp_path / "x.jsonl", values)[0])


def test_gzipped_lines(tmp_path: Path) -> None:
    values = of_tokens(lambda t, n: {"layer": n, "experts": EXPERTS[t, n].tolist()})
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(v) + "\n" for v in values).encode()))
    import_file(jsonl_reader(Keys.parse(None)), "x", path, tmp_path / "t", ImportOptions())
    same(Trace(tmp_path / "t").read())


def test_a_gzip_that_unpacks_to_far_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress((b" " * 999 + b"\n") * 70_000))
    with pytest.raises(PlacerError, match="more than 100 times its size"):
        import_file(
            jsonl_reader(Keys.parse(None)), "x", path, tmp_path / "t", ImportOptions()
        )


@pytest.mark.parametrize("layout", ["tokens", "layers", "nested"])
def test_requests_as_others_write_them(layout: str, tmp_path: Path) -> None:
    values: list[Any] = []
    for number in (0, 1):
        ids = EXPERTS[np.asarray(REQUEST) == number]
        layers = [{"layer_id": n, "topk_ids": ids[:, n].tolist()} for n in (0, 1)]
        values.append(
            {
                "tokens": {"id": "x", "routed_experts": ids.tolist()},
                "layers": {"id": "x", "layers": layers},
                "nested": {
                    "moe": {"by": {f"layer_{n}": ids[:, n].tolist() for n in (0, 1)}}
                },
            }[layout]
        )
    keys = Keys.parse("experts=moe.by" if layout == "nested" else None)
    same(read(requests_reader(keys), tmp_path / "x.jsonl", values)[0])


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([{"layer": 0, "experts": [[1]]}, 5], "a list of layers holds 5, not an object"),
        (
            [{"layer": 0, "token": t, "topk_ids": [[t]]} for t in (0, 1)],
            "layer 0 is twice in the list of layers",
        ),
    ],
)
def test_layers_of_requests_that_are_none_are_refused(
    layers: list[Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(PlacerError, match=match) as caught:
        read(requests_reader(Keys.parse(None)), tmp_path / "x.json", [{"layers": layers}])
    assert caught.value.hint


@pytest.mark.parametrize(
    ("header", "cells", "keys"),
    [
        ("rid,pos,layer_id,expert_0,expert_1", "{r},{p},{n},{a},{b}", None),
        ("request_id,token_idx,layer,topk_ids", '{r},{p},{n},"[{a}, {b}]"', None),
        ("r,p,n,x", "{r},{p},{n},{a} {b}", "sequence=r,token=p,layer=n,experts=x"),
        ("rid,position,pos,layer,e0,e1", "{r},77,{p},{n},{a},{b}", "token=pos"),
        ("rid,pos,layer,e0,e1,timestamp", "{r},{p},{n},{a},{b},0.37", None),
        ("rid,pos,layer_name,e0,e1", "{r},{p},model.layers.{n}.mlp,{a},{b}", None),
        (
            "rid,pos,layer,topk_ids,topk_weights",
            '{r},{p},{n},"[{a}, {b}]","[0.6, 4e-1]"',
            None,
        ),
        ("sequence_id\tposition\tlayer\te0\te1", "{r}\t{p}\t{n}\t{a}\t{b}", None),
        ("\ufeffsequence_id, position, layer, e0, e1", "{r}, {p}, {n}, {a}, {b}", None),
    ],
)
def test_csv_as_others_write_it(
    header: str, cells: str, keys: str | None, tmp_path: Path
) -> None:
    lines = [
        cells.format(r=REQUEST[t], p=TOKEN[t], n=n, a=EXPERTS[t, n, 0], b=EXPERTS[t, n, 1])
        for n in (1, 0)
        for t in range(5)
    ]
    text = "\n".join([header, *lines]) + "\n"
    same(read(csv_reader(Keys.parse(keys)), tmp_path / "x.csv", text)[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rid,pos,layer,ids,w\n0,0,0,3 7,0.6 x\n", "weights are not rows of numbers"),
        ("rid,pos,layer,ids,w\n0,0,0,3 7,0.6 0.3 0.1\n", "3 weights are given for 2 exp"),
        ("rid,pos,layer,e0,e0\n0,0,0,3,7\n", "its header names column e0 twice"),
        (
            "rid,pos,layer,e0\n0,0,layers.0.mlp,3\n0,0,mtp.0.mlp,7\n",
            "some of its 2 names of layers have the same number",
        ),
    ],
)
def test_csv_that_may_mean_something_else(text: str, words: str, tmp_path: Path) -> None:
    keys = "experts=ids,weights=w" if "ids" in text else None
    with pytest.raises(PlacerError, match=words):
        read(csv_reader(Keys.parse(keys)), tmp_path / "x.csv", text)


def test_csv_tells_what_is_not_read_and_reads_listed_weights(tmp_path: Path) -> None:
    text = 'rid,pos,layer,topk_ids,topk_weights,t\n0,0,0,3 7,"[0.25, 0.75]",0.1\n'
    chunk, told = read(read_csv, tmp_path / "x.csv", text)
    assert chunk.experts[0].tolist() == [[7, 3]], "the heavier one stands second"
    assert chunk.weights[0].tolist() == [[0.75, 0.25]]
    assert told == ['it has columns that are not read: ["t"]']


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    values = of_tokens(lambda t, n: {"layer": n, "experts": EXPERTS[t, n].tolist()})
    text = "\ufeff" + "".join(json.dumps(v, default=int) + "\n" for v in values)
    same(read(jsonl_reader(Keys.parse(None)), tmp_path / "x.jsonl", text)[0])


@pytest.mark.parametrize("keys", [None, "layer=layer,token=pos,experts=experts"])
def test_a_first_object_that_is_no_token_is_left_out_and_told(
    keys: str | None, tmp_path: Path
) -> None:
    """It may even call the number of experts what rows call their ids."""
    values = of_tokens(lambda t, n: {"layer": n, "experts": EXPERTS[t, n].tolist()})
    values = [{"model": "x", "experts": 8}, *json.loads(json.dumps(values, default=int))]
    chunk, told = read(jsonl_reader(Keys.parse(keys)), tmp_path / "x.jsonl", values)
    same(chunk)
    assert told == ["its first object, of model, experts, is no token. It is left out"]


@pytest.mark.parametrize("orient", ["list", "dict"])
def test_one_object_of_columns(orient: str, tmp_path: Path) -> None:
    """As pandas writes a table, and as lists."""
    rows_ = of_tokens(lambda t, n: {"layer": n, "experts": EXPERTS[t, n].tolist()})
    columns = pd.DataFrame(rows_).to_dict(orient)
    text = json.dumps(columns | {"model": "x"}, default=int)
    same(read(jsonl_reader(Keys.parse(None)), tmp_path / "x.json", text)[0])
    one = columns | {"rid": "a"}
    one["pos"] = pd.DataFrame({"pos": np.repeat(range(5), 2)}).to_dict(orient)["pos"]
    text = json.dumps(one, default=int)
    chunk, told = read(jsonl_reader(Keys.parse(None)), tmp_path / "z.json", text)
    assert ids(chunk) == EXPERTS.tolist() and not told
    short = columns | {"layer": [0]}
    with pytest.raises(PlacerError, match="its columns differ in length"):
        read(
            jsonl_reader(Keys.parse(None)),
            tmp_path / "y.json",
            json.dumps(short, default=int),
        )


def test_null_in_place_of_experts_is_a_dense_layer(tmp_path: Path, model: Path) -> None:
    by_row = [
        {"rid": REQUEST[t], "pos": TOKEN[t], "topk_ids": [None, *EXPERTS[t].tolist()]}
        for t in range(5)
    ]
    chunk, _ = read(
        jsonl_reader(Keys.parse(None)), tmp_path / "x.jsonl", by_row, model_directory=model
    )
    assert ids(chunk) == EXPERTS.tolist()
    by_request = [
        {"layers": {"0": None, "1": part[:, 0].tolist(), "2": part[:, 1].tolist()}}
        for part in (EXPERTS[:3], EXPERTS[3:])
    ]
    chunk, _ = read(
        requests_reader(Keys.parse(None)),
        tmp_path / "r.jsonl",
        by_request,
        model_directory=model,
    )
    assert ids(chunk) == EXPERTS.tolist()


@pytest.mark.parametrize("first", [0, 1])
def test_layers_may_count_from_one_where_the_model_shows_it(
    first: int, tmp_path: Path
) -> None:
    config = CONFIG | {"num_hidden_layers": 2, "first_k_dense_replace": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    values = of_tokens(lambda t, n: {"layer": n + first, "experts": EXPERTS[t, n].tolist()})
    chunk, told = read(
        jsonl_reader(Keys.parse(None)),
        tmp_path / "x.jsonl",
        json.loads(json.dumps(values, default=int)),
        model_directory=tmp_path,
    )
    same(chunk)
    assert [one for one in told if "count from 1" in one] == told[:first]


def test_requests_with_layers_first_are_read_so_or_doubted(tmp_path: Path) -> None:
    """Requests differ in tokens, never in layers; of equal shapes nothing is known."""
    reader = requests_reader(Keys.parse(None))
    parts = [EXPERTS[:3], EXPERTS[3:]]
    turned = [{"routed_experts": part.swapaxes(0, 1).tolist()} for part in parts]
    chunk, told = read(reader, tmp_path / "x.jsonl", turned)
    assert ids(chunk) == EXPERTS.tolist()
    assert "[layers][tokens][experts]" in told[0]
    for name, part in (("y", EXPERTS[:3]), ("z", EXPERTS[:3].swapaxes(0, 1))):
        values = [{"routed_experts": part.tolist()}] * 2
        _, told = read(reader, tmp_path / f"{name}.jsonl", values)
        assert any("2 tokens of 3 layers" in one for one in told) is (name == "z")


def test_the_model_tells_layers_from_tokens(tmp_path: Path) -> None:
    """Of two requests of three tokens and two layers, either way round."""
    config = CONFIG | {"num_hidden_layers": 2, "first_k_dense_replace": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reader = requests_reader(Keys.parse(None))
    for name, part in (("y", EXPERTS[:3]), ("z", EXPERTS[:3].swapaxes(0, 1))):
        values = [{"routed_experts": part.tolist()}] * 2
        path = tmp_path / f"{name}.jsonl"
        chunk, told = read(reader, path, values, model_directory=tmp_path)
        assert ids(chunk) == EXPERTS[:3].tolist() * 2 and not told
