"""The real vLLM as judge: serves one checkpoint and measures it. Runs under the interpreter that has vLLM; knows nothing of ckptq.

    PYTHONPATH=tests/server/shim .venv-vllm/bin/python tests/server/evaluate.py --model DIR --scenes examples/scenes
        --text tests/data/heldout.txt --out RESULT.json [--first N]
        [--log-probabilities FILE | --reference FILE] [--patch-requantize]

RESULT.json holds
    captions           the greedy caption of each eval scene
    exact              per scene, whether it is the right one
    caption_nll        per scene, mean NLL in nats of the right caption and its end token, teacher forced
    text_nll           per chunk of the held-out text, summed NLL; text_tokens: how many tokens that sums over
    text_continuation  greedy continuations of the first chunks
    prose_nll          of the first scenes, summed NLL of a piece of the text as the caption; prose_tokens. Of right captions the
                       model is so sure that a few tokens carry all of the loss and of the KL: of prose every token counts
    caption_kl, text_kl, prose_kl  per scene and per chunk, KL(reference || this) summed over positions (with --reference)
    caption_tokens     per scene, tokens of the right caption with its end token
    server             version and device; linears {what computes it: the language model's linears}; kv_cache {dtype: layers}

Requests are teacher forced one at a time, so that no batch's shape has a part in the figures. The full-vocabulary
log-probabilities come from a measuring wrapper around the model's compute_logits, which hands on what it got.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Read when vllm is imported. One thread: two that wait for each other are many times slower on a machine that is shared.
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
os.environ.update(OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # of a server in eager mode it compiles how log-probabilities are ranked, and that alone

import numpy as np
import torch
import vllm
from PIL import Image
from vllm import LLM, SamplingParams

PROMPT = "Describe the image."
UNMEASURED = 4
"""Exit code where it was served, and what came back can't be trusted."""
CHUNK = 128
CONTINUED, CONTINUATION = 4, 16
PROSE, PIECE = 32, 300
"""Scenes that are judged with a piece of the text for a caption, too, and characters of a piece."""
E4M3_MAX = 448.0
# A fixed share of a GPU's memory: several of these processes can have one GPU.
ON_GPU = {"kv_cache_memory_bytes": 2 << 30, "gpu_memory_utilization": 0.05}


class LogitsTap:
    """Keeps the logits [positions, vocabulary] of every compute_logits call since `clear`."""

    def __init__(self) -> None:
        self.calls: list[torch.Tensor] = []

    def attach(self, model: Any) -> None:
        compute = model.compute_logits

        def compute_logits(*args: Any, **kwargs: Any) -> Any:
            logits = compute(*args, **kwargs)
            self.calls.append(logits.detach().float().cpu().clone())
            return logits

        model.compute_logits = compute_logits

    def clear(self) -> None:
        self.calls.clear()


class UnmeasuredError(Exception):
    """What came back can't be trusted: a fault of this program, not of the server."""


class Judge:
    """One served checkpoint, with its chat template and tokenizer."""

    def __init__(self, model: Path) -> None:
        self.llm = LLM(
            model=str(model),
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=64,
            max_logprobs=1,
            enable_prefix_caching=False,
            limit_mm_per_prompt={"image": 1, "video": 0},
            seed=0,
            **(ON_GPU if torch.cuda.is_available() else {}),
        )
        self.tokenizer = self.llm.get_tokenizer()
        stored = model / "chat_template.json"
        self.template = json.loads(stored.read_text())["chat_template"] if stored.exists() else None
        self.tap = LogitsTap()

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        rendered: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        return rendered

    def greedy(self, requests: list[Any], tokens: int) -> list[str]:
        outputs = self.llm.generate(requests, SamplingParams(temperature=0.0, max_tokens=tokens), use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    def forced(self, request: Any, last: int) -> tuple[np.ndarray, np.ndarray]:
        """(log-probabilities float32 [last, vocabulary], the tokens int64 [last]) of the request's last tokens.

        Raises UnmeasuredError where the logits that were tapped aren't those the server scored its prompt with.
        """
        self.tap.clear()
        [output] = self.llm.generate([request], SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        tokens = output.prompt_token_ids
        positions = len(tokens) - 1
        # vLLM 0.26 on a GPU scores the position after the prompt along with it.
        found = [call[:positions] for call in self.tap.calls if call.shape[0] in (positions, positions + 1)]
        if len(found) != 1:
            raise UnmeasuredError(f"expected one call over {positions} positions, found {[c.shape[0] for c in self.tap.calls]}")
        scored = torch.log_softmax(found[0][-last:], dim=-1)
        wanted = torch.tensor(tokens[-last:])
        ours = scored.gather(1, wanted[:, None])[:, 0]
        server = torch.tensor(
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[-last:], tokens[-last:], strict=True)]
        )
        if not torch.allclose(ours, server, atol=1e-4):
            raise UnmeasuredError(f"tapped logits differ from the server's own scores by {(ours - server).abs().max().item()}")
        return scored.numpy(), wanted.numpy()


