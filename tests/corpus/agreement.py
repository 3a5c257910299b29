"""The validator against the real vLLM, over the whole corpus: prints where they agree, by class of fault.

    cd tests && python -m corpus.agreement [--vllm 0.32] [PATTERN ...]        # exits with 1 where they disagree

vLLM's side is what tests/server/record_behavior.py recorded, for each version that servers.py calls loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from ckptq.validators.servers import DEFAULT, Server, find_server
from corpus import derived
from corpus.mutants import Mutant, mutants

DATA = Path(__file__).parents[1] / "data"
LABELS = ("refused", "wrong", "degraded", "harmless")
UNJUDGED = "can't judge"
Said = Literal["error", "warning", "nothing", "can't judge"]
# A refusal to judge ends the command with 2 and says nothing about the server. These are meant; any other disagrees.
REFUSALS: Mapping[str, str] = {
    "SourceError: ": "a file that can't be read, or is not there: the server can't read it either",
    "UnsupportedError: config.json: no scope for architectures ": "an architecture that no scope describes",
    "UnsupportedError: *: routed experts that are stored together ": "all experts of a layer in one tensor, and quantized",
    "UnsupportedError: config.json: quantization_config.config_groups.group_0.targets: the class 'Conv2d' ": "a class of modules",
    "UnsupportedError: config.json: quantization_config.config_groups.*: weights of 4 bits": "other 4 bits than the server's",
    "UnsupportedError: config.json: quantization_config.config_groups.*, format pack-quantized ": "integers packed into words",
}
"""How messages begin, as a pattern -> what they are about. For mutants that the server refuses."""
SERVED_BY_LUCK: Mapping[str, str] = {
    "gemma3text/weight_scale missing/v of the layer that sees all": "the last shard's, whose value the others happen to share",
    "mistral/weight missing/gate and up are one": "as the server fuses them itself, which no file of the family is",
}
"""Mutants that the server serves right -> why the validator calls them faulty all the same."""
REFUSED_THOUGH_SERVED: Mapping[str, str] = {
    "vl-modelopt/pickled weights/in their place": "the server reads pickles, which the validator never does",
    "vl-modelopt/architecture/none": "the server guesses an architecture, where none is named",
}
"""Mutants that the server serves wrong -> why the validator need not judge them."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """vLLM's label of a mutant with its evidence, and what the validator said: its worst severity, and its findings' codes."""

    mutant: Mutant
    label: str
    evidence: Mapping[str, Any]
    said: Said
    findings: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Errors for what is refused or wrong, at least a warning for what is degraded, no error for what is harmless.

        Where the validator can't judge it agrees only with a refusal, for a reason in REFUSALS, or by name.
        """
        match self.label:
            case "refused" | "wrong":
                return self.said == "error" or self.excused
            case "degraded":
                return self.said in ("error", "warning")
            case _:
                return self.said in ("warning", "nothing") or self.excused

    @property
    def excused(self) -> bool:
        """Whether the validator is meant to say something else: it refused to judge, or is stricter, by name."""
        if self.label == "harmless":
            return self.said == "error" and self.mutant.name in SERVED_BY_LUCK
        if self.said != UNJUDGED or self.label not in ("refused", "wrong"):
            return False
        if self.label == "wrong":
            return self.mutant.name in REFUSED_THOUGH_SERVED
        return any(fnmatchcase(self.findings[0], f"{begins}*") for begins in REFUSALS)


def table_of(version: str) -> Path:
    """Where the behavior of a version, as `0.32`, is recorded."""
    return DATA / f"behavior-vllm-{version}.json"


def read_table(version: str = DEFAULT.version) -> dict[str, dict[str, Any]]:
    """{mutant's name: {label, evidence}}, as recorded; nothing where nothing was."""
    path = table_of(version)
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["mutants"] if path.exists() else {}
    return rows


