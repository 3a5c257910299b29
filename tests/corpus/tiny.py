"""Unquantized checkpoints of tests/families, with a spread of its own for every matrix, so that a swap of scales shows.

python -m corpus.tiny --jobs JOBS.json     # [{"name": a file of tests/families, "output": DIR}, ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from families import families

from corpus.edit import Tensors, tensors
from corpus.sources import spread


def make(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    families()[name].make(folder)
    tensors(widen)(folder)


def widen(stored: Tensors) -> None:
    for name, tensor in stored.items():
        if tensor.ndim > 1 and name.endswith(".weight"):
            stored[name] = (tensor.float() * spread(name)).to(tensor.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", required=True, type=Path)
    for job in json.loads(parser.parse_args().jobs.read_text(encoding="utf-8")):
        make(job["name"], Path(job["output"]))


if __name__ == "__main__":
    main()
