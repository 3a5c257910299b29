"""The list of all codes that findings have. Write it again with `python -m ckptq.reports.catalog > docs/findings.md`."""

from __future__ import annotations

from ckptq.validators.codes import CATALOG

_HEAD = """\
# Codes of findings

Every finding of `ckptq validate` has one of these codes; they are stable. Where a rule rests on what the server does, the last
column says in which of its files and versions that was read. Made by `python -m ckptq.reports.catalog > docs/findings.md`.
"""


def markdown() -> str:
    """docs/findings.md: a table for each group of codes, in alphabetical order."""
    groups = sorted({code.partition(".")[0] for code in CATALOG})
    return "\n".join((_HEAD, *(_table(group) for group in groups)))


def _table(group: str) -> str:
    rows = [
        f"| `{name}` | {_cell(code.meaning)} | {_cell(code.source)} |"
        for name, code in sorted(CATALOG.items())
        if name.partition(".")[0] == group
    ]
    return "\n".join((f"## {group}\n", "| code | meaning | read in |", "|---|---|---|", *rows, ""))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
