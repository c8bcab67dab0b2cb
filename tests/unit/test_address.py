"""What users write, and what stands on the wire."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotrestart_plugins.core import address as addresses
from hotrestart_plugins.core.address import parse
from hotrestart_plugins.core.bind import bind_fresh
from hotrestart_plugins.errors import AddressError

pytestmark = pytest.mark.usefixtures("no_leak")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("127.0.0.1:8000", "127.0.0.1:8000"),
        ("127.0.0.1", "127.0.0.1:8000"),
        ("0.0.0.0:80", "0.0.0.0:80"),
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("[::1]:8000", "[::1]:8000"),
        ("[::1]", "[::1]:8000"),
        ("[0:0:0:0:0:0:0:1]:1", "[::1]:1"),
        ("[::]:65535", "[::]:65535"),
        ("unix:/run/app.sock", "/run/app.sock"),
        ("unix:/run//x/../app.sock", "/run/app.sock"),
        ("unix:@app", "@app"),
    ],
)
def test_the_name_on_the_wire(written: str, name: str) -> None:
    """An address is named as Volo prints it, however it was written."""
    (found,) = parse(written)
    assert (found.name, str(found)) == (name, name)


def test_a_relative_path_starts_here(monkeypatch: pytest.MonkeyPatch, meet: Path) -> None:
    """A relative path is made whole at once, so that it means the same to the next instance."""
    monkeypatch.chdir(meet)
    assert parse("unix:app.sock")[0].name == f"{os.getcwd()}/app.sock"


def test_a_relative_path_is_told_without_links(monkeypatch: pytest.MonkeyPatch, meet: Path) -> None:
    """Two releases with a link each to the same directory mean the same socket."""
    (meet / "shared").mkdir()
    for release in ("1", "2"):
        (meet / release).mkdir()
        (meet / release / "run").symlink_to(meet / "shared")
        monkeypatch.chdir(meet / release)
        assert parse("unix:run/app.sock")[0].name == f"{meet.resolve()}/shared/app.sock"


def test_no_host_is_every_interface() -> None:
    """`:port` stands for every interface, each family by itself, IPv4 first."""
    assert next(found.name for found in parse(":8000")) == "0.0.0.0:8000"


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("", "is no address"),
        ("::1", "is no address"),
        ("[::1", "is no address"),
        ("http://x:1", "is no address"),
        ("127.0.0.1:", "is no address"),
        ("127.0.0.1:x", "is no address"),
        ("127.0.0.1:-1", "is no address"),
        ("8000", "is no address"),
        ("127.0.0.1:65536", "port 65536 is not between 0 and 65535"),
        ("127.0.0.1:" + "9" * 5000, "is no address"),
        ("[zz]:1", "is no address of this machine"),
        ("unix:", "is no Unix socket path"),
        ("unix:@", "is no Unix socket path"),
        ("unix:/a\0b", "NUL"),
        ("unix:/" + "x" * 107, "108 bytes long, a Unix socket's path may have 107"),
        ("unix:/" + "ä" * 60, "121 bytes long"),
    ],
)
def test_what_is_no_address(written: str, why: str) -> None:
    """What cannot be bound is refused when it is read, in one line."""
    with pytest.raises(AddressError) as error:
        parse(written)
    assert why in str(error.value)
    assert "\n" not in str(error.value)


@given(st.text(st.sampled_from("0123456789.:[]%/ax@ \n\0-")))
def test_arbitrary_text(text: str) -> None:
    """Whatever is written is addresses, or AddressError; nothing else happens."""
    try:
        found = parse("unix:" + text if "a" in text or "x" in text else text)
    except AddressError:
        return
    assert found


def test_the_longest_path(meet: Path) -> None:
    """A path of 107 bytes is bound; the kernel has room for no more."""
    path = str(meet / ("x" * (106 - len(str(meet)))))
    assert len(path) == 107
    bind_fresh(addresses.unix(path)).close()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("127.0.0.1:80", "127.0.0.1:80", True),
        ("127.0.0.1:80", "127.0.0.1:81", False),
        ("127.0.0.1:80", "127.0.0.2:80", False),
        ("127.0.0.1:80", "0.0.0.0:80", False),
        ("0.0.0.0:80", "127.0.0.1:80", False),
        ("127.0.0.1:80", "[::1]:80", False),
        ("0.0.0.0:80", "[::]:80", False),
        ("127.0.0.1:0", "127.0.0.1:80", True),
        ("127.0.0.1:0", "[::1]:80", False),
        ("127.0.0.1:80", "127.0.0.1:0", False),
        ("unix:/a", "unix:/a", True),
        ("unix:/a", "unix:/b", False),
        ("unix:/a", "unix:@a", False),
    ],
)
def test_is_of(one: str, other: str, *, same: bool) -> None:
    """A listener is what was asked for only if family, host and port are; port 0 takes any."""
    assert parse(one)[0].is_of(parse(other)[0]) is same
