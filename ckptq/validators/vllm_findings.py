"""What the real vLLM made of a checkpoint, as findings: from the trace of vllm_child.py, and of its death where there is none.

vLLM checks none of it for a quantized checkpoint (0.32.0 model_executor/model_loader/default_loader.py load_weights: whether all
parameters were loaded is asked for unquantized ones alone, and by whole parameters).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from ckptq.validators import Code, Finding, error, vllm_answers, vllm_casts, warning
from ckptq.validators.servers import Server, minor
from ckptq.validators.vllm_parts import KV_SCALE
from ckptq.validators.vllm_stand_ins import AS_GOOD

_LOADER = "vLLM 0.32.0 model_executor/"
CODES = {
    "server.alone": Code("ckptq knows no rules for this checkpoint: the real vLLM alone was asked"),
    "server.version": Code("the vLLM that loaded it is not of the version whose rules were applied"),
    "server.failed": Code("vLLM stopped with an error"),
    "server.timeout": Code("vLLM did not end within the time limit"),
    "server.ignored-key": Code(
        "vLLM's loader never read a stored tensor", _LOADER + "models/utils.py AutoWeightsLoader._load_module"
    ),
    "server.unwritten": Code(
        "nothing wrote a parameter of vLLM's, or a part of it",
        _LOADER + "model_loader/default_loader.py DefaultModelLoader.load_weights",
    ),
    "server.truncated": Code("vLLM's loader left a part of a stored tensor out", _LOADER + "parameter.py _ColumnvLLMParameter"),
    "server.no-kernel": Code("this machine's vLLM can load the format but has no kernel of its own to compute with it"),
}

_LINES = 12
"""Lines of the server's stderr that a finding shows."""

_LOADED = ("process", "engine", "generate", "done")
_DOING = {
    "config": "reading the config", "create": "building the model", "load": "loading the weights",
    "process": "processing the loaded weights", "engine": "starting the engine", "generate": "generating",
}  # fmt: skip
_OF_GATE = ("w13_weight_scale_2", "w13_weight_global_scale")
"""Of NVFP4 experts: modelopt.py ModelOptNvFp4FusedMoE and compressed_tensors_moe_w4a4_nvfp4.py take gate's for gate and up."""
_FIRST_MEND = "mend the other findings first; without any, the fault may lie with this vLLM, its settings or too little memory"


def timed_out(name: str, timeout: float, said: str) -> Finding:
    """`said`: what the process wrote, as far as it is kept."""
    return error(
        "server.timeout", name, "vLLM loads the checkpoint", f"not within {timeout:g} s; it said last:\n{_last(said)}",
        "nobody knows whether it can be served",
        "look at what it waits for; a slow disk or a first compilation may need a longer limit",
    )  # fmt: skip


def died(name: str, code: int, said: str) -> Finding:
    """`code`: the process's return code, negative for a signal."""
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    found = f"{ended}; it said last:\n{_last(said)}"
    return error("server.failed", name, "vLLM loads the checkpoint", found, "it can't be served", _FIRST_MEND)


def alone(name: str, why: str) -> Finding:
    """Where the checkpoint is of a kind that ckptq has no rules for, and vLLM is to load it all the same."""
    return warning(
        "server.alone", name, "an architecture, a method and settings that ckptq knows", why,
        "what vLLM read and wrote is looked at; names, values and configs are not", "compare its answers with the source's",
    )  # fmt: skip


def other_version(loaded: str, rules: Server) -> list[Finding]:
    """Where `loaded` is of another version than the rules; empty where it never said its version."""
    if not loaded or minor(loaded) == rules.version:
        return []
    return [
        warning(
            "server.version", "--vllm", f"vLLM {minor(loaded)}, which loaded it", f"vLLM {rules.version}",
            "the two halves of this report are about two versions: what one serves right the other may not",
            "serve it with a version of the rules' and name its interpreter by --vllm-python, or leave --vllm out",
        )
    ]  # fmt: skip


def _last(said: str) -> str:
    return "\n".join([line for line in said.splitlines() if line.strip()][-_LINES:])


