"""The demo's text and model are what their pages say."""

import json
import shlex
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from placer.api.demo import Demo
from placer.api.plan import Plan
from placer.checkpoint.export import export_checkpoint
from placer.cli.main import main
from placer.demo import real_trace
from placer.demo.real_trace import ABSENT, NAME, shipped_trace, solve_trace
from placer.demo.road import _solve, run_demo, shipped_model
from placer.demo.steps import Steps
from placer.demo.text import DOMAINS, documents
from placer.model import ModelSpec
from placer.report.headline import change
from placer.run.writing import claimed
from placer.simulation.sent import RANK_COPIES
from placer.solver.search.pair_search import Search
from placer.trace import Trace

SPLITS = ("train", "profile", "heldout")
MODEL = Path(__file__).resolve().parents[2] / "traces" / "demo" / "model"


def test_splits_share_no_document_and_leave_none_out() -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    names = {split: {d.name for d in documents(split)} for split in SPLITS}
    assert not names["train"] & names["profile"] | names["profile"] & names["heldout"]
    assert not names["train"] & names["heldout"]
    everything = set.union(*names.values())
    assert everything >= {"bisect.py", "json/decoder.py", "operator-summary", "with"}
    assert everything >= {p.name for p in library.glob("[c-z]*.py") if p.stat().st_size}
    for split in SPLITS:
        assert {one.domain for one in documents(split)} == set(DOMAINS)
        assert {one.split for one in documents(split)} == {split}


def test_code_has_no_docstrings_left() -> None:
    found = {
        d.domain: d.text
        for split in SPLITS
        for d in documents(split)
        if d.name == "bisect.py"
    }
    code, prose = found["code"], found["docstrings"]
    assert "def insort_right(" in code
    assert '"""' not in code
    assert prose.startswith("Bisection algorithms.")
    assert "Insert item x in list a" in prose


def test_the_shipped_model_is_small_and_of_the_stated_shape() -> None:
    assert shipped_model().resolve() == MODEL
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 16_000_000
    model = ModelSpec.from_checkpoint(MODEL)
    assert model.num_experts == (32,) * 8
    assert model.top_k == 4
    for folder in sorted((MODEL.parent / "traces").iterdir()):
        assert Trace(folder).model.fingerprint == model.fingerprint
        assert Trace(folder).read().num_tokens > 40_000


def test_the_shipped_model_has_the_held_out_loss_of_its_card() -> None:
    card = json.loads((MODEL / "training.json").read_text())
    if card["python"].rsplit(".", 1)[0] != f"{sys.version_info[0]}.{sys.version_info[1]}":
        pytest.skip("the text of the card is that of another Python version")
    figures = card["domains"]["topics"]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    total, count = 0.0, 0
    for document in documents("heldout"):
        if document.domain != "topics":
            continue
        ids = torch.tensor(tokenizer(document.text, verbose=False)["input_ids"])
        for start in range(0, len(ids) - 1, 256):
            window = ids[None, start : start + 257]
            with torch.inference_mode():
                logits = model(input_ids=window[:, :-1]).logits[0]
            total += float(
                torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum")
            )
            count += window.shape[1] - 1
    assert total / count == pytest.approx(figures["heldout_loss_nats"], abs=0.1)
    assert total / count < 0.5 * figures["unigram_cross_entropy_nats"]


def test_greedy_text_of_the_exported_demo_model_is_the_same(
    make_plan: Callable[..., Path], tmp_path: Path
) -> None:
    """Eight prompts of 64 new tokens in float32, by plain transformers."""
    export_checkpoint(make_plan(MODEL), MODEL, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    chosen = [d for domain in DOMAINS for d in documents("heldout") if d.domain == domain]
    prompts = torch.tensor([tokenizer(d.text)["input_ids"][:16] for d in chosen[::8][:8]])
    assert len(prompts) == 8
    written = []
    for folder in (MODEL, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
        )
        written.append(tokenizer.batch_decode(ids))
    assert written[0] == written[1]
    assert len(set(written[0])) == 8


def _steps(folder: Path, say: Callable[[str], None] = lambda _: None) -> Steps:
    return Steps(total=1, say=say, folder=folder, out=folder)


def _older_demo(out: Path) -> dict[str, bytes]:
    """Write what is left of an older demo, and return its files."""
    (out / "text").mkdir(parents=True)
    (out / "text" / "old.txt").write_text("older")
    (out / "plan-old.json").write_text("{}")
    return _files(out)


def _files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }


