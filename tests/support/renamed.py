"""A copy of an installed package in which one name is another: as in a release that renamed it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

_SUFFIX = "_as_renamed"

COMMON = {
    "accept",
    "accepted",
    "asgi",
    "closed",
    "config",
    "create",
    "ioloop",
    "loop",
    "poller",
    "ppid",
    "protocol",
    "reader",
    "server",
    "servers",
    "sock",
    "transport",
}
"""Names that other things have, too: only where they are an attribute of one of `_OWNERS`."""

_OWNERS = (
    r"(?<=\bself\.)",
    r"(?<=\bworker\.)",
    r"(?<=\bconn\.)",
    r"(?<=\bwsgi\.)",
    r"(?<=\bws_protocol\.)",
    r"(?<=\b_websocket\.)",
    r"(?<=\bdef )",
    r"(?<=')(?=\w+'[,)])",  # in __slots__
)
_SOCKETS = (r"(?<=\bs\.)", r"(?<=\bsock\.)", r"(?<=\blistener\.)")


def renamed(owner: str, attribute: str, directory: Path) -> dict[str, str]:
    """Copy the package of `owner` to `directory`; the environment in which that one is used.

    The name is changed everywhere in the copy, which therefore works as before.
    """
    package = owner.partition(".")[0]
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, directory / package)
    pattern = rf"\b{attribute}\b"
    if attribute in COMMON:
        owners = (*_OWNERS, *(_SOCKETS if attribute == "sock" else ()))
        pattern = "|".join(f"{before}{attribute}\\b" for before in owners)
    changed = 0
    for path in (directory / package).rglob("*.py"):
        text, count = re.subn(pattern, attribute + _SUFFIX, path.read_text())
        if count:
            # What comes from another package has another name only here.
            theirs = rf"(?m)^(from (?!{package}\b|\.)\S+ import .*\b){attribute}{_SUFFIX}\b"
            text = re.sub(theirs, rf"\g<1>{attribute} as {attribute}{_SUFFIX}", text)
            path.write_text(text)
            changed += count
    assert changed, f"{package} has no {attribute}"
    return {"PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])}
