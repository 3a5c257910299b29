"""Loads the checkpoint with the real vLLM, in a process of the interpreter that has it, and on demand generates from it.

vllm_child.py does it and says which elements vLLM's loader wrote and read; here that becomes findings. vLLM itself checks none of it
for a quantized checkpoint (0.32.0 model_executor/model_loader/default_loader.py load_weights: tracking is on for unquantized ones).
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptq.checkpoint import read_inventory
from ckptq.errors import CkptqError, UnsupportedError
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.vllm_child import BROKEN_VLLM, KV_SCALE, NO_VLLM

_LOADER = "vLLM 0.32.0 model_executor/"
CODES = {
    "server.failed": Code("vLLM stopped with an error"),
    "server.timeout": Code("vLLM did not end within the time limit"),
    "server.ignored-key": Code("vLLM's loader never read a stored tensor", _LOADER + "models/utils.py AutoWeightsLoader._load_module"),
    "server.unwritten": Code(
        "nothing wrote a parameter of vLLM's, or a part of it", _LOADER + "model_loader/default_loader.py DefaultModelLoader.load_weights"
    ),
    "server.truncated": Code("vLLM's loader left a part of a stored tensor out", _LOADER + "parameter.py _ColumnvLLMParameter"),
    "server.lossy-cast": Code(
        "vLLM's loader copied values into a dtype that changes them", _LOADER + "models/utils.py AutoWeightsLoader._load_param"
    ),
    "server.no-kernel": Code("this machine's vLLM can load the format but not compute with it"),
    "server.not-finite": Code("a log-probability is NaN or infinite where it can't be"),
    "server.flat": Code("every token is as likely as any other, at every position"),
    "server.blind": Code("two different images give the same log-probabilities"),
}

TIME_LIMIT = 1800.0
"""Seconds: some minutes of loading and compiling are usual, half an hour is not."""
# One process, so that the loading can be watched; offline; and on a CPU a small KV cache.
_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
_FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_LINES = 12
"""Lines of the server's stderr that a finding shows."""
_TAIL = 1 << 16
_FLAT = 0.01
"""Nats: log-probabilities of all likeliest tokens this close to -ln(vocabulary) say that the logits are constant."""
_SAME = 1e-6
"""Nats: a first token's log-probabilities from two images that differ by less come from a tower that sees neither."""

