"""The validator says of every mutant of the corpus what the real vLLM makes of it. The table of agreement is printed.

pytest tests/test_agreement.py -m "not server"          # without a server: vLLM's side is recorded in tests/data
pytest tests/test_agreement.py -m server                # records a part of it again
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from corpus import derived
from corpus.agreement import (
    REFUSALS,
    REFUSED_THOUGH_SERVED,
    SERVED_BY_LUCK,
    UNJUDGED,
    Verdict,
    disagreements,
    judge,
    read_table,
    table,
    validated,
)
from corpus.mutants import Mutant, mutants
from server import record_behavior

from ckptq.validators.servers import DEFAULT, SERVERS

EVERY = tuple(mutants())
LOADED = {s.version: s for s in SERVERS.values() if s.verified == "loaded"}
# What a near miss may add to its base's findings, and in which classes of fault: served all the same, and worth a word.
WORTH_A_WORD: Mapping[str, tuple[str, ...]] = {
    "files.no-index": ("*",),  # a tensor in a file of its own
    "files.stored-twice": ("stray safetensors without an index", "consolidated safetensors", "tensor in two shards"),
    "files.stray-safetensors": ("stray safetensors without an index",),
    "files.weight-copy": (
        "stray safetensors without an index",
        "shard without tensors",
        "pickled weights",
        "tower under another prefix",  # which leaves a shard without tensors
    ),
    "files.consolidated": ("consolidated safetensors",),
    "files.index-stale": ("index to a file that is not there", "shard without tensors"),
    "files.index-other": ("index to a file that is not there",),
    "files.index-lacks": ("index to a file that is not there",),
    "config.disagree": (
        "quant_algo of another format",
        "kv scheme",
        "every kv scale missing",
        "config.json is wrong where hf_quant_config.json is right",
        "quantized_layers",
    ),
    "config.hf-quant-config": (
        "no quantization settings",
        "another method's name",
        "hf_quant_config.json unreadable",
        "hf_quant_config.json alone",
    ),
    "config.section-missing": ("no quantization settings", "hf_quant_config.json alone"),
    "layout.weight-dtype": ("codes under another type", "packed codes under another type"),
    "layout.stray-scale": ("input_scale missing", "expert's input_scale missing"),
    "layout.scale-dtype": (
        "scales a row in another shape",
        "block scales in another shape",
        "scale of another type",
        "amax in place of a weight's scale",
        "amax in place of an activation's scale",
    ),
    "layout.unknown-tensor": ("bias missing", "scale zero", "expert under another name"),
    "layout.missing-scale": ("input_scale missing", "expert's scale of the whole tensor missing"),
    "layout.draft-not-excluded": ("tower not excluded",),  # a talker, which other servers build
    "layout.kv-shared": ("deprecated kv_scale",),
    "layout.kv-undeclared": ("kv scheme",),
    "passthrough.cast": ("norms as another family stores them",),
    "passthrough.config": ("window of another length",),
    "passthrough.weight-error": ("weight's scale of another size",),  # codes below 2^-6 were rounded twice
    "values.small-codes": ("weight's scale of another size",),
    "values.weight-scale-split": ("weight's scale of another size",),
    "values.input-scale-split": ("activation's scale of another size", "gate and up of other input scales"),
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Verdict]]:
    """{version: its verdicts}, of each version that is called loaded."""
    return judge(EVERY, tmp_path_factory.mktemp("mutants"), [*LOADED.values()])


@pytest.fixture
def verdicts(judged: Mapping[str, list[Verdict]]) -> list[Verdict]:
    return judged[DEFAULT.version]


@pytest.mark.parametrize("version", LOADED)
def test_the_validator_agrees_with_vllm(
    judged: Mapping[str, list[Verdict]], version: str, record_property: Callable[[str, object], None]
) -> None:
    """Errors for what vLLM refuses or serves wrong, at least a warning for what it serves worse, no error for the rest.

    Of each of these versions the whole corpus was recorded.
    """
    if version == DEFAULT.version:
        record_property("table", table(judged[version]))
    assert set(read_table(version)) == {m.name for m in EVERY}
    assert disagreements(judged[version]) == []


def test_what_it_can_not_judge_is_meant(verdicts: list[Verdict]) -> None:
    """Every reason on the list is one that the corpus has, so that none is left over."""
    reasons = {v.findings[0] for v in verdicts if v.said == UNJUDGED and v.label == "refused"}
    assert [begins for begins in REFUSALS if not any(fnmatchcase(reason, f"{begins}*") for reason in reasons)] == []
    wrong = {v.mutant.name for v in verdicts if v.said == UNJUDGED and v.label == "wrong"}
    assert wrong == set(REFUSED_THOUGH_SERVED)
    assert {v.label for v in verdicts if v.said == UNJUDGED} == {"refused", "wrong"}, "what is served well it can judge"


def test_what_is_served_by_luck_is_meant(judged: Mapping[str, list[Verdict]]) -> None:
    """Nothing is left over on that list either, and no version does otherwise."""
    for verdicts in judged.values():
        lucky = {v.mutant.name for v in verdicts if v.label == "harmless" and v.said == "error"}
        assert lucky == set(SERVED_BY_LUCK)


def test_near_misses_add_no_finding_but_those_worth_a_word(verdicts: list[Verdict], tmp_path: Path) -> None:
    near = [v for v in verdicts if v.mutant.near_miss]
    bases = {name: derived.make(name, tmp_path / name) for name in {v.mutant.base for v in near}}
    # The record goes first: validation without it removes it.
    asked = sorted({(v.mutant.base, v.mutant.needs) for v in near}, key=lambda pair: pair[1] != "record")
    own = {(base, needs): _codes(validated(bases[base], Mutant(base, "none", base, lambda _: None, needs=needs))[1])
           for base, needs in asked}  # fmt: skip
    added = [(v.mutant, code) for v in near for code in _codes(v.findings) - own[v.mutant.base, v.mutant.needs]]
    said = [(m.name, c) for m, c in added if not any(fnmatchcase(m.fault, fault) for fault in WORTH_A_WORD.get(c, ()))]
    assert said == []
    unused = [(c, fault) for c, faults in WORTH_A_WORD.items() for fault in faults
              if not any(c == code and fnmatchcase(m.fault, fault) for m, code in added)]  # fmt: skip
    assert unused == []


def _codes(findings: tuple[str, ...]) -> set[str]:
    return {finding.split()[1] for finding in findings}


def test_kv_scales_on_the_tower_are_named(verdicts: list[Verdict]) -> None:
    """visual.blocks.0.attn.k_proj.k_scale, while the exclude list holds `visual*`: ModelOpt's trap."""
    found = [v for v in verdicts if v.mutant.name.endswith("/kv scales on the vision tower/ModelOpt's trap")]
    assert {v.label for v in found} == {"refused"}
    assert all(any(finding.startswith("error layout.kv-on-tower visual.blocks.0.attn") for finding in v.findings) for v in found)


