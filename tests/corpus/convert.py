"""Runs ckptq's own conversions for the corpus, several in one process.

python -m corpus.convert --jobs JOBS.json     # [{"source": DIR, "output": DIR, "settings": ["KEY=VALUE", ...]}, ...]

A job with a "family" of tests/families in the place of settings is done by the first of its recipes, or by "recipe".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ckptq.console import Console
from ckptq.convert import convert, prepare
from ckptq.recipe import Recipe, load_recipe

TEXT = Path(__file__).parents[1] / "data" / "heldout.txt"
UNSEEN = ("validation.values=false", "validation.passthrough=false")
"""tests/test_corpus_bases.py validates them whole."""
SETTINGS = (
    f"calibration.files={TEXT}",
    "calibration.samples=8",
    "calibration.sequence_length=64",
    "calibration.seed=0",
    *UNSEEN,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", required=True, type=Path)
    for job in json.loads(parser.parse_args().jobs.read_text(encoding="utf-8")):
        recipe = recipe_of(job)
        convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))


def recipe_of(job: dict[str, Any]) -> Recipe:
    if "family" not in job:
        return load_recipe("qwen25vl-lm-fp8-text", [*SETTINGS, *job["settings"]], model=job["source"], output=job["output"])
    from families import families

    family = families()[job["family"]]
    name = job.get("recipe", family.recipes[0])
    return load_recipe(name, [*family.settings(name, Path(job["source"]), Path(job["output"])), *UNSEEN])


if __name__ == "__main__":
    main()
