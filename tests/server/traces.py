"""Loads checkpoints one after the other in the real vLLM, watched. Runs under the interpreter that has vLLM.

    python tests/server/traces.py OUT.json DIR...     # {DIR: the trace of ckptq/validators/vllm_child.py}

What vLLM's CPU build lacks is stood in for; the traces say what was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from behavior import vllm_child


def main() -> None:
    out, *folders = sys.argv[1:]
    load = vllm_child().load
    Path(out).write_text(json.dumps({folder: load(folder).trace for folder in folders}), encoding="utf-8")


if __name__ == "__main__":
    main()
