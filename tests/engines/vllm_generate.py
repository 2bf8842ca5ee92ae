"""Run by vLLM's Python: ``vllm_generate.py JOB.json`` generates greedily with some models.

The job names ``models`` (name: directory), ``prompts``, ``max_tokens`` and ``options`` of
``LLM``. Each model's responses are written to ``out``/NAME.jsonl, shaped as those of the
server; log-probabilities are by token id.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.utils.serial_utils import numpy2base64


def by_id(logprobs: list) -> list:
    """Return ``{token id: log-probability}`` of each position; the first token has none."""
    return [
        one and {token: value.logprob for token, value in one.items()} for one in logprobs
    ]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job["max_tokens"],
        logprobs=5,
        prompt_logprobs=5,
        ignore_eos=True,
    )
    for name, model in job["models"].items():
        llm = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=8,
            enable_return_routed_experts=True,
            **job["options"],
        )
        with (Path(job["out"]) / f"{name}.jsonl").open("w") as lines:
            for request in llm.generate(job["prompts"], sampling):
                (output,) = request.outputs
                choice = {
                    "prompt_token_ids": request.prompt_token_ids,
                    "token_ids": list(output.token_ids),
                    "routed_experts": numpy2base64(output.routed_experts),
                    "logprobs": by_id([*request.prompt_logprobs, *output.logprobs]),
                }
                usage = {"prompt_tokens": len(request.prompt_token_ids)}
                lines.write(json.dumps({"usage": usage, "choices": [choice]}) + "\n")
        del llm


if __name__ == "__main__":
    main()
