"""Fuzzes `ckptq validate` with broken files of good exports: each ends in findings or in a refusal, whatever is in it.

    python tests/fuzz_validate.py 1200          # seconds; atheris (libFuzzer), guided by coverage
    python tests/fuzz_validate.py out/crash-1   # once more with an input that was kept

An input is a line `BASE TARGET MODE`, and the content of the file that TARGET names. Three mutations of four keep it JSON: keys
and values are changed, swapped, renamed; the rest are of bytes. An input is kept, and the run goes on, where it ends in anything
but findings or a CkptqError, in text that a terminal would act on, or after more than SLOW seconds of a processor.
tests/test_hostile.py runs the same `attack` on inputs that hypothesis makes.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.bases import BASES, folder

INDEX = "model.safetensors.index.json"
FILES = ("config.json", "hf_quant_config.json", INDEX, "ckptq.json")
TARGETS = (*FILES, "header", "start", "tensors")
"""What is replaced: a file; the JSON of a header; the first bytes of a weight file; all tensors, as {name: [dtype, sizes...]}."""
SEEDS = (
    "vl-modelopt-fp8kv-ckptq", "vl-modelopt-fp8kv-ckptq-onefile", "vl-modelopt-fp8kv-ckptq-nested", "moe-modelopt-fp8kv-peer",
    "vl-modelopt-pbwo-peer", "vl-ct-fp8kv-peer", "vl-ct-block-peer", "moe-ct-dynamic-peer", "vl-fp8-static-relabeled",
    "moe-fp8-block-relabeled", "vl-modelopt-mixedkv-ckptq", "vl-ct-mixedkv-ckptq", "vl-modelopt-nvfp4kv-ckptq", "vl-ct-mxfp4-ckptq",
)  # fmt: skip
OWN = SEEDS[:2]
"""Those that ckptq alone is needed to build."""
SLOW = 10.0
_MOST_BYTES = 4 << 20

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 128, 4096, 1 << 31, 1 << 63, 10**39, -0.0, 0.5, 1e308, "", "x", "fp8", "FP8", "modelopt",
    "compressed-tensors", "quark", "..", "../x.safetensors", "/etc/passwd", "re:.*", "re:[", "re:(a|a)*$", "*", "model.layers.1*",
    "\x1b[31m\x07", "two\nlines", "\u202e", "::error ::x", [], {}, [[]], [{}], [None], [0, 0], [128, 128], [-1, "x"], {"": None},
    {"x": {"y": []}}, ["Linear"], ["model.visual*", 7], [1e9, 1], "128x128", "F8_E4M3", "F4", "BF16", "I64", "F9",
)  # fmt: skip
KEYS = (
    "", "quantization_config", "text_config", "vision_config", "quant_method", "quant_algo", "ignore", "exclude_modules",
    "kv_cache_scheme", "kv_cache_quant_algo", "config_groups", "weight_block_size", "architectures", "num_hidden_layers",
    "num_experts", "head_dim", "mlp_only_layers", "decoder_sparse_step", "tie_word_embeddings", "weight_map", "__metadata__",
    "producer", "quantization", "compression_config", "export", "global_quant_config", "a\nb\x1b[0m",
)  # fmt: skip
SUFFIXES = (
    ".weight_scale", ".input_scale", ".weight_scale_inv", ".k_scale", ".v_scale", ".kv_scale", ".attn.k_scale", ".output_scale",
    ".bias", ".weight", ".g_idx", "\x1b[2J", ".0", ".99999999999999999999.x", "_scale",
)  # fmt: skip

SECTIONS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head", "re:.*visual.*"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "symmetric": True,
                            "dynamic": False, "group_size": None},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "group", "dynamic": True, "group_size": 128},
                "format": None,
            }
        },
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
    },
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "ignored_layers": ["lm_head"],
            "modules_to_not_convert": None},
    "quark": {
        "quant_method": "quark",
        "global_quant_config": {
            "weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "observer_cls": "x", "ch_axis": None},
            "input_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False},
            "output_tensors": None,
        },
        "exclude": ["re:visual.*", "lm_head"],
        "layer_quant_config": {"*.k_proj": {"output_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}},
        "layer_type_quant_config": {},
        "export": {"kv_cache_group": ["*.k_proj", "*.v_proj"], "pack_method": "order"},
        "kv_cache_dtype": "fp8",
        "quant_mode": "eager_mode",
    },
    "modelopt, nested": {
        "producer": {"name": "modelopt", "version": "0.47"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["visual*", "lm_head"]},
    },
}  # fmt: skip
"""quantization_config of methods that OWN has not."""


# --- inputs ---


@dataclass(frozen=True, slots=True)
class Attack:
    """One file of a base, replaced. `mode` counts through what validate is asked: see `ask`."""

    base: str
    target: str
    mode: int
    content: bytes

    def raw(self) -> bytes:
        return f"{self.base} {self.target} {self.mode}\n".encode() + self.content


def read_attack(raw: bytes, bases: Iterable[str] = SEEDS) -> Attack | None:
    line, _, content = raw.partition(b"\n")
    words = line.decode("ascii", "replace").split(" ")
    if len(words) == 3 and words[0] in bases and words[1] in TARGETS and words[2].isdecimal() and len(words[2]) < 5:
        return Attack(words[0], words[1], int(words[2]), content)
    return None


def good(base: str, target: str) -> bytes | None:
    """The content that a target has in the base itself, or None where it has no such file."""
    at = folder(base)
    if target in FILES:
        return (at / target).read_bytes() if (at / target).exists() else None
    weights = first_weights(at)
    length = int.from_bytes(weights[:8], "little")
    if target == "start":
        return weights[: 8 + length]
    header = weights[8 : 8 + length]
    if target == "header":
        return header
    entries = {n: e for n, e in json.loads(header).items() if n != "__metadata__"}
    return json.dumps({name: [entry["dtype"], *entry["shape"]] for name, entry in entries.items()}).encode()


def first_weights(at: Path) -> bytes:
    return min(at.glob("*.safetensors")).read_bytes()


@functools.cache
def seeds(bases: tuple[str, ...]) -> tuple[Attack, ...]:
    """Every target of every base as it is."""
    return tuple(_seeds(bases))


def _seeds(bases: tuple[str, ...]) -> Iterator[Attack]:
    for number, base in enumerate(bases):
        for target in TARGETS:
            content = good(base, target)
            if content is not None:
                yield Attack(base, target, number, content)
    own = json.loads(good(OWN[1], "config.json") or b"")
    for section in SECTIONS.values():
        yield Attack(OWN[1], "config.json", 0, json.dumps({**own, "quantization_config": section}).encode())


# --- mutations that keep a file JSON ---


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Up to four changes somewhere in the value, which is found by random steps down. What is no JSON stays."""
    try:
        root = [json.loads(content)]
        for _ in range(rng.randint(1, 4)):
            _change(root, rng)
        return json.dumps(root[0]).encode()
    except (ValueError, RecursionError):  # Python reads no number of 4,300 digits, and writes none
        return content


