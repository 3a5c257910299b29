"""What ModelOpt's own fake-quantized model makes of samples: calibrated in memory, run whole, without ckptq's streaming or hooks.

    PYTHONPATH=tests python tests/peers/fake_quantized.py --jobs JOBS.json

JOBS.json: `[{"family": NAME, "source": DIR, "settings": ["KEY=VALUE", ...], "output": FILE}, ...]`. FILE gets {sample's number: log
probabilities of every next token, F32 [T - 1, V]} of the family's calibration samples, in their order. Run it in a process of its
own: ModelOpt patches transformers and torch for good.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from families import Family, families
from peers.modelopt_export import encoded_samples
from peers.resident import by_modelopt, load
from safetensors.torch import save_file

FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def scored(family: Family, source: Path, settings: Sequence[str]) -> dict[str, torch.Tensor]:
    """See above. `settings`: as `--set` takes them."""
    _, samples = encoded_samples(family.recipes[0], settings)
    model = family.resident(source) if family.resident else load(source)
    with torch.inference_mode():
        by_modelopt(model, samples, family.off)
        as_exported(model)
        return {
            str(number): torch.log_softmax(model(**sample, use_cache=False).logits[0, :-1].float(), -1)
            for number, sample in enumerate(samples)
        }


def as_exported(model: Any) -> None:
    """One weight scale for the shards of a fused linear: export_hf_checkpoint sets the largest, the calibration does not."""
    groups = defaultdict(list)
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        quantizer = getattr(module, "weight_quantizer", None)
        if leaf in FUSED and quantizer is not None and getattr(quantizer, "amax", None) is not None:
            groups[parent, FUSED[leaf]].append(quantizer)
    for quantizers in groups.values():
        largest = torch.stack([quantizer.amax for quantizer in quantizers]).max()
        for quantizer in quantizers:
            quantizer.amax = largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", required=True, type=Path)
    jobs = json.loads(parser.parse_args().jobs.read_text(encoding="utf-8"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    for job in jobs:
        save_file(scored(families()[job["family"]], Path(job["source"]), job["settings"]), job["output"])


if __name__ == "__main__":
    main()
