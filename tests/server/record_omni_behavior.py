"""Records what the real vLLM-Omni makes of every mutant of tests/omni_mutants.py, for tests/test_omni_agreement.py.

    python tests/server/record_omni_behavior.py [--check] [PATTERN ...]

Writes tests/data/behavior-vllm-omni-0.30.json: all mutants, or those whose names match a pattern. `--check` writes nothing, and
exits with 1 where a label is another than the one written. The rules of labels are in `label`; none knows what a mutant was meant
to be.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import torch  # noqa: E402 - found by the line above
from omni_mutants import BASES, Mutant, make_base, mutants  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from server import omni  # noqa: E402

from ckptq.checkpoint import read_header  # noqa: E402

TABLE = TESTS / "data/behavior-vllm-omni-0.30.json"
CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8")
SHOWN = 3

Row = dict[str, Any]


def label(found: omni.Loaded, good: omni.Loaded, folder: Path, sound: Path) -> Row:
    """What was seen of the mutant in `folder`, against the good export in `sound`.

    refused   vLLM-Omni raised, or a linear's post-processing did that does not with the good export
    wrong     a parameter was left as it was made; a weight that is not stored as codes became codes, or codes became values without
              their scale; a scale has another value and its codes times it are not the good export's; a linear is not there
    degraded  codes were decoded while they were loaded, so that memory is as without them; or shards of one linear have different
              scales, so that it encodes them again
    harmless  none of that
    """
    if found.stage != "done":
        return {"label": "refused", "error": anywhere(str(found.error), folder)[:300]}
    lines = [*_processed(found, good)]
    if lines:
        return {"label": "refused", "process": lines[:SHOWN]}
    scaled = dict(_scales(found, good))
    evidence = {
        "unwritten": [f"{at}/{n}" for at, c in found.components.items() for n in c.unwritten if n not in _of(good, at).unwritten],
        "missing": sorted({*found.missing} - {*good.missing}),
        "cast": sorted({*_cast(found, dtypes(folder))} - {*_cast(good, dtypes(sound))}),
        "scales": [name for name, sources in scaled.items() if not sources or not _equal(sources, folder, sound)],
        "gone": [f"{at}/{n}" for at, c in good.components.items() for n in c.linears if n not in _of(found, at).linears],
    }
    told = {what: names[:SHOWN] for what, names in evidence.items() if names}
    if told:
        return {"label": "wrong", **told}
    decoded = [f"{at}/{n}" for at, c in found.components.items() for n in c.dequantized if n not in _of(good, at).dequantized]
    apart = [name for name, sources in scaled.items() if len(sources) > 1]
    if decoded or apart:
        return {"label": "degraded", "dequantized": decoded[:SHOWN], "encoded again": apart[:SHOWN]}
    return {"label": "harmless"}


def anywhere(error: str, folder: Path) -> str:
    """The error as it reads on any machine: without the place where packages lie, and that of the mutant."""
    return re.sub(r"/\S*/(?=vllm(_omni)?/)", "", error).replace(str(folder), "MUTANT")


def _of(loaded: omni.Loaded, folder: str) -> omni.Component:
    return loaded.components.get(folder, omni.Component("", False, (), {}, (), (), {}))


def _processed(found: omni.Loaded, good: omni.Loaded) -> Iterator[str]:
    for at, component in found.components.items():
        for name, linear in component.linears.items():
            other = _of(good, at).linears.get(name)
            if linear.process and not (other and other.process):
                yield f"{at}/{name}: {linear.process[:200]}"


def _cast(found: omni.Loaded, stored: Mapping[str, str]) -> Iterator[str]:
    """Parameters that a tensor of another kind went into."""
    for at, component in found.components.items():
        quantized = {f"{name}.weight" for name in component.quantized}
        for name, sources in component.parameters.items():
            for source in sources:
                tensor = source.removeprefix(f"{at}/")
                coded = stored.get(f"{at}/{tensor}", "BF16") in CODES
                if not name.endswith("scale") and tensor not in component.dequantized and coded != (name in quantized):
                    yield f"{at}/{tensor} as {'values' if coded else 'codes'}"


def _scales(found: omni.Loaded, good: omni.Loaded) -> Iterator[tuple[str, list[str]]]:
    """(scale that differs, the stored weights that its linear is made of; none where it is built by another method, so that what is
    stored says nothing of it).
    """
    for at, component in found.components.items():
        for name, linear in component.quantized.items():
            other = _of(good, at).linears.get(name)
            for leaf, values in linear.scales.items() if other is not None and other.quantized else ():
                before = other.scales.get(leaf)
                if values is not None and before is not None and list(values) != list(before):
                    made = component.parameters[f"{name}.weight"] if linear.method == other.method else ()
                    yield f"{at}/{name}.{leaf}", [f"{at}/{n.removeprefix(f'{at}/')}" for n in made]


def _equal(names: Iterable[str], folder: Path, sound: Path) -> bool:
    """Whether these weights say the same in both, as far as FP8 rounds."""
    one, two = _tensors(folder), _tensors(sound)
    for name in names:
        a, b = (t[name].float() * t[f"{name}_scale"].float() for t in (one, two))
        if not torch.allclose(a, b, rtol=0.08, atol=float(b.abs().max()) * 2**-9):
            return False
    return True


def _tensors(folder: Path) -> dict[str, Any]:
    """{component/tensor: tensor}."""
    found = {}
    for file in folder.rglob("*.safetensors"):
        found |= {f"{file.parent.relative_to(folder).as_posix()}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


def dtypes(folder: Path) -> dict[str, str]:
    """{component/tensor: dtype}."""
    found = {}
    for file in folder.rglob("*.safetensors"):
        at = file.parent.relative_to(folder).as_posix()
        found |= {f"{'' if at == '.' else at}/{name}": entry["dtype"] for name, entry in read_header(file).items()}
    return found


def record(chosen: Sequence[Mutant]) -> dict[str, Row]:
    """{name: {label, evidence}}, one base after the other."""
    with tempfile.TemporaryDirectory(prefix="ckptq-omni-") as name:
        work = Path(name)
        bases = dict.fromkeys(m.base for m in chosen)
        rows = [_record(base, [m for m in chosen if m.base == base], work) for base in bases]
    found = {name: row for some in rows for name, row in some.items()}
    return {name: found[name] for name in sorted(found)}


def _record(base: str, chosen: Iterable[Mutant], work: Path) -> dict[str, Row]:
    settings, rows = BASES[base].settings, dict[str, Row]()
    good = make_base(base, work / "sources", work / base)
    (sound,) = omni.load([good], **settings).values()
    for mutant in chosen:
        folder = work / "mutant"
        shutil.copytree(good, folder)
        try:
            mutant.edit(folder)
        except Exception as problem:
            problem.add_note(f"in the mutant {mutant.name}")
            raise
        (loaded,) = omni.load([folder], **settings).values()
        rows[mutant.name] = label(loaded, sound, folder, good)
        shutil.rmtree(folder)
    return rows


def read_table() -> dict[str, Row]:
    """As recorded; nothing where nothing was."""
    rows: dict[str, Row] = json.loads(TABLE.read_text(encoding="utf-8"))["mutants"] if TABLE.exists() else {}
    return rows


def write_table(rows: Mapping[str, Row]) -> None:
    """One mutant a line, so that a change of one is one line's."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
    TABLE.write_text(f'{{"vllm-omni": "0.30.0", "mutants": {{\n{lines}\n}}}}\n', encoding="utf-8")


def changed(before: Mapping[str, Row], after: Mapping[str, Row]) -> list[str]:
    """What to say of labels that are not as they were."""
    return [
        f"{name}: {row['label']}, recorded as {before.get(name, {}).get('label', 'nothing')}: {row}"
        for name, row in after.items()
        if name not in before or before[name]["label"] != row["label"]
    ]


def main(arguments: Sequence[str]) -> int:
    check = "--check" in arguments
    patterns = [argument for argument in arguments if not argument.startswith("--")]
    every, before = list(mutants()), read_table()
    rows = record([m for m in every if not patterns or any(fnmatchcase(m.name, pattern) for pattern in patterns)])
    news = changed(before, rows)
    print(*news, sep="\n")
    print(f"{len(rows)} mutants:", dict(Counter(row["label"] for row in rows.values())))
    if not check:
        names = {m.name for m in every}
        write_table({name: row for name, row in {**before, **rows}.items() if name in names})
    return 1 if check and news else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
