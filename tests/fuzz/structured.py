"""Structured mutation of every reader, for a time and from a seed: ``make fuzz``.

    python tests/fuzz/structured.py --seconds 60 --seed 0

What is neither read nor refused is kept in ``build/fuzz``. To keep it as a regression test,
move it to ``tests/fuzz/found/READER/`` (spaces in the name of the reader become ``_``).
"""

import argparse
import faulthandler
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from mutation import MUTATIONS
from targets import TARGETS, Target

from placer.errors import PlacerError

KEPT = Path("build/fuzz")
# Of the processor; the slowest reader of small files takes a tenth of a second.
SECONDS = 5
# Of the clock, on a busy machine.
HANGS = 120


@dataclass(frozen=True)
class Fault:
    """What a reader did not refuse as it should."""

    reader: str
    content: bytes
    reason: str


def fault_of(name: str, target: Target, content: bytes) -> Fault | None:
    """Feed a reader once."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            target.read(content, Path(folder))
        except (PlacerError, *target.refusals) as error:
            if len(str(error)) > 2000:
                return Fault(name, content, f"a message of {len(str(error))} characters")
        except Exception as error:
            return Fault(name, content, f"{type(error).__name__}: {str(error)[:200]}")
    if (spent := time.process_time() - began) > SECONDS:
        return Fault(name, content, f"{spent:.1f} s")
    return None


def fuzz(
    targets: Mapping[str, Target], seed: int, rounds: int | None
) -> Iterator[Fault | None]:
    """Yield the outcome of every input, reader after reader, round after round.

    The inputs of a round follow from the seed alone, whatever the time it has.
    """
    number = 0
    while rounds is None or number < rounds:
        for name, target in targets.items():
            rng = random.Random(f"{seed} {number} {name}")
            content = rng.choice(target.seeds)
            for _ in range(rng.choice((1, 1, 1, 2))):
                try:
                    content = MUTATIONS[target.kind](content, rng)
                except Exception:  # it is no longer what the mutation knows
                    break
            yield fault_of(name, target, content)
        number += 1


def keep(fault: Fault) -> Path:
    """Write an input to ``build/fuzz``."""
    folder = KEPT / fault.reader.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / sha256(fault.content).hexdigest()[:16]
    path.write_bytes(fault.content)
    return path


def main() -> None:
    """Fuzz; exit 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    # A reader that never ends must not hold up the run: show where it is, and fail.
    faulthandler.dump_traceback_later(given.seconds + HANGS, exit=True)
    found: dict[tuple[str, str], Fault] = {}
    number, end = 0, time.monotonic() + given.seconds
    for fault in fuzz(TARGETS, given.seed, None):
        number += 1
        if fault is not None and (fault.reader, fault.reason) not in found:
            found[fault.reader, fault.reason] = fault
            print(f"{fault.reader}: {fault.reason}: {keep(fault)}", flush=True)
        if time.monotonic() > end:
            break
    print(f"{number:,} inputs to {len(TARGETS)} readers, {len(found)} faults")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
