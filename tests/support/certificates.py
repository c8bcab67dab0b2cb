"""A certificate for 127.0.0.1, by an authority of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import trustme


class Files(NamedTuple):
    """Where they are."""

    key: Path
    chain: Path
    ca: Path


def issue(directory: Path) -> Files:
    """Make them in this directory."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    files = Files(directory / "key.pem", directory / "chain.pem", directory / "ca.pem")
    certificate.private_key_pem.write_to_path(files.key)
    certificate.cert_chain_pems[0].write_to_path(files.chain)
    authority.cert_pem.write_to_path(files.ca)
    return files
