"""Record the demo traces: one per checkpoint of the training, all on the same text.

    python traces/demo/record.py --training build/demo-training --out build/demo-traces

The text is the profile split of ``placer.demo.text``, which no checkpoint was trained on.
Its documents differ a little between Python versions, and so do the traces.
"""

import argparse
import tempfile
from pathlib import Path

from placer.demo.text import (
    DOMAINS,
    documents,
)
from placer.trace.corpus import Corpus
from placer.trace.record import (
    RecordOptions,
    record,
)

TOKENS_PER_DOMAIN = 16_384
CHECKPOINTS = {
    "step-00200": "step-00200",
    "step-00800": "step-00800",
    "step-02000": "step-02000",
    "model": "final",
}


def write_corpora(folder: Path) -> list[Corpus]:
    """Write the profile documents below ``folder``, one directory per domain."""
    for one in documents("profile"):
        path = folder / one.domain / f"{one.name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(one.text, encoding="utf-8")
    return [Corpus(domain=domain, path=folder / domain) for domain in DOMAINS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--training", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    options = RecordOptions(
        max_tokens=TOKENS_PER_DOMAIN, with_weights=False, dtype="float32"
    )
    with tempfile.TemporaryDirectory() as folder:
        corpora = write_corpora(Path(folder))
        for checkpoint, name in CHECKPOINTS.items():
            header = record(args.training / checkpoint, corpora, args.out / name, options)
            print(f"{args.out / name}: {header.num_tokens} tokens", flush=True)


if __name__ == "__main__":
    main()
