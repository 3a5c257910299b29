"""Entries of the lists that compressed-tensors and Quark write: a whole name, or `re:` and a regular expression.

vLLM 0.32.0 model_executor/layers/quantization/utils/config_utils.py is_equal_or_regex_match and find_matching_patterns.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ckptq.errors import SourceError
from ckptq.validators import Code, Finding, error
from ckptq.validators.servers import Server

CODES = {
    "config.pattern": Code(
        "an entry that is no valid regular expression",
        "vLLM 0.32.0 model_executor/layers/quantization/utils/config_utils.py is_equal_or_regex_match",
    )
}
SECONDS = 2.0
"""For all matches of one expression, but for those that take no time: one from a checkpoint may be made to run forever."""
_NO_TIME = 0.01
_CALLS = re.compile(r"\(\?(?:R|&|P>|[+-]?\d)")
"""A part of an expression that matches another part, or the whole, anew: nothing bounds its memory."""


def check(entries: Iterable[str], file: str) -> Iterator[Finding]:
    """A finding for each expression that does not compile."""
    for entry in entries:
        if entry.startswith("re:") and not _compiles(entry[3:]):
            yield error(
                "config.pattern", f"{file}: {entry}", "a regular expression after `re:`", "one that does not compile",
                "vLLM raises", "mend it; a module and all inside it is `re:.*name.*`",
            )  # fmt: skip


Matches = Callable[[str, str], bool]
"""(value, entry) -> whether the entry holds the value."""


def matcher() -> Matches:
    """`re:` matches from the start of the name; all else is compared whole. Made once for a list: each expression has SECONDS.

    It raises SourceError for an expression that takes longer than that in all, or memory without bound.
    """
    expression = functools.cache(_expression)

    def matches(value: str, entry: str) -> bool:
        if not entry.startswith("re:"):
            return value == entry
        if _CALLS.search(entry):
            raise SourceError(f"config.json: the expression {entry!r} calls itself, which is not followed")
        try:
            return expression(entry[3:])(value)
        except (TimeoutError, MemoryError):
            raise SourceError(f"config.json: the expression {entry!r} takes too long to match {value}") from None

    return matches


def ignored(
    name: str, entries: Sequence[str], matches: Matches, packed: Mapping[str, Sequence[str]], server: Server, *, fused: bool
) -> bool | None:
    """Whether the list holds this linear; None where it holds some shards of a fused one, at which vLLM raises.

    compressed_tensors/utils.py and quark/utils.py should_ignore_layer. `fused`: whether the plain name of a fused linear counts
    in versions that try no expression on it.
    """
    last = name.rpartition(".")[2]
    direct = [e for e in entries if server.fused_regex or last not in packed or (fused and not e.startswith("re:"))]
    if any(matches(name, entry) for entry in direct):
        return True
    if last not in packed:
        return False
    shards = {any(matches(name.replace(last, shard), entry) for entry in entries) for shard in packed[last]}
    return None if len(shards) > 1 else True in shards


def _compiles(pattern: str) -> bool:
    import regex

    try:
        _expression(pattern)
    except (regex.error, RecursionError, OverflowError):
        return False
    return True


def _expression(pattern: str) -> Callable[[str], bool]:
    import regex  # vLLM's own choice, and it has a time limit

    match, left = regex.compile(pattern).match, SECONDS

    def matches(value: str) -> bool:
        nonlocal left
        start = time.monotonic()
        found = match(value, timeout=max(left, _NO_TIME)) is not None
        spent = time.monotonic() - start
        left -= spent if spent > _NO_TIME else 0
        return found

    return matches