def findings(
    trace: Mapping[str, Any], name: str, stored: Sequence[str], passed_over: Container[str] = frozenset()
) -> Iterator[Finding]:
    """`name` of the checkpoint; `stored`: names of its tensors, as its headers have them; `passed_over`: those nobody reads."""
    if trace["error"]:
        yield _stopped(trace, name)
    if trace["stage"] in _LOADED:
        names = _Names(trace)
        yield from _ignored(trace, stored, passed_over)
        yield from _unwritten(trace, names)
        yield from _kv_scales(trace, names)
        yield from _truncated(trace)
        yield from vllm_casts.check(trace)
    if trace["generated"]:
        if lacking := _lacking(trace):
            yield _not_the_servers(trace, name, lacking)
        yield from vllm_answers.check(trace["generated"])


def _stopped(trace: Mapping[str, Any], name: str) -> Finding:
    problem, stage = trace["error"], trace["stage"]
    message = f": {_last(problem['message'])}" if problem["message"].strip() else ""
    found = f"{problem['type']} while {_DOING[stage]}{message}"
    lacking = _lacking(trace)
    if stage in ("engine", "generate") and lacking:
        return warning(
            "server.no-kernel", name, "vLLM generates", found,
            f"loaded and looked at, but vLLM on this machine ({trace['platform']}) has no kernel for it: {', '.join(lacking)}",
            "generate on the machine that will serve it",
        )  # fmt: skip
    return error(
        "server.failed", name, "vLLM loads the checkpoint" if stage != "generate" else "vLLM generates",
        f"{found}\nat {problem['where']}", "it can't be served",
        _FIRST_MEND,
    )  # fmt: skip


def _lacking(trace: Mapping[str, Any]) -> list[str]:
    """Kernels that vLLM has for other devices, of which something else took the place."""
    return [kernel for kernel in trace["stand_ins"] if kernel not in AS_GOOD]


def _not_the_servers(trace: Mapping[str, Any], name: str, lacking: Sequence[str]) -> Finding:
    return warning(
        "server.no-kernel", name, "answers by the server's own kernels",
        f"vLLM on this machine ({trace['platform']}) has none for it: {', '.join(lacking)}; ckptq stood in for them",
        "the answers come from dequantized weights, with activations as they are or quantized in an emulation: "
        "good for finding what is broken, and not the server's numbers",
        "generate on the machine that will serve it",
    )  # fmt: skip


class _Names:
    """The checkpoint's name of a parameter, learned from the keys that were loaded: they differ in front of the layer's number.

    Where none of the kind was, the server's own list of prefixes is read backwards.
    """

    def __init__(self, trace: Mapping[str, Any]) -> None:
        self.fronts: dict[str, str] = {}
        # The longest first; of those that mean the same the one that the checkpoint's names have.
        used = {old for old in trace["prefixes"] if any(key.startswith(old) for key in trace["keys"])}
        self.prefixes: list[tuple[str, str]] = sorted(
            ((new, old) for old, new in trace["prefixes"].items()), key=lambda pair: (-len(pair[0]), pair[1] not in used)
        )
        for key, entry in trace["keys"].items():
            for parameter in entry["parameters"]:
                self.fronts.setdefault(_front(parameter), _front(key))

    def of(self, parameter: str, part: str) -> str:
        """`part` takes the place of the fused linear's name; an expert's comes behind `experts`."""
        front = _front(parameter)
        known = front in self.fronts
        name = self.fronts[front] + parameter[len(front) :] if known else self._mapped(parameter)
        owner, _, leaf = name.rpartition(".")
        if not part:
            return name
        if "." in part:
            return f"{owner.removesuffix('.routed_experts')}.{part}.{re.sub('^w13_|^w2_', '', leaf)}"
        return f"{owner.rpartition('.')[0]}.{part}.{leaf}"

    def _mapped(self, parameter: str) -> str:
        for new, old in self.prefixes:
            if parameter.startswith(new):
                return old + parameter.removeprefix(new)
        return parameter


def _front(name: str) -> str:
    """What stands before the first number, or before the last dot."""
    numbered = re.match(r"(.*?)\.\d+\.", name)
    return numbered[1] if numbered else name.rpartition(".")[0]


