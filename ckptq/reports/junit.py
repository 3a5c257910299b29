"""JUnit XML, as CI servers read it: one suite, a case for each group of checks. No schema is binding; this is what all accept."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from ckptq import __version__
from ckptq.console import amount
from ckptq.reports import Outcome, fails, groups, rules, safe_text, verdict
from ckptq.validators import Finding


def text(outcome: Outcome) -> str:
    """ASCII, all else as character references; what XML can't hold at all stands as `\\x1b`, `\\ud800`."""
    suites = Element("testsuites", name="ckptq validate")
    suite = SubElement(suites, "testsuite", name=safe_text(outcome.checkpoint))
    properties = SubElement(suite, "properties")
    facts = {
        "ckptq": __version__,
        "rules": rules(outcome) if outcome.refusal is None else "none",
        "strict": str(outcome.asked.strict).lower(),
        "checked": ", ".join(f"{c.what}: {amount(c.amount, c.unit)}" for c in outcome.checked) or "nothing",
        "verdict": verdict(outcome.findings, outcome.asked.strict) if outcome.refusal is None else "none: it can't be read",
    }
    for name, value in facts.items():
        SubElement(properties, "property", name=name, value=safe_text(value))
    _read(_case(suite, "read"), outcome)
    if outcome.refusal is None:
        for group in dict.fromkeys((*groups(), *(f.code.partition(".")[0] for f in outcome.findings))):
            _group(_case(suite, group), group, outcome)
    for element in (suites, suite):
        element.set("tests", str(len(suite.findall("testcase"))))
        for kind in ("failure", "error", "skipped"):
            element.set(kind if kind == "skipped" else kind + "s", str(len(suite.findall(f"testcase/{kind}"))))
        element.set("time", f"{sum(c.seconds for c in outcome.checked):.3f}")
    indent(suites)
    xml: bytes = tostring(suites, encoding="us-ascii", xml_declaration=True)
    return xml.decode().replace("##[", "#&#35;[") + "\n"


def _case(suite: Element, name: str) -> Element:
    return SubElement(suite, "testcase", classname="ckptq.validate", name=name)


def _read(case: Element, outcome: Outcome) -> None:
    refusal = outcome.refusal
    if refusal is not None:
        said = SubElement(case, "error", type=refusal.kind, message=safe_text(refusal.message))
        said.text = safe_text("\n".join(filter(None, (refusal.message, refusal.hint))), lines=True)


def _group(case: Element, group: str, outcome: Outcome) -> None:
    """One failure a case: some CI servers show no second one."""
    found = [f for f in outcome.findings if f.code.partition(".")[0] == group]
    counted = [f for f in found if fails(f, outcome.asked.strict)]
    seconds = next((c.seconds for c in outcome.checked if c.what == group), None)
    if seconds is not None:
        case.set("time", f"{seconds:.3f}")
    why = outcome.skipped.get(group)
    if why is not None and not found:
        SubElement(case, "skipped", message=why)
    if counted:
        message = f"{verdict(counted, strict=True)}: {', '.join(dict.fromkeys(f.code for f in counted))}"
        failure = SubElement(case, "failure", type=counted[0].code, message=safe_text(message.removeprefix("FAILED: ")))
        failure.text = _told(counted)
    if rest := [f for f in found if f not in counted]:
        SubElement(case, "system-out").text = _told(rest)


def _told(findings: Sequence[Finding]) -> str:
    return "\n\n".join(
        "\n".join(
            (
                f"{f.severity}: {f.code} ({f.count} place{'s' * (f.count != 1)})",
                *(
                    f"{label}: {safe_text(said, lines=label == 'found')}"
                    for label, said in (
                        ("where", f.subject),
                        ("expected", f.expected),
                        ("found", f.found),
                        ("effect", f.effect),
                        ("mend", f.mend),
                    )
                ),
            )
        )
        for f in findings
    )
