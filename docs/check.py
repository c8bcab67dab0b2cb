"""Hold the docs to the code: the tables of options and statuses, and that links lead somewhere.

    python docs/check.py [--write]

--write puts the tables of the code into the docs.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from hotrestart_plugins import errors
from hotrestart_plugins.settings import DEFAULTS, OPTIONS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)?(?:#([^)\s]+))?\)")


def options() -> str:
    """The table of options."""
    lines = ["| option | environment | gunicorn config | default | |", "| --- " * 5 + "|"]
    for option in OPTIONS:
        default = DEFAULTS[option.field]
        shown = f"{default:g}" if isinstance(default, float) else ""
        metavar = f" {option.metavar}" if option.metavar else ""
        flag = f"`{option.flag}{metavar}`" if option.uvicorn else ""
        config = f"`{option.config}`" if option.gunicorn else ""
        lines.append(f"| {flag} | `{option.env}` | {config} | {shown} | {option.help} |")
    return "\n".join(lines)


def statuses() -> str:
    """The table of exit statuses."""
    meaning = {
        0: "replaced or overtaken by a later instance, or stopped",
        2: "a command line that cannot be understood, such as an option that is not there",
        errors.NotReady.status: "the app failed to start, or was not ready in time; fix the app",
        errors.TakeoverError.status: "takeover failed; read the last log line, then retry",
        errors.ConfigurationError.status: "a setting, an address or a directory that cannot work",
    }
    rows = [f"| {status} | {text} |" for status, text in meaning.items()]
    return "\n".join(["| status | |", "| --- | --- |", *rows])


TABLES = {"options": options, "statuses": statuses}


def filled(text: str) -> str:
    """The page with each table as the code has it."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}{table()}\n{end}{rest.partition(end)[2]}"
    return text


def anchors(text: str) -> set[str]:
    """What links into the page may name."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def main() -> int:
    """The command."""
    wrong = []
    for page in PAGES:
        text = page.read_text()
        if text != filled(text):
            if "--write" in sys.argv:
                page.write_text(filled(text))
            else:
                wrong.append(f"{page.name}: a table differs from the code: docs/check.py --write")
        for path, anchor in _LINK.findall(text):
            target = (page.parent / path) if path else page
            if not target.exists():
                wrong.append(f"{page.name}: {path} is not there")
            elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
                wrong.append(f"{page.name}: {path}#{anchor} is not there")
    sys.stdout.write("\n".join([*wrong, f"{len(PAGES)} pages, {len(wrong)} wrong"]) + "\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
