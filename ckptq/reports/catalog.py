"""The list of all codes that findings have. `make docs` writes docs/findings.md with it.

How severe a code's findings are is read off the calls of `error` and `warning` in the validators' source.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ckptq import validators
from ckptq.validators.codes import catalog

_HEAD = """\
# Codes of findings

Every finding of `ckptq validate` has one of these codes. They are stable: a code keeps its meaning, and new ones are added.

An error means wrong answers or no load; a warning means that it works, but is fragile or lossy. Where both are named, the finding
says which it is. Where a rule rests on what the server does, the last column says in which of its files and versions it was read;
the other rules are ckptq's own.

Made by `make docs` from the validators' source.
"""


def markdown() -> str:
    """docs/findings.md: a table for each group of codes, in alphabetical order."""
    groups = sorted({code.partition(".")[0] for code in catalog()})
    found = severities()
    return "\n".join((_HEAD, *(_table(group, found) for group in groups)))


def severities() -> dict[str, str]:
    """{code: "error", "warning" or "error or warning"}; of codes that no call names outright: both."""
    found: dict[str, set[str]] = {}
    for path in sorted(Path(validators.__file__).parent.rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
            for code in _codes(call.args[0]) if call.args else ():
                found.setdefault(code, set()).update(_functions(call.func))
    return {code: " or ".join(sorted(found.get(code) or {"error", "warning"})) for code in catalog()}


def _codes(node: ast.expr) -> Iterator[str]:
    """The codes that an argument may stand for: a string, either of two, or all that an f-string with the group's name fits."""
    match node:
        case ast.Constant(value=str(code)) if code in catalog():
            yield code
        case ast.IfExp():
            yield from (*_codes(node.body), *_codes(node.orelse))
        case ast.JoinedStr(values=[ast.Constant(value=str(group)), *_]) if "." in group:
            pattern = "".join(re.escape(str(v.value)) if isinstance(v, ast.Constant) else ".+" for v in node.values)
            yield from (code for code in catalog() if re.fullmatch(pattern, code))


def _functions(node: ast.expr) -> set[str]:
    """{"error"}, {"warning"} or, where a variable or an expression stands for the function, both."""
    return {node.id} if isinstance(node, ast.Name) and node.id in ("error", "warning") else {"error", "warning"}


def _table(group: str, found: dict[str, str]) -> str:
    rows = [
        f"| `{name}` | {found[name]} | {_cell(code.meaning)} | {_cell(code.source)} |"
        for name, code in sorted(catalog().items())
        if name.partition(".")[0] == group
    ]
    return "\n".join((f"## {group}\n", "| code | severity | meaning | read in |", "|---|---|---|---|", *rows, ""))


def _cell(text: str) -> str:
    return re.sub(r"([|*<>])", r"\\\1", text)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
