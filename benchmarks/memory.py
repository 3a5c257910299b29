"""Peak memory of `ckptq convert`, on generated checkpoints of Qwen2.5-VL's shape, at one depth and at twice that depth.

    python benchmarks/memory.py [--layers 24] [--samples 8] [--length 256] [--work DIR]
    python benchmarks/memory.py --experts 64 --layers 3      # of Qwen3-MoE's shape

The bound: what the imports take, embeddings and vision tower, two decoder layers with all their experts (one computes while the
next is read), what the waiting samples hold, and 256 MB. With experts also under a --memory that leaves room for one layer, which
the bound then counts, and without calibration: the imports and 256 MB.
Exits with 1 where the bound is broken or doubling the depth changes the peak by 5 % or more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from make_checkpoint import make_checkpoint, make_experts  # noqa: E402

SHAPE = {"hidden": 2048, "intermediate": 11008, "heads": 16, "kv_heads": 2, "vocab": 32768, "vision_depth": 8, "vision_hidden": 640}
MOE_SHAPE = {"hidden": 2048, "moe": 768, "chosen": 8, "heads": 32, "kv_heads": 4, "vocab": 4096}
"""Of Qwen3-30B-A3B, which has 128 experts: a layer of 64 takes 0.63 GB."""
MOE_RUNS = {
    "qwen3-moe-fp8": ("qwen3-moe-fp8", 2),
    "qwen3-moe-fp8, --memory for one layer": ("qwen3-moe-fp8", 1),
    "qwen3-moe-fp8-dynamic, no calibration": ("qwen3-moe-fp8-dynamic", 0),
}
SLACK = 256 * 10**6


def main() -> None:
    """Generates both checkpoints, converts each in a child, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    runs = MOE_RUNS if args.experts else {"qwen25vl-lm-fp8-text": ("qwen25vl-lm-fp8-text", 2)}
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        depths = (args.layers, 2 * args.layers)
        models = {layers: make(Path(work) / f"model-{layers}", layers, args.experts) for layers in depths}
        sound = []
        for title, (recipe, held) in runs.items():
            rows = [measure(models[layers], args.samples, args.length, recipe, held) for layers in depths]
            sound.append(show(title, rows, args))
    sys.exit(0 if all(sound) else 1)


def make(model: Path, layers: int, experts: int) -> Path:
    if experts:
        return make_experts(model, layers=layers, experts=experts, **MOE_SHAPE)
    return make_checkpoint(model, layers=layers, **SHAPE)


def show(title: str, rows: list[dict[str, Any]], args: argparse.Namespace) -> bool:
    """Prints what was measured. Whether it is within the bounds."""
    growth = rows[1]["rss"] / rows[0]["rss"] - 1
    ok = all(row["rss"] <= row["bound"] for row in rows) and growth < 0.05
    if args.json:
        print(json.dumps({"run": title, "rows": rows, "growth": growth, "ok": ok}))
    else:
        print(title)
        for row in rows:
            print(", ".join(f"{key} {value / 1e6:.0f} MB" if key != "layers" else f"{value} layers" for key, value in row.items()))
        print(f"twice the depth: {growth:+.1%} peak RSS (less than 5 % wanted); {'within' if ok else 'OUTSIDE'} the bounds")
    return ok


def measure(model: Path, samples: int, length: int, recipe: str, held: int) -> dict[str, Any]:
    """Bytes: the checkpoint, the peak, and the bound with its terms. `held`: how many decoder layers there may be at once."""
    from ckptq.checkpoint import read_inventory
    from ckptq.scopes import find_scope

    component = read_inventory(model).main
    scope = find_scope(component.config)
    layer = sum(t.spec.nbytes for name, t in component.tensors.items() if (scope.layer_of(name) or (-1, ""))[0] == 0)
    resident = sum(
        t.spec.nbytes for name, t in component.tensors.items() if not scope.layer_of(name) and not name.startswith("lm_head")
    )
    waiting = samples * length * 4 * component.config.get("text_config", component.config)["hidden_size"]
    job = {"model": str(model), "output": f"{model}-out", "text": [str(ROOT / "tests/data/heldout.txt")],
           "samples": samples, "length": length, "threads": 2, "recipe": recipe}  # fmt: skip
    if held == 1:
        job["memory"] = room(model, samples, length, recipe)
    file = model.with_name("job.json")
    file.write_text(json.dumps(job))
    child = [sys.executable, str(ROOT / "benchmarks/child.py"), "ckptq", str(file)]
    result = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    terms = {"imports": result["baseline"], "slack": SLACK}
    if held:
        terms |= {"resident": resident, "one layer" if held == 1 else "two layers": held * layer, "waiting": waiting}
    layers = scope.layer_count(component.config)
    return {"layers": layers, "checkpoint": component.nbytes, "rss": result["rss"], "bound": sum(terms.values()), **terms}


def room(model: Path, samples: int, length: int, recipe: str) -> int:
    """What --memory must be for all samples and one decoder layer."""
    from ckptq.convert import prepare
    from ckptq.recipe import load_recipe

    settings = [f"calibration.samples={samples}", f"calibration.sequence_length={length}"]
    cost = prepare(load_recipe(recipe, settings, model=str(model), output=f"{model}-out")).cost
    return dataclasses.replace(cost, ahead=0).fixed + samples * cost.sample


if __name__ == "__main__":
    main()
