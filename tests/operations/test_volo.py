"""Takeovers to and from a compiled Volo process: the program that VOLO_PEER names.

It is called as tests.support.volo, the model of it, and prints the same.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.processes import Processes, free_address, free_addresses
from tests.support.volo_takeovers import VoloTakeovers

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("no_leak")]
TIMES = int(os.environ.get("VOLO_TIMES", "5"))


class Real(VoloTakeovers):
    """The compiled one."""

    volo = (os.environ.get("VOLO_PEER", ""),)


@pytest.mark.parametrize("_time", range(TIMES))
@pytest.mark.parametrize("number", [1, 3])
def test_volo_to_ours(processes: Processes, meet: Path, number: int, _time: int) -> None:
    """Ours takes every listener over from Volo itself."""
    Real().volo_to_ours(processes, meet, free_addresses(number))


@pytest.mark.parametrize("_time", range(TIMES))
def test_ours_to_volo(processes: Processes, meet: Path, _time: int) -> None:
    """Volo itself takes over from ours."""
    Real().ours_to_volo(processes, meet, free_address())


@pytest.mark.parametrize("_time", range(TIMES))
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_there_and_back(processes: Processes, meet: Path, kind: str, _time: int) -> None:
    """Volo to ours to Volo to ours."""
    Real().there_and_back(
        processes, meet, free_address() if kind == "tcp" else str(meet / "app.sock")
    )