def test_absent_kv_scales_are_a_warning_and_an_error_where_they_were_calibrated(verdicts: list[Verdict]) -> None:
    absent = [v for v in verdicts if v.label == "degraded" and v.evidence.get("kv_absent")]
    assert {v.said for v in absent if v.mutant.needs != "record"} == {"warning"}, "with --strict an error"
    assert {v.said for v in absent if v.mutant.needs == "record"} == {"error"}


def test_the_corpus_is_as_large_as_it_should_be() -> None:
    labels = {name: row["label"] for name, row in read_table().items()}
    assert set(labels) == {m.name for m in EVERY}, "record what is new: tests/server/record_behavior.py"
    faults = {m.fault for m in EVERY if not m.near_miss and labels[m.name] != "harmless"}
    assert faults == {m.fault for m in EVERY}, "classes of fault that vLLM does not mind"
    assert len(faults) >= 40
    assert sum(labels[m.name] != "harmless" for m in EVERY) >= 200
    assert set(labels.values()) == {"refused", "wrong", "degraded", "harmless"}


def test_every_fault_has_a_near_miss_and_near_misses_are_harmless() -> None:
    labels = {name: row["label"] for name, row in read_table().items()}
    assert {m.fault for m in EVERY if m.near_miss} == {m.fault for m in EVERY}
    assert [m.name for m in EVERY if m.near_miss and labels[m.name] != "harmless"] == []


@pytest.mark.parametrize("name", derived.DERIVED)
@pytest.mark.parametrize("needs", [None, "source"])
def test_derived_exports_have_no_errors(name: str, needs: str | None, tmp_path: Path) -> None:
    """With the record of ckptq.json, too, where there is one. Those that they are derived from are in test_corpus_bases.py."""
    folder = derived.make(name, tmp_path / name)
    said, findings = validated(folder, Mutant(name, "none", name, lambda _: None, needs=needs or "record"))
    assert said in ("warning", "nothing"), findings


@pytest.mark.server
def test_vllm_does_what_was_recorded() -> None:
    """One mutant of each class of fault. For all of them, which takes minutes: `tests/server/record_behavior.py --check`."""
    sample = {mutant.fault: mutant for mutant in reversed(EVERY) if not mutant.near_miss}
    after = record_behavior.record(list(sample.values()))
    assert len(after) == len(sample)
    assert record_behavior.changed(read_table(), after) == []
