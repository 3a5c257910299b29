"""Peak memory of `ckptq convert`, on generated checkpoints of Qwen2.5-VL's shape, at one depth and at twice that depth.

    python benchmarks/memory.py [--layers 24] [--samples 8] [--length 256] [--work DIR]

The bound: what the imports take, embeddings and vision tower, two decoder layers, what the waiting samples hold, and 256 MB.
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

from make_checkpoint import make_checkpoint  # noqa: E402

SHAPE = {"hidden": 2048, "intermediate": 11008, "heads": 16, "kv_heads": 2, "vocab": 32768, "vision_depth": 8, "vision_hidden": 640}
SLACK = 256 * 10**6


def main() -> None:
    """Generates both checkpoints, converts each in a child, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        rows = [measure(Path(work), layers, args.samples, args.length) for layers in (args.layers, 2 * args.layers)]
    growth = rows[1]["rss"] / rows[0]["rss"] - 1
    ok = all(row["rss"] <= row["bound"] for row in rows) and growth < 0.05
    if args.json:
        print(json.dumps({"rows": rows, "growth": growth, "ok": ok}))
    else:
        for row in rows:
            print(", ".join(f"{key} {value / 1e6:.0f} MB" if key != "layers" else f"{value} layers" for key, value in row.items()))
        print(f"twice the depth: {growth:+.1%} peak RSS (less than 5 % wanted); {'within' if ok else 'OUTSIDE'} the bounds")
    sys.exit(0 if ok else 1)


def measure(work: Path, layers: int, samples: int, length: int) -> dict[str, Any]:
    """Bytes: the checkpoint, the peak, and the bound with its terms."""
    from ckptq.checkpoint import read_inventory
    from ckptq.scopes import find_scope

    model = work / f"model-{layers}"
    make_checkpoint(model, layers=layers, **SHAPE)
    component = read_inventory(model).main
    scope = find_scope(component.config)
    layer = sum(t.spec.nbytes for name, t in component.tensors.items() if (scope.layer_of(name) or (-1, ""))[0] == 0)
    resident = sum(
        t.spec.nbytes for name, t in component.tensors.items() if not scope.layer_of(name) and not name.startswith("lm_head")
    )
    waiting = samples * length * 4 * SHAPE["hidden"]
    job = {"model": str(model), "output": str(work / f"out-{layers}"), "text": [str(ROOT / "tests/data/heldout.txt")],
           "samples": samples, "length": length, "threads": 2}  # fmt: skip
    (work / "job.json").write_text(json.dumps(job))
    child = [sys.executable, str(ROOT / "benchmarks/child.py"), "ckptq", str(work / "job.json")]
    result = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    terms = {"imports": result["baseline"], "resident": resident, "two layers": 2 * layer, "waiting": waiting, "slack": SLACK}
    return {"layers": layers, "checkpoint": component.nbytes, "rss": result["rss"], "bound": sum(terms.values()), **terms}


if __name__ == "__main__":
    main()
