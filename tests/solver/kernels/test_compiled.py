"""A loop that was compiled is compiled anew where any loop changes."""

from pathlib import Path

from placer.solver.kernels import compiled, moves


def test_the_sources_are_those_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "b.py").write_text("two")
    before = compiled.sources_sha256(tmp_path)
    (tmp_path / "b.py").write_text("three")
    assert compiled.sources_sha256(tmp_path) != before


def test_what_is_kept_is_found_by_the_sources(monkeypatch) -> None:
    """numba compares the file of ``above`` alone; what it calls may be in another."""
    moves.above.compile("float64(float64[:], float64)")
    signature = moves.above.signatures[0]
    codegen = moves.above.targetctx.codegen()
    key = moves.above._cache._index_key(signature, codegen)
    assert compiled._SOURCES in key
    monkeypatch.setattr(compiled, "_SOURCES", "changed")
    assert moves.above._cache._index_key(signature, codegen) != key
