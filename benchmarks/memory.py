"""Peak memory of `ckptq convert`, on generated checkpoints of Qwen2.5-VL's shape, at one depth and at twice that depth.

    python benchmarks/memory.py [--layers 24] [--samples 8] [--length 256] [--work DIR]
    python benchmarks/memory.py --experts 64 --layers 4      # of Qwen3-MoE's shape, calibrated and without calibration

The bound: what the imports take, embeddings and vision tower, two decoder layers with all their experts (one computes while the
next is read), what the waiting samples hold, and 256 MB. Without calibration none but the imports and 256 MB.
Exits with 1 where the bound is broken or doubling the depth changes the peak by 5 % or more.
"""

from __future__ import annotations

import argparse
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
    recipes = ["qwen3-moe-fp8", "qwen3-moe-fp8-dynamic"] if args.experts else ["qwen25vl-lm-fp8-text"]
    sound = []
    for recipe in recipes:
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            rows = [
                measure(Path(work), layers, args.samples, args.length, args.experts, recipe)
                for layers in (args.layers, 2 * args.layers)
            ]
        sound.append(show(recipe, rows, args))
    sys.exit(0 if all(sound) else 1)


def show(recipe: str, rows: list[dict[str, Any]], args: argparse.Namespace) -> bool:
    """Prints what was measured. Whether it is within the bounds."""
    growth = rows[1]["rss"] / rows[0]["rss"] - 1
    ok = all(row["rss"] <= row["bound"] for row in rows) and growth < 0.05
    print(f"{recipe}:", file=sys.stderr)
    if args.json:
        print(json.dumps({"rows": rows, "growth": growth, "ok": ok}))
    else:
        for row in rows:
            print(", ".join(f"{key} {value / 1e6:.0f} MB" if key != "layers" else f"{value} layers" for key, value in row.items()))
        print(f"twice the depth: {growth:+.1%} peak RSS (less than 5 % wanted); {'within' if ok else 'OUTSIDE'} the bounds")
    return ok


def measure(work: Path, layers: int, samples: int, length: int, experts: int, recipe: str) -> dict[str, Any]:
    """Bytes: the checkpoint, the peak, and the bound with its terms."""
    from ckptq.checkpoint import read_inventory
    from ckptq.scopes import find_scope

    model = work / f"model-{layers}"
    if experts:
        make_experts(model, layers=layers, experts=experts, **MOE_SHAPE)
    else:
        make_checkpoint(model, layers=layers, **SHAPE)
    component = read_inventory(model).main
    scope = find_scope(component.config)
    layer = sum(t.spec.nbytes for name, t in component.tensors.items() if (scope.layer_of(name) or (-1, ""))[0] == 0)
    resident = sum(
        t.spec.nbytes for name, t in component.tensors.items() if not scope.layer_of(name) and not name.startswith("lm_head")
    )
    waiting = samples * length * 4 * (MOE_SHAPE if experts else SHAPE)["hidden"]
    job = {"model": str(model), "output": str(work / f"out-{layers}"), "text": [str(ROOT / "tests/data/heldout.txt")],
           "samples": samples, "length": length, "threads": 2, "recipe": recipe}  # fmt: skip
    (work / "job.json").write_text(json.dumps(job))
    child = [sys.executable, str(ROOT / "benchmarks/child.py"), "ckptq", str(work / "job.json")]
    result = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    terms = {"imports": result["baseline"], "resident": resident, "two layers": 2 * layer, "waiting": waiting, "slack": SLACK}
    if recipe.endswith("-dynamic"):
        terms |= dict.fromkeys(("resident", "two layers", "waiting"), 0)
    return {"layers": layers, "checkpoint": component.nbytes, "rss": result["rss"], "bound": sum(terms.values()), **terms}


if __name__ == "__main__":
    main()
