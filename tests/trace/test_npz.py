"""Archives become traces as they are, and those that lie are refused."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from placer.errors import PlacerError
from placer.trace import Trace
from placer.trace.header import TraceHeader
from placer.trace.imported import ImportOptions, import_file
from placer.trace.npz import read_exflow, read_npz


def import_npz(file: Path, out: Path, model: Path | None = None) -> TraceHeader:
    return import_file(read_npz, "npz", file, out, ImportOptions(model_directory=model))


def arrays(num_tokens: int = 30) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((num_tokens, 3, 8)), axis=2)[:, :, :2]
    return {
        "experts": experts.astype(np.uint16),
        "sequence_ids": np.repeat([7, 2, 4], num_tokens // 3),
        "token_ids": rng.integers(-1, 90, num_tokens),
        "weights": -np.sort(-rng.random((num_tokens, 3, 2)).astype(np.float32), axis=2),
        "domain_of_sequence": np.asarray([0, 0, 1, 0, 0, 0, 0, 1]),
        "domain_names": np.asarray(["prose", "code"]),
    }


def write(path: Path, **changes: object) -> Path:
    values = {k: v for k, v in (arrays() | changes).items() if v is not None}
    np.savez(path, **values)
    return path


def test_import_keeps_ids_and_orders_by_sequence(tmp_path: Path) -> None:
    given = arrays()
    header = import_npz(write(tmp_path / "a.npz"), tmp_path / "t")
    tokens = Trace(tmp_path / "t").read()
    order = np.argsort(given["sequence_ids"], kind="stable")
    assert tokens.sequence_ids.tolist() == [2] * 10 + [4] * 10 + [7] * 10
    assert tokens.positions.tolist() == list(range(10)) * 3
    assert tokens.token_ids.tolist() == given["token_ids"][order].tolist()
    assert tokens.domain_ids.tolist() == [1] * 10 + [0] * 10 + [1] * 10
    for layer in range(3):
        assert tokens.experts[layer].tolist() == given["experts"][order, layer].tolist()
        weights = given["weights"][order, layer].astype(np.float16)
        assert (tokens.weights[layer] == weights).all()
    assert header.domains == ("prose", "code")
    assert header.model.num_experts == (8, 8, 8), "the largest id of any layer + 1"
    assert (header.model.fingerprint, header.model.layer_ids) == (None, None)


def test_tokens_that_fill_up_a_batch_are_left_out(tmp_path: Path) -> None:
    given = arrays()
    experts = given["experts"].astype(np.int64)
    experts[[3, 29]] = -1
    told: list[str] = []
    path = write(tmp_path / "a.npz", experts=experts, phase=given["sequence_ids"] > 2)
    import_file(read_npz, "npz", path, tmp_path / "t", ImportOptions(warn=told.append))
    tokens = Trace(tmp_path / "t").read()
    order = np.argsort(given["sequence_ids"], kind="stable")
    order = order[~np.isin(order, [3, 29])]
    assert tokens.experts[1].tolist() == given["experts"][order, 1].tolist()
    assert tokens.token_ids.tolist() == given["token_ids"][order].tolist()
    assert tokens.phase.tolist() == (given["sequence_ids"][order] > 2).tolist()
    assert "2 of 30 tokens have -1 instead of all experts" in told[0]


def test_a_dense_layer_may_be_written_as_minus_one(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The tiny model has 4 hidden layers, of which 1 and 3 have experts."""
    given = arrays()["experts"].astype(np.int64)
    experts = np.full((len(given), 4, 2), -1)
    experts[:, [1, 3]] = given[:, :2]
    path = write(tmp_path / "a.npz", experts=experts, weights=None)
    assert import_npz(path, tmp_path / "t", tiny_model).model.layer_ids == (1, 3)
    with pytest.raises(PlacerError, match="layer 0 is all -1, like dense"):
        import_npz(path, tmp_path / "u")


