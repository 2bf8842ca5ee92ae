"""A plugin that runs tests in another order: a test must not need the ones before it.

``PLACER_ORDER=7 python -m pytest -p tests.random_order tests/run`` shuffles the files, and
the tests inside each; the number is the seed.
"""

import os
import random

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shuffle files and their tests; a file's tests stay together, as its fixtures do."""
    draw = random.Random(int(os.environ["PLACER_ORDER"]))
    by_file: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(str(item.path), []).append(item)
    files = list(by_file.values())
    draw.shuffle(files)
    for tests in files:
        draw.shuffle(tests)
    items[:] = [item for tests in files for item in tests]
