"""A place for real servers, and an address for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from demo_app.deploys import Deploys, free_port


@pytest.fixture
def place() -> Iterator[Deploys]:
    """Starts instances that meet in a directory of their own; all are ended behind the test."""
    with Deploys() as found:
        yield found


@pytest.fixture
def address() -> str:
    """A TCP address that nobody listens on."""
    return f"127.0.0.1:{free_port()}"
