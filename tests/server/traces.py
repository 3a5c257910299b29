"""Loads checkpoints one after the other in the real vLLM, watched. A JSON line for each JSON line; runs where vLLM is.

    {"folder": DIR} -> the trace of ckptq/validators/vllm_child.py

What vLLM's CPU build lacks is stood in for; the traces say what was.
"""

from __future__ import annotations

import gc
import json
import os
import sys

answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # whatever vLLM prints

from behavior import vllm_child  # noqa: E402 - it sets the environment that vLLM is imported in


def main() -> None:
    load = vllm_child().load
    for line in sys.stdin:
        print(json.dumps(load(json.loads(line)["folder"]).trace), file=answers, flush=True)
        gc.collect()
        gc.freeze()  # what is left stays: vLLM looks through all of it twice in a load, which took most of its time


if __name__ == "__main__":
    main()