def scenes(folder: Path, first: int | None = None) -> list[tuple[Path, str]]:
    """(image, its right caption) of the first eval scenes, or of all."""
    data = json.loads((folder / "annotations/captions_eval.json").read_text())
    files = {image["id"]: image["file_name"] for image in data["images"]}
    return [(folder / "eval" / files[a["image_id"]], a["caption"]) for a in data["annotations"][:first]]


def forced_runs(judge: Judge, wanted: list[tuple[Path, str]], text: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """("text", "prose" or "caption", log-probabilities, tokens) of every chunk of the text, of the first scenes, of every scene.

    In this order, so that fewer scenes can be held against the reference of all.
    """
    for chunk in chunks(judge, text):
        yield "text", *judge.forced({"prompt_token_ids": chunk}, len(chunk) - 1)
    prompt = judge.prompt(PROMPT)
    start = len(judge.ids(prompt))
    whole = text.read_text(encoding="utf-8")
    prose = [(path, whole[i * PIECE : (i + 1) * PIECE].strip()) for i, (path, _) in enumerate(wanted[:PROSE])]
    for kind, path, caption in (*(("prose", *pair) for pair in prose), *(("caption", *pair) for pair in wanted)):
        ids = judge.ids(f"{prompt}{caption}<|im_end|>")
        if ids[:start] != judge.ids(prompt):
            raise UnmeasuredError(f"{path.name}: the caption changes how the prompt is split into tokens")
        request = {"prompt_token_ids": ids, "multi_modal_data": {"image": Image.open(path).convert("RGB")}}
        yield kind, *judge.forced(request, len(ids) - start)


def chunks(judge: Judge, text: Path) -> list[list[int]]:
    """The text's token ids in pieces of CHUNK; a shorter rest is left out."""
    ids = judge.ids(text.read_text(encoding="utf-8"))
    return [ids[at : at + CHUNK] for at in range(0, len(ids) - CHUNK + 1, CHUNK)]


def measure(judge: Judge, options: argparse.Namespace) -> dict[str, Any]:
    prompt = judge.prompt(PROMPT)
    right = scenes(options.scenes, options.first)
    images = [Image.open(path).convert("RGB") for path, _ in right]
    captions = judge.greedy([{"prompt": prompt, "multi_modal_data": {"image": image}} for image in images], 96)
    starts = [{"prompt_token_ids": chunk[: CHUNK // 2]} for chunk in chunks(judge, options.text)[:CONTINUED]]
    result: dict[str, Any] = {
        "captions": captions,
        "exact": [got.strip() == caption for got, (_, caption) in zip(captions, right, strict=True)],
        "text_continuation": judge.greedy(starts, CONTINUATION),
        **{f"{kind}_{figure}": [] for kind in ("caption", "text", "prose") for figure in ("nll", "tokens", "kl")},
    }
    judge.llm.apply_model(judge.tap.attach)  # after the generations, which so run in a server that nothing has touched
    reference = np.load(options.reference, mmap_mode="r") if options.reference else None
    kept: list[np.ndarray] = []
    at = 0
    for kind, scored, tokens in forced_runs(judge, right, options.text):
        nll = -scored.astype(np.float64)[np.arange(len(tokens)), tokens].sum()
        result[f"{kind}_nll"].append(nll / len(tokens) if kind == "caption" else nll)
        result[f"{kind}_tokens"].append(len(tokens))
        if reference is not None:
            result[f"{kind}_kl"].append(divergence(reference[at : at + len(tokens)], scored))
        if options.log_probabilities:
            kept.append(scored)
        at += len(tokens)
    if options.log_probabilities:
        # float32: half precision resolves a log-probability of -9 to 0.008, more than the KL between two formats.
        np.save(options.log_probabilities, np.concatenate(kept))
    return result


def divergence(reference: np.ndarray, scored: np.ndarray) -> float:
    """KL(reference || scored) in nats, summed over positions, of log-probabilities float32 [positions, vocabulary]."""
    p = reference.astype(np.float64)
    return float((np.exp(p) * (p - scored.astype(np.float64))).sum())


def patch_requantize() -> None:
    """Gives vLLM's requantize_with_max_scale, and nothing else, a reference for the operator its CPU build lacks.

    The arithmetic is that of csrc/quantization/w8a8/fp8/common.cuh scaled_fp8_conversion: float32 product with the scale's
    reciprocal, clamped.
    """
    from vllm.model_executor.layers.quantization.utils import w8a8_utils

    def scaled_fp8_quant(values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        product = values.float() * (1.0 / scale.float())
        return product.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale

    w8a8_utils.ops = SimpleNamespace(scaled_fp8_quant=scaled_fp8_quant)


def loaded_weights(model: Any) -> dict[str, np.ndarray]:
    """{module: the weight the server computes with, float32 [out, in]} of every linear it holds in FP8."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dtype == torch.float8_e4m3fn:
            found[name] = (weight.t().float() * module.weight_scale.float().reshape(-1, 1)).numpy()  # of all rows, or of each
    return found


def server(model: Any) -> dict[str, Any]:
    """What runs: `linears` names quant method, scheme and kernel, as found on the layers once they are ready to compute."""
    linears: dict[str, set[str]] = {}
    caches: dict[str, int] = {}
    for name, module in model.named_modules():
        if "visual" in name or ".layers." not in name:
            continue
        if isinstance(getattr(module, "kv_cache_dtype", None), str):
            caches[module.kv_cache_dtype] = caches.get(module.kv_cache_dtype, 0) + 1
        elif hasattr(module, "quant_method") and hasattr(module, "weight"):
            computed = [type(part).__name__ for part in (module.quant_method, getattr(module, "scheme", None)) if part is not None]
            computed += sorted({*kernels(module.quant_method), *kernels(getattr(module, "scheme", None))})
            linears.setdefault(" > ".join(computed), set()).add(name.rpartition(".")[2])
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return {
        "version": vllm.__version__,
        "device": device,
        "linears": {computed: sorted(names) for computed, names in sorted(linears.items())},
        "kv_cache": caches,
    }


def kernels(holder: object, depth: int = 3) -> Iterator[str]:
    """Class names of vLLM's linear kernels that the object holds, itself or through what it holds."""
    for part in vars(holder).values() if depth and hasattr(holder, "__dict__") else ():
        if type(part).__module__.startswith("vllm.model_executor.kernels.linear"):
            if type(part).__name__.endswith("Kernel"):
                yield type(part).__name__
        elif type(part).__module__.startswith("vllm."):
            yield from kernels(part, depth - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--scenes", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--first", type=int, help="of the scenes; all if not given")
    parser.add_argument("--log-probabilities", type=Path, help="write them here, float32 [positions, vocabulary], .npy")
    parser.add_argument("--reference", type=Path, help="what --log-probabilities wrote for the model to compare with")
    parser.add_argument("--weights", type=Path, help="write the FP8 linears as loaded here, dequantized, .npz")
    parser.add_argument("--patch-requantize", action="store_true", help="for a checkpoint whose fused shards differ in scale")
    options = parser.parse_args()
    if options.patch_requantize:
        patch_requantize()
    gc.freeze()  # the server looks through all objects there are, again and again
    judge = Judge(options.model)
    if options.weights:
        [weights] = judge.llm.apply_model(loaded_weights)
        np.savez(options.weights, **weights)
    [running] = judge.llm.apply_model(server)
    try:
        figures = measure(judge, options)
    except UnmeasuredError:
        traceback.print_exc()
        return UNMEASURED
    options.out.write_text(json.dumps({**figures, "server": running}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
