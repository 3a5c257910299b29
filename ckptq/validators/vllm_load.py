"""Loads the checkpoint with the real vLLM, in a process of the interpreter that has it, and generates a few tokens.

That it loads proves little (see layout.py); NaN or equal log-probabilities prove a fault.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptq.errors import UnsupportedError
from ckptq.validators import Code, Finding, error

CODES = {
    "server.failed": Code("vLLM stopped with an error"),
    "server.not-finite": Code("a log-probability is NaN or infinite where it can't be"),
    "server.flat": Code("every token is as likely as any other, at every position"),
}

PROMPT = "The sea was calm and the sky was clear, so they put the boat into the water and"
MAX_MODEL_LEN = 1024
_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
_NO_VLLM, _BROKEN_VLLM = 71, 72
_LINES = 12
"""Lines of the server's stderr that a finding shows."""
_FLAT = 0.01
"""Nats: log-probabilities of all likeliest tokens this close to -ln(vocabulary) say that the logits are constant."""

# Runs in the other environment, so it must not import ckptq. argv: checkpoint, result file, prompt, max_model_len.
_SCRIPT = f"""
import importlib.util, json, sys, time
if importlib.util.find_spec("vllm") is None:
    sys.exit({_NO_VLLM})
try:
    import vllm
    from vllm import LLM, SamplingParams
except Exception as problem:
    print(f"{{type(problem).__name__}}: {{problem}}", file=sys.stderr)
    sys.exit({_BROKEN_VLLM})

def main():
    folder, result, prompt, length = sys.argv[1:]
    start = time.monotonic()
    llm = LLM(model=folder, enforce_eager=True, max_model_len=int(length), max_num_seqs=4, seed=0)
    loaded = time.monotonic() - start
    settings = SamplingParams(temperature=0.0, max_tokens=8, logprobs=1, prompt_logprobs=1)
    output = llm.generate([prompt], settings, use_tqdm=False)[0]
    places = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
    config = llm.llm_engine.model_config
    facts = {{
        "version": vllm.__version__,
        "quantization": str(config.quantization),
        "load_seconds": loaded,
        "vocabulary": config.get_vocab_size(),
        "text": output.outputs[0].text,
        "token_ids": list(output.outputs[0].token_ids),
        "logprobs": [[entry.logprob for entry in place.values()] for place in places],
    }}
    with open(result, "w", encoding="utf-8") as file:
        json.dump(facts, file)

if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True, slots=True)
class Served:
    """What the server made of a checkpoint. After a failure all but `findings` is empty."""

    findings: tuple[Finding, ...]
    version: str = ""
    quantization: str = ""
    load_seconds: float = 0.0
    text: str = ""
    positions: int = 0


def load(folder: Path, python: Path) -> Served:
    """Loads `folder` with the vLLM of the interpreter `python`, in the caller's environment, and generates from a short text.

    Raises UnsupportedError where there is no such interpreter, or no vLLM in it that can be imported.
    """
    with tempfile.TemporaryDirectory(prefix="ckptq-") as scratch:
        result = Path(scratch) / "result.json"
        done = _run(folder, python, result)
        if done.returncode == _NO_VLLM:
            raise UnsupportedError(f"{python}: has no vLLM", hint="name the interpreter that has it: --vllm-python PATH")
        if done.returncode == _BROKEN_VLLM:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UnsupportedError(
                f"{python}: its vLLM can't be imported: {last}", hint=f"make `{python} -c 'import vllm'` work first"
            )
        if done.returncode != 0 or not result.is_file():
            return Served((_failed(folder, done),))
        facts = json.loads(result.read_text(encoding="utf-8"))
    return Served(
        tuple(judge(facts["logprobs"], facts["vocabulary"])),
        facts["version"],
        facts["quantization"],
        facts["load_seconds"],
        facts["text"],
        len(facts["logprobs"]),
    )


def _run(folder: Path, python: Path, result: Path) -> subprocess.CompletedProcess[str]:
    # absolute() and not resolve(): the link in a virtual environment's bin is what makes it that environment.
    command = [str(python.absolute()), "-c", _SCRIPT, str(folder.resolve()), str(result), PROMPT, str(MAX_MODEL_LEN)]
    try:
        # In the result's own folder: a module that lies where ckptq was started must not take the place of a library's.
        return subprocess.run(  # noqa: S603  the user names the interpreter
            command,
            env={**_DEFAULTS, **os.environ},
            capture_output=True,
            text=True,
            errors="replace",
            cwd=result.parent,
            check=False,
        )
    except OSError as problem:
        raise UnsupportedError(
            f"{python}: can't be started: {problem.strerror}", hint="name the interpreter that has vLLM: --vllm-python PATH"
        ) from problem


def _failed(folder: Path, done: subprocess.CompletedProcess[str]) -> Finding:
    lines = [line for line in (done.stderr.strip() or done.stdout.strip()).splitlines() if line.strip()][-_LINES:]
    ended = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return error(
        "server.failed", folder.name, "vLLM loads the checkpoint and generates", f"{ended}:\n" + "\n".join(lines),
        "it can't be served", "mend the other findings first; without any, the fault may lie with this vLLM or its settings",
    )  # fmt: skip


def judge(logprobs: list[list[float]], vocabulary: int) -> Iterator[Finding]:
    """Findings on log-probabilities, [position][entry]: the likeliest token's at each position, and the given one's."""
    entries = [value for place in logprobs for value in place]
    wrong = sum(math.isnan(value) or value == math.inf for value in entries)
    if wrong or not entries:
        yield error(
            "server.not-finite", "log-probabilities", "finite numbers", f"{wrong} of {len(entries)} are NaN or infinite",
            "a scale is missing, zero or NaN, or a weight holds NaN", "mend the other findings",
        )  # fmt: skip
        return
    flat = -math.log(vocabulary)
    best = [max(place) for place in logprobs]
    if all(abs(value - flat) < _FLAT for value in best):
        yield error(
            "server.flat", "log-probabilities", "some tokens likelier than others",
            f"{best[0]:.4f} at every position, which is -ln({vocabulary})",
            "the logits are constant", "lm_head or the last norm is broken, most often an lm_head that the exclude list misses",
        )  # fmt: skip
