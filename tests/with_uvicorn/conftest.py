"""What these tests need of the Python and the uvicorn that run them."""

from __future__ import annotations

import importlib.util

_HTTP2 = "uvicorn.protocols.http.zttp_h2_impl"
_HAS_HTTP2 = importlib.util.find_spec("zttp") and importlib.util.find_spec(_HTTP2)
# Earlier versions of uvicorn speak no HTTP/2, and its parser needs Python 3.11.
collect_ignore = [] if _HAS_HTTP2 else ["test_http2.py"]