def judge(chosen: Iterable[Mutant], work: Path, servers: Sequence[Server] = (DEFAULT,)) -> dict[str, list[Verdict]]:
    """{version: its verdicts}: validates each mutant for those versions of the server that it was recorded with.

    With what it needs to be seen: the source, or the record in ckptq.json, which is removed elsewhere. Mutants are made one after
    the other in `work`, of links to the good export's files: an edit puts a new file in the place of what it changes.
    """
    tables = {server.version: read_table(server.version) for server in servers}
    verdicts: dict[str, list[Verdict]] = {version: [] for version in tables}
    before: dict[Path, int] = {}
    for mutant in chosen:
        good = work / mutant.base
        if not good.exists():
            derived.make(mutant.base, good)
            before |= written(good)
        folder = work / "mutant"
        shutil.copytree(good, folder, copy_function=os.link)
        mutant.edit(folder)
        for server in servers:
            row = tables[server.version].get(mutant.name)
            if row is None:
                continue
            said, findings = validated(folder, mutant, server)
            evidence = {k: v for k, v in row.items() if k != "label"}
            verdicts[server.version].append(Verdict(mutant, row["label"], evidence, said, findings))
        shutil.rmtree(folder)
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert not changed, f"an edit wrote into the good export's own files: {changed}"
    return verdicts


def written(folder: Path) -> dict[Path, int]:
    """{file: when it was last written, in nanoseconds}."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def validated(folder: Path, mutant: Mutant, server: Server = DEFAULT) -> tuple[Said, tuple[str, ...]]:
    """(worst severity, findings), or that it can't judge and why: then the command ends with 2."""
    from ckptq.errors import CkptqError
    from ckptq.validate import validate_folder

    if mutant.needs != "record":
        (folder / "ckptq.json").unlink(missing_ok=True)
    try:
        source = derived.source(mutant.base) if mutant.needs == "source" else None
        found = validate_folder(folder, source=source, server=server)
    except CkptqError as problem:
        return UNJUDGED, (f"{type(problem).__name__}: {str(problem).replace(str(folder), 'FOLDER')[:160]}",)
    said: Said = "error" if any(f.severity == "error" for f in found) else "warning" if found else "nothing"
    return said, tuple(f"{f.severity} {f.code} {f.subject}" for f in found)


def table(verdicts: Sequence[Verdict]) -> str:
    """Lines of text: how many agree, by class of fault and label. What it can't judge is counted apart, and agrees in no cell."""
    cells = Counter((v.mutant.fault, v.label, v.agrees and not v.excused) for v in verdicts)
    unjudged = Counter(v.mutant.fault for v in verdicts if v.said == UNJUDGED)
    faults = list(dict.fromkeys(v.mutant.fault for v in verdicts))

    def row(name: str, count: Any) -> str:
        return f"{name:<44}" + "".join(f"{count(label):>14}" for label in (*LABELS, UNJUDGED))

    def agreed(names: Sequence[str], label: str) -> str:
        if label == UNJUDGED:
            return str(sum(unjudged[name] for name in names) or "-")
        yes, no = (sum(cells[name, label, agrees] for name in names) for agrees in (True, False))
        return f"{yes} of {yes + no}" if yes + no else "-"

    lines = [row("validator agrees with vLLM, where it is", lambda label: label)]
    lines += [row(fault, lambda label, fault=fault: agreed([fault], label)) for fault in faults]
    lines += [row(f"all: {len(faults)} classes, {len(verdicts)} mutants", lambda label: agreed(faults, label))]
    needs = Counter(v.mutant.needs for v in verdicts if v.label != "harmless")
    lines += [f"of those that do harm {needs['source']} need --source to be seen, {needs['record']} ckptq.json"]
    return "\n".join(lines)


def disagreements(verdicts: Iterable[Verdict]) -> list[str]:
    return [
        f"{v.mutant.name}: vLLM {v.label} {json.dumps(dict(v.evidence))[:500]}; validator says {v.said}: {list(v.findings)[:6]}"
        for v in verdicts
        if not v.agrees
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default=DEFAULT.version)
    parser.add_argument("patterns", nargs="*")
    asked = parser.parse_args()
    server = find_server(asked.vllm)
    recorded = read_table(server.version)
    chosen = [m for m in mutants() if m.name in recorded and any(fnmatchcase(m.name, p) for p in asked.patterns or "*")]
    with tempfile.TemporaryDirectory(prefix="ckptq-agreement-") as work:
        verdicts = judge(chosen, Path(work), [server])[server.version]
    print(table(verdicts))
    usual = read_table()
    same = sum(v.label == usual[v.mutant.name]["label"] for v in verdicts)
    print(f"vLLM {server.version} did as {DEFAULT.version} with {same} of {len(verdicts)}")
    print(*(bad := disagreements(verdicts)), sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
