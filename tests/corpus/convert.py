"""Runs ckptq's own conversions for the corpus, several in one process.

python -m corpus.convert --jobs JOBS.json     # [{"source": DIR, "output": DIR, "settings": ["KEY=VALUE", ...]}, ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ckptq.console import Console
from ckptq.convert import convert, prepare
from ckptq.recipe import load_recipe

TEXT = Path(__file__).parents[1] / "data" / "heldout.txt"
SETTINGS = (
    f"calibration.files={TEXT}",
    "calibration.samples=8",
    "calibration.sequence_length=64",
    "calibration.seed=0",
    "validation.values=false",  # tests/test_corpus_bases.py validates them whole
    "validation.passthrough=false",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", required=True, type=Path)
    for job in json.loads(parser.parse_args().jobs.read_text(encoding="utf-8")):
        recipe = load_recipe("qwen25vl-lm-fp8-text", [*SETTINGS, *job["settings"]], model=job["source"], output=job["output"])
        convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))


if __name__ == "__main__":
    main()