def test_a_top_1_layer_of_minus_one_is_no_choice_of_expert_0(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Zeros may come of a collapsed router, -1 never."""
    config = json.loads((tiny_model / "config.json").read_text())
    config["num_experts_per_tok"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    experts = arrays()["experts"].astype(np.int64)[:, :2, :1]
    for name, value in (("zeros", 0), ("none", -1)):
        experts[:, 1] = value
        path = write(tmp_path / f"{name}.npz", experts=experts, weights=None)
        if value == 0:
            import_npz(path, tmp_path / name, tmp_path)
            continue
        for model in (tmp_path, None):
            with pytest.raises(PlacerError, match=r"layer [13] is all -1"):
                import_npz(path, tmp_path / name, model)


@pytest.mark.parametrize(
    ("places", "words"), [((3, 1, 0), "1 of 30 tokens have -1"), ((), "all expert ids are")]
)
def test_tokens_without_some_experts_are_refused(
    places: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    experts = arrays()["experts"].astype(np.int64)
    experts[places] = -1
    with pytest.raises(PlacerError, match=words):
        import_npz(write(tmp_path / "a.npz", experts=experts), tmp_path / "t")


def test_optional_arrays_may_be_absent(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.npz",
        token_ids=None,
        weights=None,
        domain_of_sequence=None,
        domain_names=None,
    )
    import_npz(path, tmp_path / "t")
    tokens = Trace(tmp_path / "t").read()
    assert tokens.token_ids is tokens.weights is tokens.domain_ids is None


def test_a_model_binds_the_trace(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", experts=arrays()["experts"][:, :2], weights=None)
    header = import_npz(path, tmp_path / "t", tiny_model)
    assert header.model.layer_ids == (1, 3)
    assert header.model.fingerprint == header.model.bound_fingerprint()
    with pytest.raises(
        PlacerError, match="experts has 3 layers, the model 2 MoE layers of 4"
    ):
        import_npz(write(tmp_path / "b.npz"), tmp_path / "u", tiny_model)
    assert not (tmp_path / "u").exists()


EXPERTS = arrays()["experts"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"experts": None}, "lacks the array experts; it holds sequence_ids"),
        ({"experts": EXPERTS[:, 0]}, r"shape \[30, 2\], expected \[T, L, k\]"),
        ({"experts": EXPERTS.astype(float)}, "experts is float64, expected integers"),
        ({"experts": EXPERTS.astype(int) - 9}, "must not be negative"),
        ({"experts": EXPERTS * np.asarray([1, 0, 1])[:, None]}, "layer 1 is all zeros"),
        ({"experts": np.maximum(EXPERTS, 6)}, "lists an expert twice"),
        ({"sequence_ids": np.zeros(5, int)}, r"sequence_ids has shape \[5\]"),
        ({"token_ids": np.zeros(5, int)}, r"token_ids has shape \[5\]"),
        ({"domain_of_sequence": np.zeros(3, int)}, "sequence ids go up to 7"),
        ({"domain_names": np.asarray(["one"])}, "domain_names has 1 names"),
        ({"sequence_ids": np.repeat([7, 2**32 + 2, 4], 10)}, "holds 4294967298, expected"),
        ({"sequence_ids": np.repeat([7, -1, 4], 10)}, "sequence_ids holds -1, expected"),
        ({"token_ids": np.full(30, 2**40)}, "token_ids holds 1099511627776, expected"),
        ({"weights": np.full((30, 3, 2), np.nan)}, "weight is NaN or beyond float16"),
        ({"weights": np.full((30, 3, 2), 1e9)}, "weight is NaN or beyond float16"),
        ({"weights": np.full((30, 3, 2), "a")}, "weights is <U1, expected floats"),
        ({"domain_names": np.asarray("one")}, r"domain_names has shape \[\], expected"),
        ({"domain_names": np.asarray(["one", "one"])}, "2, 1 of them different"),
        ({"experts": np.asarray([{}], dtype=object)}, r"no readable \.npz"),
    ],
)
def test_an_archive_that_lies_is_refused(
    tmp_path: Path, changes: dict[str, object], match: str
) -> None:
    path = write(tmp_path / "a.npz", **changes)
    with pytest.raises(PlacerError, match=match):
        import_npz(path, tmp_path / "t")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(PlacerError, match="does not exist"):
        import_npz(path, tmp_path / "t")
    path.write_bytes(b"PK not really")
    with pytest.raises(PlacerError, match=r"no readable \.npz"):
        import_npz(path, tmp_path / "t")


def npy(shape: str, version: bytes = b"\x01\x00") -> bytes:
    """An .npy file of eight bytes that promises an int64 array of some shape."""
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = len(header).to_bytes(2, "little")
    return b"\x93NUMPY" + version + size + header + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        npy("(1000000000000000, 3)"),
        npy("(9223372036854775807, 9223372036854775807)"),
        npy("(-1, 3)"),
        npy("(4, 3)"),
        npy("((4, 3)"),
        b"",
    ],
)
def test_an_array_whose_header_lies_is_refused(tmp_path: Path, content: bytes) -> None:
    """More is promised than there is memory for or are bytes, or what is no shape."""
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(PlacerError, match=r"no readable \.npy array"):
        import_file(read_exflow, "exflow", tmp_path / "a.npy", tmp_path / "t")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("experts.npy", content)
        archive.writestr("sequence_ids.npy", content)
    with pytest.raises(PlacerError, match=r"no readable \.npz"):
        import_npz(tmp_path / "a.npz", tmp_path / "t")


def test_damaged_compressed_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays())
    data = bytearray(path.read_bytes())
    data[60:200] = bytes(140)
    path.write_bytes(data)
    with pytest.raises(PlacerError, match=r"no readable \.npz"):
        import_npz(path, tmp_path / "t")


@pytest.mark.parametrize(
    "name", ["gpt-oss-20b", "deepseek-v2-lite-intent", "deepseek-v2-lite-summary"]
)
def test_real_traces_are_imported_exactly(
    archive: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    header = import_npz(archive(name), tmp_path / "t")
    tokens = Trace(tmp_path / "t").read()
    with np.load(archive(name)) as given:
        order = np.argsort(given["sequence_ids"], kind="stable")
        experts = given["experts"]
        assert header.num_tokens == len(experts)
        for layer in (0, experts.shape[1] - 1):
            assert (tokens.experts[layer] == experts[order, layer]).all()


@pytest.mark.parametrize(("read", "suffix"), [(read_npz, ".npz"), (read_exflow, ".npy")])
def test_pickled_objects_are_never_loaded(tmp_path: Path, read, suffix: str) -> None:
    """The error gives no advice to load them nevertheless, as that of NumPy does."""
    file = tmp_path / f"pickled{suffix}"
    held = np.asarray([{}], dtype=object)
    if suffix == ".npz":
        np.savez(file, experts=held, sequence_ids=held)
    else:
        file.write_bytes(pickle.dumps(held))
    with pytest.raises(PlacerError, match="pickled objects, which placer never") as caught:
        read(file, None)
    assert "allow_pickle" not in caught.value.message


def test_ids_may_be_texts(tmp_path: Path) -> None:
    """Numbers are what they say; other names of sequences are numbered as they come."""
    given = arrays()
    texts = {
        name: given[name].astype(str) for name in ("experts", "sequence_ids", "token_ids")
    }
    import_npz(write(tmp_path / "a.npz", **texts), tmp_path / "a")
    import_npz(write(tmp_path / "b.npz"), tmp_path / "b")
    one, other = Trace(tmp_path / "a").read(), Trace(tmp_path / "b").read()
    assert np.array_equal(np.stack(one.experts), np.stack(other.experts))
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert one.domain_ids.tolist() == other.domain_ids.tolist()
    names = np.repeat(["r9", "r1", "r5"], 10)
    with pytest.raises(PlacerError, match="domain_of_sequence cannot be read"):
        import_npz(write(tmp_path / "c.npz", sequence_ids=names), tmp_path / "c")
    no_domains = {"domain_of_sequence": None, "domain_names": None}
    import_npz(write(tmp_path / "d.npz", sequence_ids=names, **no_domains), tmp_path / "d")
    named = Trace(tmp_path / "d").read()
    assert named.sequence_ids.tolist() == np.repeat([0, 1, 2], 10).tolist()
    assert np.stack(named.experts, axis=1).tolist() == given["experts"].tolist()
    with pytest.raises(PlacerError, match="domain_of_sequence cannot be read"):
        odd = np.asarray([b"\xff"] * 30)
        import_npz(write(tmp_path / "f.npz", sequence_ids=odd), tmp_path / "f")
    words = np.repeat(["prefill", "decode"], 15)
    import_npz(write(tmp_path / "g.npz", phase=words), tmp_path / "g")
    phase = Trace(tmp_path / "g").read().phase
    assert phase is not None
    # Of sequences 2, 4 and 7, which are rows 10 to 19, 20 to 29 and 0 to 9.
    assert phase.tolist() == [*[0] * 5, *[1] * 15, *[0] * 10]
    with pytest.raises(
        PlacerError, match="token_ids holds a text that is not a whole number"
    ):
        import_npz(write(tmp_path / "e.npz", token_ids=names), tmp_path / "e")


@pytest.mark.parametrize("padding", ["left", "right", "lengths"])
def test_batches_lose_their_padding(tmp_path: Path, padding: str) -> None:
    """[B, S, L, k] with a mask [B, S], or with the lengths of rows padded at their end."""
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((2, 5, 3, 8)), axis=3)[..., :2]
    ids = rng.integers(0, 90, (2, 5))
    mask = np.asarray([[1] * 5, [0, 0, 1, 1, 1] if padding == "left" else [1, 1, 1, 0, 0]])
    which = (
        {"lengths": mask.sum(axis=1)} if padding == "lengths" else {"attention_mask": mask}
    )
    np.savez(tmp_path / "b.npz", experts=experts, token_ids=ids, **which)
    import_npz(tmp_path / "b.npz", tmp_path / "b")
    read = Trace(tmp_path / "b").read()
    kept = mask.astype(bool)
    assert np.stack(read.experts, axis=1).tolist() == experts[kept].tolist()
    assert read.token_ids.tolist() == ids[kept].tolist()
    assert read.sequence_ids.tolist() == [0] * 5 + [1] * 3
    assert read.positions.tolist() == [*range(5), *range(3)]
    texts = {"lengths": np.asarray(["5", "3"])}
    for odd in ({}, texts, {"attention_mask": mask[:1]}, {"lengths": np.asarray([3, 2])}):
        np.savez(tmp_path / "c.npz", experts=experts, **odd)
        with pytest.raises(PlacerError, match="which tokens are padding"):
            import_npz(tmp_path / "c.npz", tmp_path / "c")
    to_add = np.where(mask == 1, 0.0, -np.inf)
    for odd, words in ((to_add, "holds -inf to 0"), (mask + 1, "holds 1 to 2")):
        np.savez(tmp_path / "e.npz", experts=experts, attention_mask=odd)
        with pytest.raises(PlacerError, match=words):
            import_npz(tmp_path / "e.npz", tmp_path / "e")
    np.savez(tmp_path / "d.npz", experts=experts, attention_mask=mask, token_ids=ids[:, :4])
    with pytest.raises(
        PlacerError, match=r"token_ids has shape \[2, 4\], expected \[2, 5\]"
    ):
        import_npz(tmp_path / "d.npz", tmp_path / "d")


def test_more_layers_than_tokens_are_doubted(tmp_path: Path) -> None:
    told: list[str] = []
    ids = np.random.default_rng(0).integers(0, 8, (3, 40))
    for name, array in (("a", ids), ("b", ids.T)):
        np.save(tmp_path / f"{name}.npy", array)
        options = ImportOptions(warn=told.append)
        import_file(read_exflow, "x", tmp_path / f"{name}.npy", tmp_path / name, options)
    assert len(told) == 1 and "3 tokens of 40 layers" in told[0]
