"""Execute notebooks and keep the executed copies elsewhere.

    python docs/run_notebooks.py --out build/notebooks notebooks/plan.ipynb

The committed notebooks hold no output; a cell that raises makes this fail.
"""

import argparse
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

CELL_TIMEOUT_S = 300


def execute(path: Path, out: Path) -> None:
    """Run one notebook in its own directory and write it, with its output, to ``out``."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    out.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, out / path.name)
    print(f"{path} -> {out / path.name}")


def main() -> int:
    """Execute all notebooks given, and count those that fail."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("notebooks", type=Path, nargs="+")
    args = parser.parse_args()
    # As the command does: small matrices are slower on several threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    failures = 0
    for path in args.notebooks:
        try:
            execute(path, args.out)
        except CellExecutionError as error:
            failures += 1
            print(f"{path} failed:\n{error}", file=sys.stderr)
    return failures


if __name__ == "__main__":
    sys.exit(main())
