"""What waits for nobody: `ckptq --help`, and the dry run of a 72B-sized checkpoint (real headers over sparse files).

    python benchmarks/startup.py [--rounds 5]

Goals for the fastest round: help under 0.3 s; dry run under 2 s and 150 MB. Exits with 1 where one is missed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, measure

CKPTQ = [sys.executable, "-m", "ckptq"]


def main() -> None:
    """Times both, each in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "72b"
        subprocess.run([sys.executable, ROOT / "tests/make_checkpoint.py", model, "--preset", "72b"], check=True, stdout=sys.stderr)
        plan = ["convert", "--recipe", "qwen25vl-lm-fp8", "--model", str(model), "--dry-run"]
        runs = {"ckptq --help": ["--help"], "dry run of 72B": plan}
        results = {name: [measure([*CKPTQ, *arguments]) for _ in range(rounds)] for name, arguments in runs.items()}
    for name, found in results.items():
        print(f"{name}: {min(wall for wall, _ in found):.2f} s, {max(rss for _, rss in found) / 1e6:.0f} MB")
    (help_wall, _), (plan_wall, plan_rss) = (min(found) for found in results.values())
    sys.exit(0 if help_wall < 0.3 and plan_wall < 2 and plan_rss < 150e6 else 1)


if __name__ == "__main__":
    main()