def scrambled(content: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes: other bits, cut out, doubled, put in."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, width = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 8, 64, 1000))
        piece = data[at : at + width]
        new = (
            b"",
            piece + piece,
            bytes(b ^ 1 << rng.randrange(8) for b in piece[:1]) + piece[1:],
            rng.choice(
                (b"\xff" * 8, b"\0", b"NaN", b"1e999", b"-0", b"9" * 5000, b"[" * 5000, b'{"a":' * 500, b'"\\ud800"', b'"\\u0000"')
            ),
            json.dumps(rng.choice(VALUES)).encode(),
        )
        data[at : at + width] = rng.choice(new)
    return bytes(data)


def _change(root: list[Any], rng: random.Random) -> None:
    at: Any = root
    key: Any = 0
    while isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.8:
        at = at[key]
        key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
    kind = rng.randrange(7)
    if kind == 0 and at is not root:
        del at[key]
    elif kind == 1 and isinstance(at, dict):
        at[str(key) + rng.choice(SUFFIXES)] = copy.deepcopy(at[key])
    elif kind == 2 and isinstance(at, dict):
        value = at.pop(key)
        at[rng.choice((*KEYS, str(key).rpartition(".")[0] + rng.choice(SUFFIXES)))] = value
    elif kind == 3 and isinstance(at, dict):
        at[rng.choice(KEYS)] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 4:
        other = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        at[key], at[other] = at[other], at[key]
    elif kind == 5 and isinstance(at[key], list):
        at[key] = copy.deepcopy([*at[key], *at[key], rng.choice(VALUES)])
    elif kind == 5 and isinstance(at[key], int):
        at[key] = rng.choice((at[key] + 1, at[key] - 1, -at[key], at[key] * 2, at[key] << 40, str(at[key]), at[key] // 2))
    else:
        at[key] = copy.deepcopy(rng.choice(VALUES))


# --- what is run ---


class Room:
    """A copy of each base in one temporary folder, for as long as the context lasts."""

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="ckptq-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self._weights: dict[str, bytes] = {}

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._home)

    @contextmanager
    def attacked(self, attack: Attack) -> Iterator[Path]:
        """The folder of the base with the one file replaced."""
        at = self._home / attack.base
        if not at.exists():
            shutil.copytree(folder(attack.base), at)
            self._weights[attack.base] = first_weights(at)
        weights = min(at.glob("*.safetensors"))
        path = at / attack.target if attack.target in FILES else weights
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(self._replaced(attack))
        try:
            yield at
        finally:
            if before is None:
                path.unlink()
            else:
                path.write_bytes(before)

    def _replaced(self, attack: Attack) -> bytes:
        if attack.target in FILES:
            return attack.content
        whole = self._weights[attack.base]
        end = 8 + int.from_bytes(whole[:8], "little")
        if attack.target == "start":
            return attack.content + whole[end:]
        if attack.target == "header":
            return len(attack.content).to_bytes(8, "little") + attack.content + whole[end:]
        return laid_out(attack.content, whole[end:])


def laid_out(content: bytes, data: bytes) -> bytes:
    """A weight file with right offsets of the tensors {name: [dtype, sizes...]}; entries that make none are left out."""
    from ckptq.safetensors_header import DTYPE_BITS

    try:
        wanted = json.loads(content)
    except (ValueError, RecursionError):
        wanted = {}
    header: dict[str, Any] = {}
    end = 0
    for name, entry in wanted.items() if isinstance(wanted, dict) else ():
        dtype, *shape = entry if isinstance(entry, list) and entry else [None]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS or any(type(n) is not int or not 0 <= n < 1 << 20 for n in shape):
            continue
        bits = DTYPE_BITS[dtype]
        for n in shape:
            bits *= n
        if bits % 8 == 0 and end + bits // 8 <= _MOST_BYTES and len(shape) < 60 and name != "__metadata__":
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]}
            end += bits // 8
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + (data * (end // max(len(data), 1) + 1))[:end]


def ask(attack: Attack, at: Path) -> Any:
    """What validate says of the folder, as an Outcome. The mode chooses values, ranks, version and a source to compare with."""
    from ckptq.errors import CkptqError
    from ckptq.reports import Asked, Outcome, refused
    from ckptq.validate import validate_folder
    from ckptq.validators.servers import SERVERS

    servers = list(SERVERS.values())
    tp, ep = (1, 1, 2, 3, 64)[attack.mode // 2 % 5], attack.mode % 7 == 1
    source = BASES[attack.base].source if attack.mode % 4 == 3 and attack.base in BASES else None
    asked = Asked(
        str(source) if source else None, attack.mode % 2 == 1, server=servers[-1 - attack.mode % len(servers)], tp=tp, ep=ep
    )
    try:
        findings = validate_folder(at, source=source, values=asked.values, server=asked.server, tp=tp, ep=ep)
    except CkptqError as problem:
        return refused("out", asked, problem)
    return Outcome("out", asked, tuple(findings))


def run(attack: Attack, room: Room) -> str:
    """Runs one attack. Returns how it ended; raises whatever is none of the ways in which it may end."""
    from ckptq import reports

    with room.attacked(attack) as at, warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's would reach the user
        outcome = ask(attack, at)
    assert outcome.exit_code in (0, 1, 2), outcome.refusal
    for format in ("json", "junit", "github"):
        harmless(reports.written(format, outcome))
    if outcome.refusal is None:
        human(outcome)
        return "findings" if outcome.findings else "clean"
    harmless(reports.safe_text(f"{outcome.refusal.message}\n{outcome.refusal.hint}", lines=True))
    return str(outcome.refusal.kind)


def human(outcome: Any) -> None:
    import contextlib
    import io

    from ckptq.console import Console
    from ckptq.reports.human import show

    with contextlib.redirect_stdout(io.StringIO()) as said:
        show(Console(), outcome)
    harmless(said.getvalue())


def harmless(text: str) -> None:
    """Nothing in it that a terminal acts on."""
    bad = next((c for c in text if c != "\n" and not c.isprintable()), None)
    assert bad is None, f"{bad!r} is printed"
    assert len(text) < 1 << 22, f"{len(text)} characters are printed"


# --- the fuzzer ---


@dataclass(slots=True)
class Tally:
    """Inputs by their end, and the first input of each crash, told apart by the line that raised."""

    out: Path
    ends: Counter[str]
    crashes: dict[str, Path]

    def run(self, attack: Attack, room: Room) -> None:
        start = time.process_time()
        try:
            end = run(attack, room)
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}ckptq{os.sep}" in f.filename]
            at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
            self._keep(f"{type(error).__name__} at {at}", attack, "".join(traceback.format_exception(error)))
            end = "crash"
        took = time.process_time() - start
        if took > SLOW:
            self._keep(f"slow: {attack.target}", attack, f"{took:.1f} s\n")
        self.ends[end] += 1

    def _keep(self, what: str, attack: Attack, text: str) -> None:
        if what in self.crashes:
            return
        self.crashes[what] = path = self.out / f"crash-{hashlib.sha256(attack.raw()).hexdigest()[:12]}"
        path.write_bytes(attack.raw())
        path.with_suffix(".txt").write_text(f"{what}\n{attack.base} {attack.target} {attack.mode}\n{text}")
        print(f"kept {path}: {what}", file=sys.stderr, flush=True)


def changed(raw: bytes, limit: int, seed: int) -> bytes:
    """libFuzzer's custom mutator: most mutations keep a file JSON; the first line changes now and then."""
    rng = random.Random(seed)
    attack = read_attack(raw)
    if attack is None or rng.random() < 0.1:
        attack = rng.choice(seeds(SEEDS))
    mode = rng.randrange(140) if rng.random() < 0.3 else attack.mode
    content = attack.content
    if rng.random() < 0.25:
        content = scrambled(content, rng)
    elif attack.target == "start":
        raw_header = mutated(content[8:], rng)
        content = (len(raw_header).to_bytes(8, "little") if rng.random() < 0.8 else content[:8]) + raw_header
    else:
        content = mutated(content, rng)
    return Attack(attack.base, attack.target, mode, content).raw()[:limit]


def fuzz(seconds: int, out: Path) -> None:
    """Runs until the time is over; ends the process with 1 where an input was kept."""
    import atheris

    with atheris.instrument_imports(include=["ckptq"], enable_loader_override=False):
        from ckptq.validators import codes, passthrough, values  # noqa: F401  (with every other validator)
    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    tally = Tally(out, Counter(), {})
    with Room() as room:
        for attack in seeds(SEEDS):
            (corpus / hashlib.sha256(attack.raw()).hexdigest()[:16]).write_bytes(attack.raw())
            tally.run(attack, room)
        print(f"{tally.ends.total()} seeds: {dict(tally.ends)}", file=sys.stderr, flush=True)
        start = time.monotonic()

        def one(raw: bytes) -> None:
            attack = read_attack(raw)
            if time.monotonic() - start > seconds:
                _end(tally, time.monotonic() - start, room)
            if attack is not None:
                tally.run(attack, room)

        arguments = [
            sys.argv[0],
            f"-max_len={1 << 17}",
            "-timeout=600",
            "-rss_limit_mb=3000",
            f"-artifact_prefix={out}/",
            str(corpus),
        ]
        atheris.Setup(arguments, one, custom_mutator=changed)
        atheris.Fuzz()


def _end(tally: Tally, took: float, room: Room) -> None:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{tally.ends.total()} executions in {took:.0f} s, {peak} MB at most: {dict(tally.ends)}", file=sys.stderr)
    for what, path in tally.crashes.items():
        print(f"{path}: {what}", file=sys.stderr)
    room.__exit__()
    sys.stderr.flush()
    os._exit(bool(tally.crashes))  # libFuzzer has no other end from inside


def main(arguments: Sequence[str]) -> None:
    what = arguments[0]
    if what.isdecimal():
        fuzz(int(what), Path(arguments[1] if len(arguments) > 1 else "out/fuzz"))
        return
    attack = read_attack(Path(what).read_bytes())
    assert attack is not None, f"{what}: no input of this script"
    with Room() as room:
        print(run(attack, room))


if __name__ == "__main__":
    main(sys.argv[1:])
