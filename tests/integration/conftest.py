"""A place for real servers, and an address for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from demo_app.deploys import Deploys, free_port

_HTTP2 = "uvicorn.protocols.http.zttp_h2_impl"
_HAS_HTTP2 = importlib.util.find_spec("zttp") and importlib.util.find_spec(_HTTP2)
# Earlier versions of uvicorn speak no HTTP/2, and its parser needs Python 3.11.
collect_ignore = [] if _HAS_HTTP2 else ["test_http2.py"]


@pytest.fixture
def place() -> Iterator[Deploys]:
    """Starts instances that meet in a directory of their own; all are ended behind the test."""
    with Deploys() as found:
        yield found


@pytest.fixture
def address() -> str:
    """A TCP address that nobody listens on."""
    return f"127.0.0.1:{free_port()}"
