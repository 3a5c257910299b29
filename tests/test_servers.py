"""The table of server versions: what a flag names, and what the installed server says of its own row."""

from __future__ import annotations

import dataclasses

import pytest

from ckptq.errors import UnsupportedError
from ckptq.validators.servers import DEFAULT, SERVERS, find_server


@pytest.mark.parametrize("text", ["0.32", "v0.32", "0.32.0", "0.32.1", " 0.32 ", "0.32.0rc1"])
def test_a_version_is_found_by_its_first_two_numbers(text: str) -> None:
    assert find_server(text) is SERVERS["0.32"]


@pytest.mark.parametrize("text", ["", "0", "0.3", "0.320", "1.32", "latest", "0.31", "0.2"])
def test_a_version_that_was_never_read_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedError, match=r"0\.26, 0\.30, 0\.32, 0\.33") as caught:
        find_server(text)
    assert caught.value.hint


def test_the_default_is_a_version_that_was_tried() -> None:
    assert DEFAULT is SERVERS["0.32"]
    assert [s.version for s in SERVERS.values() if s.verified == "loaded"] == ["0.30", "0.32"]
    assert all(name == server.version for name, server in SERVERS.items())


def test_versions_are_in_order_and_no_row_repeats_another() -> None:
    assert list(SERVERS) == sorted(SERVERS, key=lambda v: tuple(map(int, v.split("."))))
    flags = [f.name for f in dataclasses.fields(DEFAULT) if f.name not in ("version", "verified")]
    for name in flags:
        assert len({getattr(s, name) for s in SERVERS.values()}) > 1, f"{name} differs nowhere: it needs no flag"
    for server in SERVERS.values():
        assert server.algos_alone <= server.algos
        assert server.algos_mixed < server.algos, "a mixed checkpoint is mixed of what there is"
