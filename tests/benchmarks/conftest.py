"""The placements of ``placements.py``, measured in one process per core."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from placements import Case, Folders, Solved, measure, sources_sha256

from placer.trace.imported import import_file
from placer.trace.npz import read_npz

BUILD = Path(__file__).resolve().parents[2] / "build" / "benchmarks"


@pytest.fixture(scope="session")
def measuring(
    request: pytest.FixtureRequest,
    archive: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Case], Future[dict[str, Any]]]]:
    """The figures of the tests that were selected, as they are measured.

    A test that takes this fixture names its cases by ``pytest.mark.measures``, a function
    of its parameters: all are known before the first is measured, so that those of one seed
    come before those of the next.
    """
    every: dict[Case, None] = {}
    for item in request.session.items:
        marker = item.get_closest_marker("measures")
        if marker is not None and isinstance(item, pytest.Function):
            every |= dict.fromkeys(marker.kwargs["cases"](**item.callspec.params))
    folders = Folders(
        traces=tmp_path_factory.mktemp("traces"),
        results=BUILD / "placements" / sources_sha256()[:16],
    )
    folders.results.mkdir(parents=True, exist_ok=True)
    for name in {case.trace for case in every}:
        import_file(read_npz, "npz", archive(name), folders.traces / name)
    # One process per core, so none has threads beside it.
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            patch.setenv(name, "1")
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context)
        try:
            ordered = sorted(every, key=_turn)
            futures = {case: pool.submit(measure, case, folders) for case in ordered}
            yield futures.__getitem__
        finally:
            pool.shutdown(cancel_futures=True)


def _turn(case: Case) -> tuple[bool, int]:
    """Seed by seed, so that a run that is stopped has some of every row; levers last."""
    seed = case.seed if isinstance(case, Solved) else 0
    return isinstance(case, Solved) and case.variant != "capped" and seed > 0, seed