_LOADED = ("process", "engine", "generate", "done")
_DOING = {
    "config": "reading the config", "create": "building the model", "load": "loading the weights",
    "process": "processing the loaded weights", "engine": "starting the engine", "generate": "generating",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Served:
    """What the server made of a checkpoint. After a failure what it didn't come to is empty.

    load_seconds  building the model, loading and post-processing, without imports and engine
    text          what it went on with after the prompt; empty unless it was to generate
    positions     log-probabilities that were looked at
    kernels       vLLM's name of a linear kernel -> linears that it chose it for
    stand_ins     kernels that this machine's vLLM lacks; the load was watched with others in their place
    """

    findings: tuple[Finding, ...]
    version: str = ""
    quantization: str = ""
    load_seconds: float = 0.0
    text: str = ""
    positions: int = 0
    platform: str = ""
    kv_cache_dtype: str = ""
    kernels: Mapping[str, int] = field(default_factory=dict)
    stand_ins: tuple[str, ...] = ()
    image_texts: tuple[str, ...] = ()


def default_python() -> Path:
    """The interpreter that runs this."""
    return Path(sys.executable)


def load(folder: Path, python: Path, *, generate: bool = False, timeout: float = TIME_LIMIT) -> Served:
    """Loads `folder` with the vLLM of the interpreter `python`, in the caller's environment; with `generate` makes the engine too.

    Nothing of the checkpoint is executed: vLLM's trust_remote_code stays off. `timeout` in seconds, for all of it.
    Raises UnsupportedError where there is no such interpreter, or no vLLM in it that can be imported.
    """
    with tempfile.TemporaryDirectory(prefix="ckptq-") as scratch:
        result = Path(scratch) / "result.json"
        code, said = _run(folder, python, result, generate, timeout)
        if code is None:
            return Served((_timed_out(folder, timeout, said),))
        if code == NO_VLLM:
            raise UnsupportedError(f"{python}: has no vLLM", hint="name the interpreter that has it: --vllm-python PATH")
        if code == BROKEN_VLLM:
            last = (said.strip() or "no message").splitlines()[-1]
            raise UnsupportedError(
                f"{python}: its vLLM can't be imported: {last}", hint=f"make `{python} -c 'import vllm'` work first"
            )
        if code != 0 or not result.is_file():
            return Served((_died(folder, code, said),))
        trace = json.loads(result.read_text(encoding="utf-8"))
    return served(trace, folder, _stored(folder))


def served(trace: Mapping[str, Any], folder: Path, stored: Sequence[str]) -> Served:
    """The trace of vllm_child.py as findings and figures. `stored`: names of the checkpoint's tensors, as its headers have them."""
    generated = trace["generated"] or {"text": "", "logprobs": [], "images": []}
    images = generated["images"]
    return Served(
        tuple(_findings(trace, folder, stored)),
        trace["version"],
        str(trace["quantization"] or ""),
        trace["seconds"].get("model", 0.0),
        generated["text"],
        len(generated["logprobs"]) + sum(len(image["logprobs"]) for image in images),
        trace["platform"],
        trace["kv_cache_dtype"],
        trace["kernels"],
        tuple(trace["stand_ins"]),
        tuple(image["text"] for image in images),
    )


def _stored(folder: Path) -> list[str]:
    try:
        return list(read_inventory(folder).main.tensors)
    except CkptqError:
        return []  # said elsewhere; what vLLM itself met is in the trace


# --- the process ---


def _run(folder: Path, python: Path, result: Path, generate: bool, timeout: float) -> tuple[int | None, str]:
    """(exit code, or None where the time was over; the end of what it said)."""
    # absolute() and not resolve(): the link in a virtual environment's bin is what makes it that environment.
    child = Path(__file__).with_name("vllm_child.py").resolve()
    command = [str(python.absolute()), str(child), str(folder.resolve()), str(result), *(["--generate"] if generate else [])]
    log = result.with_name("log.txt")
    with log.open("wb") as out:
        try:
            # In the result's own folder: a module that lies where ckptq was started must not take the place of a library's.
            process = subprocess.Popen(  # noqa: S603  the user names the interpreter
                command,
                env={**_DEFAULTS, **os.environ, **_FORCED},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=result.parent,
                start_new_session=True,
            )
        except OSError as problem:
            raise UnsupportedError(
                f"{python}: can't be started: {problem.strerror}", hint="name the interpreter that has vLLM: --vllm-python PATH"
            ) from problem
        code: int | None = None
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:  # too long, or Ctrl-C: it and what it started are one group
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        return code, file.read().decode(errors="replace")


def _last(said: str) -> str:
    return "\n".join([line for line in said.splitlines() if line.strip()][-_LINES:])


def _timed_out(folder: Path, timeout: float, said: str) -> Finding:
    return error(
        "server.timeout", folder.name, "vLLM loads the checkpoint", f"not within {timeout:g} s; it said last:\n{_last(said)}",
        "nobody knows whether it can be served", "look at what it waits for; a slow disk or a first compilation may need a longer limit",
    )  # fmt: skip


def _died(folder: Path, code: int, said: str) -> Finding:
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return error(
        "server.failed", folder.name, "vLLM loads the checkpoint", f"{ended}:\n{_last(said)}", "it can't be served",
        "mend the other findings first; without any, the fault may lie with this vLLM, its settings or too little memory",
    )  # fmt: skip


# --- from the trace to findings ---


def _findings(trace: Mapping[str, Any], folder: Path, stored: Sequence[str]) -> Iterator[Finding]:
    if trace["error"]:
        yield _stopped(trace, folder)
    if trace["stage"] in _LOADED:
        names = _Names(trace)
        yield from _ignored(trace, stored)
        yield from _unwritten(trace, names)
        yield from _kv_scales(trace)
        yield from _truncated(trace)
        yield from _casts(trace)
    if trace["generated"]:
        yield from _answers(trace["generated"])


def _stopped(trace: Mapping[str, Any], folder: Path) -> Finding:
    problem, stage = trace["error"], trace["stage"]
    message = _last(problem["message"]) or problem["where"]
    found = f"{problem['type']} while {_DOING[stage]}: {message}"
    lacking = [name for name in trace["stand_ins"] if name != "scaled_fp8_quant"]
    if stage in ("engine", "generate") and lacking:
        return warning(
            "server.no-kernel", folder.name, "vLLM generates", found,
            f"loaded and looked at, but vLLM on this machine ({trace['platform']}) has no kernel for it: {', '.join(lacking)}",
            "generate on the machine that will serve it",
        )  # fmt: skip
    return error(
        "server.failed", folder.name, "vLLM loads the checkpoint" if stage != "generate" else "vLLM generates",
        f"{found}\nat {problem['where']}", "it can't be served",
        "mend the other findings first; without any, the fault may lie with this vLLM or its settings",
    )  # fmt: skip


class _Names:
    """The checkpoint's name of a parameter, learned from the keys that were loaded: they differ in front of the layer's number."""

    def __init__(self, trace: Mapping[str, Any]) -> None:
        self.fronts: dict[str, str] = {}
        for key, entry in trace["keys"].items():
            for parameter in entry["parameters"]:
                self.fronts.setdefault(_front(parameter), _front(key))

    def of(self, parameter: str, part: str) -> str:
        """`part` takes the place of the fused linear's name; an expert's comes behind `experts`."""
        front = _front(parameter)
        name = self.fronts.get(front, front) + parameter[len(front) :]
        owner, _, leaf = name.rpartition(".")
        if not part:
            return name
        if "." in part:
            return f"{owner.removesuffix('.routed_experts')}.{part}.{re.sub('^w13_|^w2_', '', leaf)}"
        return f"{owner.rpartition('.')[0]}.{part}.{leaf}"


def _front(name: str) -> str:
    """What stands before the first number, or before the last dot."""
    numbered = re.match(r"(.*?)\.\d+\.", name)
    return numbered[1] if numbered else name.rpartition(".")[0]


def _ignored(trace: Mapping[str, Any], stored: Sequence[str]) -> Iterator[Finding]:
    cache = _fp8_cache(trace)
    for key in dict.fromkeys([*trace["keys"], *stored]):
        entry = trace["keys"].get(key)
        if entry is not None and (entry["read"] or not entry["elements"]):
            unused = [p for p in entry["parameters"] if trace["parameters"][p].get("cache", "fp8").startswith("fp8") is False]
            if unused and key.endswith(("k_scale", "v_scale", "kv_scale")):
                yield warning(
                    "server.ignored-key", key, "an FP8 KV cache, which it is for", f"a KV cache of dtype {trace['kv_cache_dtype']}",
                    "the scale is loaded and not used", "declare the FP8 KV cache in config.json, or leave the scales out",
                )  # fmt: skip
            continue
        judged = _judge_ignored(key, cache, tied="lm_head.weight" not in trace["parameters"])
        if judged is not None:
            severity, effect = judged
            yield severity(
                "server.ignored-key", key, "a tensor that vLLM loads", "never read" if entry else "in no file that vLLM reads", effect,
                "name it as the server does, or leave it out",
            )  # fmt: skip


_ELSEWHERE = ("talker", "token2wav", "code2wav", "mtp", "code_predictor")
"""Parts of Omni and multi-token models that the plain server doesn't build (models/qwen3_omni_moe_thinker.py hf_to_vllm_mapper)."""


def _judge_ignored(key: str, cache: bool, *, tied: bool) -> tuple[Any, str] | None:
    """(error or warning, effect), or None for what every server recomputes."""
    if re.search(r"rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)$", key):
        return None  # models/utils.py REMOVE_UNUSED_ROTARY_EMBEDS_MAPPER
    if key.endswith(("k_scale", "v_scale")):
        return (error, "the KV cache does without it") if cache else (warning, "no KV cache uses it")
    if key.endswith((".bias", ".g_idx", "_zero_point", ".q_scale", ".prob_scale")):
        return warning, "the server answers without it"
    if key.startswith("lm_head.") and tied:
        return warning, "the head is tied: the embeddings take its place"
    if {*_ELSEWHERE} & {*key.split(".")[:3]}:
        return warning, "this server doesn't build the part that it belongs to"
    return error, "the server answers without it"


def _fp8_cache(trace: Mapping[str, Any]) -> bool:
    return any(p.get("cache", "").startswith("fp8") for p in trace["parameters"].values())


def _unwritten(trace: Mapping[str, Any], names: _Names) -> Iterator[Finding]:
    for name, parameter in trace["parameters"].items():
        if parameter["exempt"]:
            continue
        leaf = name.rpartition(".")[2]
        for missing in parameter["missing"]:
            whole = missing["elements"] == missing["of"]
            first, end = missing["rows"]
            found = "nothing" if whole else f"{missing['elements']} of {missing['of']} elements, in rows {first}..{end - 1}, got nothing"
            if missing["part"]:
                found += f", for its part of the server's {'.'.join(name.split('.')[-2:])}"
            # Of a fused linear the largest is taken, and they are most often equal: process_weights_after_loading.
            rest = leaf == "input_scale" and 0 < parameter["written"]
            yield (warning if rest else error)(
                "server.unwritten", names.of(name, missing["part"]), "a value for every element of the server's parameter", found,
                "the largest of the others is taken" if rest else _left(leaf), "store the tensor under this name, with the full shape",
            )  # fmt: skip


def _left(leaf: str) -> str:
    """fp8_utils.py create_fp8_scale_parameter, and torch.empty for the rest."""
    if "scale" in leaf:
        return "the scale stays what it was made with, -3.4e38 or 1.0 or memory as it was: wrong numbers or NaN"
    return "it stays memory as it was: arbitrary numbers or NaN"


def _kv_scales(trace: Mapping[str, Any]) -> Iterator[Finding]:
    """Of an FP8 KV cache: all missing is what ModelOpt writes without calibration (1.0 is used), some is a fault (kv_cache.py)."""
    scales = {
        name: parameter["written"]
        for name, parameter in trace["parameters"].items()
        if parameter["exempt"] == KV_SCALE and name.endswith(("k_scale", "v_scale")) and parameter["cache"].startswith("fp8")
    }
    some = any(scales.values())
    for name, written in scales.items():
        if not written:
            yield (error if some else warning)(
                "server.unwritten", name, "a scale for the FP8 KV cache", "nothing, and others have one" if some else "nothing",
                "the other one's or 1.0 is taken, or the server stops" if some else "1.0 is taken",
                "store k_scale and v_scale for every layer",
            )  # fmt: skip


def _truncated(trace: Mapping[str, Any]) -> Iterator[Finding]:
    for key, entry in trace["keys"].items():
        if not 0 < entry["read"] < entry["elements"]:
            continue
        row = entry["elements"] // entry["shape"][0]
        first, end = entry["unread"][0][0] // row, -(-entry["unread"][-1][1] // row)
        yield error(
            "server.truncated", key, "the shape that the config asks for",
            f"{entry['shape']}; of it {entry['elements'] - entry['read']} elements were left out, in rows {first}..{end - 1}",
            "the server computes with the rest", "store the tensor that belongs there",
        )  # fmt: skip


_WIDE = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
"""Formats that hold numbers as they are, with the bits of their significands."""


def _casts(trace: Mapping[str, Any]) -> Iterator[Finding]:
    for key, entry in trace["keys"].items():
        for cast in entry["casts"]:
            parameter = trace["parameters"].get(cast["parameter"], {})
            before, after = (name.removeprefix("torch.") for name in (entry["dtype"], cast["to"]))
            if before == after or (before in _WIDE and after in _WIDE and not cast["changed"]):
                continue
            # attention.py makes the parameter in the default dtype, so F32 is always rounded to BF16: as good as exact.
            if parameter.get("exempt") == KV_SCALE and before in _WIDE and after in _WIDE:
                continue
            changed = f"{cast['changed']} of {cast['elements']} values changed" if cast["changed"] else "no value changed"
            benign = (before in _WIDE and after in _WIDE) or (before[:6] == after[:6] == "float8" and not cast["changed"])
            yield (warning if benign else error)(
                "server.lossy-cast", key, f"{after}, the dtype of the server's parameter" if cast["parameter"] else after,
                f"{before}; {changed}", _cast_effect(before, after),
                "store the dtype that the config declares, or mend the config's list of what stays unquantized",
            )  # fmt: skip


def _cast_effect(before: str, after: str) -> str:
    if before in _WIDE and after in _WIDE:
        return "the values are rounded"
    if before in _WIDE:
        return "the numbers are cast to codes as they are, with no scale of their own"
    if before.startswith("float8") and after.startswith("float8"):
        return "the codes are cast to another format's"
    return "the codes are taken for numbers"


# --- what it answered ---


def _answers(generated: Mapping[str, Any]) -> Iterator[Finding]:
    yield from judge([[*place.values()] for place in generated["logprobs"]], generated["vocabulary"])
    images = generated["images"]
    broken = False
    for image in images:
        found = [*judge([[*place.values()] for place in image["logprobs"]], generated["vocabulary"], "log-probabilities after an image")]
        yield from found if not broken else ()
        broken = broken or bool(found)
    if len(images) == 2 and not broken and _same(images[0]["logprobs"][0], images[1]["logprobs"][0]):
        yield error(
            "server.blind", "log-probabilities after an image", "other ones after another image", f"the same within {_SAME:g}",
            "it answers without seeing", "the vision tower or its projection is dead: look for zeros, NaN and missing tensors there",
        )  # fmt: skip


def _same(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    return first.keys() == second.keys() and all(abs(first[token] - second[token]) < _SAME for token in first)


def judge(logprobs: list[list[float]], vocabulary: int, subject: str = "log-probabilities") -> Iterator[Finding]:
    """Findings on log-probabilities, [position][entry]: the likeliest tokens' at each position, and the given one's."""
    entries = [value for place in logprobs for value in place]
    wrong = sum(math.isnan(value) or value == math.inf for value in entries)
    if wrong or not entries:
        yield error(
            "server.not-finite", subject, "finite numbers", f"{wrong} of {len(entries)} are NaN or infinite",
            "a scale is missing, zero or NaN, or a weight holds NaN", "mend the other findings",
        )  # fmt: skip
        return
    flat = -math.log(vocabulary)
    best = [max(place) for place in logprobs]
    if all(abs(value - flat) < _FLAT for value in best):
        yield error(
            "server.flat", subject, "some tokens likelier than others",
            f"{best[0]:.4f} at every position, which is -ln({vocabulary})",
            "the logits are constant", "lm_head or the last norm is broken, most often an lm_head that the exclude list misses",
        )  # fmt: skip