def _ignored(trace: Mapping[str, Any], stored: Sequence[str], passed_over: Container[str]) -> Iterator[Finding]:
    cache = any(p.get("cache", "").startswith("fp8") for p in trace["parameters"].values())
    for key in dict.fromkeys([*trace["keys"], *stored]):
        entry = trace["keys"].get(key)
        if entry is not None and (entry["read"] or not entry["elements"]):
            unused = [p for p in entry["parameters"] if not trace["parameters"][p].get("cache", "fp8").startswith("fp8")]
            if unused and key.endswith(("k_scale", "v_scale", "kv_scale")):
                yield warning(
                    "server.ignored-key", key, "an FP8 KV cache, which it is for", f"a KV cache of dtype {trace['kv_cache_dtype']}",
                    "the scale is loaded and not used", "declare the FP8 KV cache in config.json, or leave the scales out",
                )  # fmt: skip
            continue
        if key in passed_over:
            continue
        judged = _judge_ignored(key, cache, tied=not any(p.endswith("lm_head.weight") for p in trace["parameters"]))
        if judged is not None:
            severity, effect = judged
            yield severity(
                "server.ignored-key", key, "a tensor that vLLM loads", "never read" if entry else "in no file that vLLM reads",
                effect, "name it as the server does, or leave it out",
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


def _unwritten(trace: Mapping[str, Any], names: _Names) -> Iterator[Finding]:
    for name, parameter in trace["parameters"].items():
        if parameter["exempt"]:
            continue
        leaf = name.rpartition(".")[2]
        for missing in parameter["missing"]:
            whole = missing["elements"] == missing["of"]
            first, end = missing["rows"]
            found = (
                "nothing"
                if whole
                else f"{missing['elements']} of {missing['of']} elements, in rows {first}..{end - 1}, got nothing"
            )
            if missing["part"] and parameter["written"]:
                found += f", while other parts of the server's {'.'.join(name.split('.')[-2:])} got theirs"
            # Of a fused linear the largest is taken, and they are most often equal: process_weights_after_loading. What nothing
            # wrote is the smallest number in FP8, and in NVFP4 memory as it was.
            fp4 = f"{name.rpartition('.')[0]}.weight_scale_2" in trace["parameters"]
            rest = leaf == "input_scale" and parameter["written"] > 0 and not fp4
            first = leaf in _OF_GATE and _gate_of(missing["part"]) not in ("", *(other["part"] for other in parameter["missing"]))
            effect = "the largest of the others is taken" if rest else "gate's is taken" if first else _left(leaf)
            yield (warning if rest or first else error)(
                "server.unwritten", names.of(name, missing["part"]), "a value for every element of the server's parameter", found,
                effect, _store(leaf),
            )  # fmt: skip


def _gate_of(part: str) -> str:
    """`3.up_proj` -> `3.gate_proj`, "" for parts that are no expert's up."""
    expert, _, name = part.rpartition(".")
    gate = {"up_proj": "gate_proj", "w3": "w1"}.get(name)
    return f"{expert}.{gate}" if gate else ""


def _store(leaf: str) -> str:
    if "scale" in leaf:
        return "store the scale under this name; a linear that isn't quantized belongs in the config's exclude list"
    return "store the tensor under this name, with the full shape"


def _left(leaf: str) -> str:
    """fp8_utils.py create_fp8_scale_parameter, and torch.empty for the rest."""
    if "scale" in leaf:
        return "the scale stays what it was made with, -3.4e38 or 1.0 or memory as it was: wrong numbers or NaN"
    return "it stays memory as it was: arbitrary numbers or NaN"


def _kv_scales(trace: Mapping[str, Any], names: _Names) -> Iterator[Finding]:
    """Of an FP8 KV cache: all missing is what ModelOpt writes without calibration (1.0 is used), some is a fault (kv_cache.py)."""
    scales = {
        name: parameter["written"]
        for name, parameter in trace["parameters"].items()
        if parameter["exempt"] == KV_SCALE and name.endswith(("k_scale", "v_scale")) and parameter["cache"].startswith("fp8")
    }
    some = any(scales.values())
    for name, written in scales.items():
        if not written:
            key = re.sub(r"\.attn\.([kv])_scale$", r".\1_proj.\1_scale", names.of(name, ""))  # as ModelOpt names it
            yield (error if some else warning)(
                "server.unwritten", key, "a scale for the FP8 KV cache",
                "nothing, and others have one" if some else "nothing",
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
