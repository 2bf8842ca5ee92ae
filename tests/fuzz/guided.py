"""Coverage-guided fuzzing of one reader with atheris: ``make fuzz``.

    python tests/fuzz/guided.py plan --seconds 20 --seed 1

libFuzzer changes bytes, and keeps what reaches new code of placer. An exception other than
a refusal ends it; the input lies in ``build/fuzz/READER``, where ``structured.py`` keeps
its own. atheris is installed by ``pip install -e '.[fuzz]'``.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["placer", "planted"]):
    from planted import PLANTED
    from structured import KEPT, fault_of
    from targets import GUIDED, TARGETS


def main() -> None:
    """Fuzz one reader; libFuzzer ends the process, with 77 where it found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=[*GUIDED, "planted"])
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    target = PLANTED if given.reader == "planted" else TARGETS[given.reader]
    out = KEPT / given.reader.replace(" ", "_")
    out.mkdir(parents=True, exist_ok=True)
    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)

    def one(content: bytes) -> None:
        fault = fault_of(given.reader, target, content)
        if fault is not None:
            raise RuntimeError(fault.reason)

    options = [
        f"-max_total_time={given.seconds}",
        f"-seed={given.seed}",
        f"-artifact_prefix={out}/",
        "-max_len=16384",
        "-timeout=60",
        "-rss_limit_mb=4096",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    try:
        atheris.Setup([sys.argv[0], *options, str(corpus)], one)
        atheris.Fuzz()
    finally:
        shutil.rmtree(corpus, ignore_errors=True)


if __name__ == "__main__":
    main()