def test_ctrl_c_ends_the_demo_not_one_of_its_plans(
    make_trace: Callable[..., Trace], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(search: Search, number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "_round", interrupt)
    profile = make_trace(num_experts=(16, 16))
    with pytest.raises(KeyboardInterrupt):
        _solve(profile, "fixed", tmp_path, _steps(tmp_path))
    assert not list(tmp_path.glob("plan*"))


def test_the_demo_walks_the_whole_road(
    tiny_model: Path, make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    """On a model of random weights, for speed; ``make check`` runs it on the real one."""
    said: list[str] = []
    told: list[str] = []
    real = make_trace("real", num_experts=(16, 16)).directory
    out = tmp_path / "out"
    older = _older_demo(out)

    def tell(line: str) -> None:
        told.append(line)
        assert _files(out) == older  # until all steps are done

    with claimed(out, directory=True, force=True):
        report = run_demo(tiny_model, out, said.append, trace=real, progress=tell)
    assert not older.keys() & _files(out).keys()
    written = b"".join([*_files(out).values(), *map(str.encode, [*said, *told])])
    assert b".out." not in written  # nor is a temporary name in anything
    assert str(out).encode() in written
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]
    assert set(report.figures) == {"contiguous", "balanced", "placer"}
    assert report.verification.num_tensors > 0
    for path in report.files.values():
        assert (out / path).exists()
    commands = [line.split()[1] for line in said if line.startswith("placer")]
    assert commands == [
        "record",
        "record",
        "solve",
        "solve",
        "export",
        "export",
        "verify",
        "inspect",
        "solve",
    ]
    steps = list(dict.fromkeys(line.partition(":")[0] for line in told))
    assert steps == [f"step {number} of 10" for number in range(1, 11)]
    _check_summary(Demo(out, report, Plan.read(out / f"plan-{NAME}.json")))


def _check_summary(found: Demo) -> None:
    """The answer is of the figures under fixed; the last lines are of the real trace."""
    figures = found.contents.figures
    sent = {name: one["fixed"][RANK_COPIES.metric] for name, one in figures.items()}
    less = change(sent["placer"], sent["contiguous"])
    assert f"sends {less} the contiguous one" in found.verdict.answer[0]
    assert found.real_plan is not None
    assert found.last_lines()[0] == found.real_plan.verdict.answer[0]
    assert "EPLB" in found.last_lines()[0]
    ((_, _, rows),) = found.last_tables()
    assert [row[0] for row in rows] == ["contiguous", "eplb", "balanced", "placer"]
    assert found.to_json()["real_trace"]["metrics"]["heldout"] is not None
    without = Demo(found.out, found.contents)
    assert without.last_lines() == [ABSENT]
    assert without.last_tables() == []
    assert without.to_json()["real_trace"] is None


def test_the_last_step_writes_what_its_command_writes(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    trace = make_trace(num_experts=(16, 16)).directory
    said: list[str] = []
    path = tmp_path / "plan.json"
    solve_trace(trace, path, _steps(tmp_path, said.append))
    written = path.read_bytes()
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(said[0])[1:], "--force"])
    assert ended.value.code == 0
    assert path.read_bytes() == written


def test_the_real_trace_is_found_in_a_source_tree_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An installed wheel has none beside it; it finds that of the current directory."""
    root = MODEL.parents[2]
    monkeypatch.chdir(tmp_path)
    assert shipped_trace() == root / "traces" / NAME
    monkeypatch.setattr(real_trace, "__file__", str(tmp_path / "placer" / "demo" / "x.py"))
    assert shipped_trace() is None
    monkeypatch.chdir(root)
    assert shipped_trace() == Path("traces") / NAME


def test_without_transformers_the_demo_says_so_at_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "running a model needs transformers, which is not installed" in said.err
    assert "hint: pip install 'placer[record]'" in said.err
    # Nothing was counted or solved before, and nothing is left.
    assert "placer solve" not in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_demo_that_fails_leaves_what_was_there(
    force: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of a config alone: recording fails after the texts were written."""
    model, out = tmp_path / "model", tmp_path / "out"
    older = _older_demo(out) if force else {}
    model.mkdir()
    (model / "config.json").write_bytes((shipped_model() / "config.json").read_bytes())
    with pytest.raises(SystemExit) as ended:
        line = ["demo", "--model", str(model), "--out", str(out)]
        main([*line, *(["--force"] * force)])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert f"--out {out}/profile" in said
    assert ".out." not in said
    assert _files(out) == older
    assert out.exists() == force
    assert {path.name for path in tmp_path.glob("*out*")} == ({"out"} if force else set())


def test_ctrl_c_in_the_demo_names_no_part_that_it_removed(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Recording alone keeps its finished parts and says so; the demo removes them."""

    def interrupt(line: str) -> None:
        if line.startswith("step 1 of 9: recorded") and " 0 of" not in line:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt) as ended:
        run_demo(tiny_model, out, lambda _: None, progress=interrupt)
    assert not getattr(ended.value, "__notes__", [])
    assert not list(tmp_path.glob("*out*"))
