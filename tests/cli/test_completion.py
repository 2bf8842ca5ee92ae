"""The Tab key completes names that are known, as the shell asks for them."""

import os
import subprocess
import sys

import pytest

PROGRAM = "from placer.cli.main import main; main()"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("placer export s", "sglang"),
        ("placer import vllm-r", "vllm-routed"),
        ("placer solve trace --engine sglang-deepep-l", "sglang-deepep-ll"),
        ("placer advise trace --engine vll", "vllm"),
        ("placer solve trace --policy fo", "follow"),
        ("placer solve trace --exchange per-n", "per-node"),
        ("placer simulate plan trace --hardware h1", "h100"),
        ("placer simulate plan trace --baseline kern", "kernighan-lin"),
        ("placer simulate plan trace --replica-choice cov", "cover"),
        ("placer replay plan model --exchange placer-d", "placer-dedup"),
        ("placer inspect x --phase", ""),
    ],
)
def test_values(typed: str, expected: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    asked = {"_PLACER_COMPLETE": "complete_bash", **words}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=False,
    )
    offered = done.stdout.split()
    assert (expected in offered) if expected else offered == [], done.stderr
