"""The picture of the restarts: a strip for each server, requests over time, failures marked.

    python benchmarks/picture.py FILE.json docs/restarts.svg    (FILE: from restarts.py --save)

Plain SVG. Requests are binned into cells of a few pixels, and those of a column that touch become
one stroke, so that a hundred thousand requests stay small.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

OLD, NEW = 0, 1

BEFORE, AFTER = 1.0, 8.0  # seconds shown around the restart
FASTEST, SLOWEST = 0.001, 4.0  # seconds shown
WIDTH, LEFT, RIGHT = 960, 276, 14
TOP, STRIP, GAP, BOTTOM = 92, 58, 14, 54
LANE = 8  # for the failures, at the top of a strip
CELL = 2
FEW = 3  # requests in a cell; with fewer it is drawn lighter
GRID = ((0.001, "1 ms"), (0.01, "10 ms"), (0.1, "100 ms"), (1.0, "1 s"))
PLOT = WIDTH - LEFT - RIGHT

COLOURS = {  # on light, on dark
    "paper": ("#ffffff", "#0d1117"),
    "field": ("#f6f8fa", "#151b23"),
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#9198a1"),
    "rule": ("#d8dee4", "#30363d"),
    "old": ("#868e97", "#8b949e"),
    "new": ("#0969da", "#4493f8"),
    "bad": ("#d1242f", "#ff5c55"),
    "good": ("#1a7f37", "#3fb950"),
}
LIGHT, DARK = 0, 1
STYLE = """
text { font-family: -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
       font-size: 12px }
.title { font-size: 17px; font-weight: 600 } .name { font-size: 13px; font-weight: 600 }
.tick { font-size: 9px } .bad, .good { font-weight: 600 } .line { stroke-width: 1 }
.now { stroke-width: 1; stroke-dasharray: 3 3 }
path { stroke-width: 2; fill: none } .few { opacity: .5 }
"""


def _colours(theme: int) -> str:
    """The rules of one theme; no variables, which not every renderer knows."""
    fills = {"text": "ink", ".soft, .tick": "soft", "text.bad": "bad", "text.good": "good"}
    fills |= {".paper": "paper", ".field": "field"}
    strokes = {".line": "rule", ".now": "ink", ".old": "old", ".new": "new", "path.bad": "bad"}
    rules = [f"{which} {{ fill: {COLOURS[name][theme]} }}" for which, name in fills.items()]
    rules += [f"{which} {{ stroke: {COLOURS[name][theme]} }}" for which, name in strokes.items()]
    return "\n".join(rules)


@dataclass
class Strip:
    """One server around one restart; times are seconds from the restart."""

    name: str
    way: str
    failed: int
    """In this restart."""
    failed_in_all: int
    restarts: int
    """How many were made; this is one of them."""
    answers: list[tuple[float, float, int]] = field(default_factory=list)
    """When, how long it took, and who answered: OLD or NEW."""
    failures: list[float] = field(default_factory=list)


def draw(strips: Sequence[Strip], subtitle: str) -> str:
    """The SVG."""
    height = TOP + len(strips) * (STRIP + GAP) + BOTTOM
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="Requests during a restart">'
    )
    parts = [
        start,
        f"<style>{STYLE}{_colours(LIGHT)}",
        # An image follows the reader's colour scheme, not the page's: so it has its own paper.
        f"@media (prefers-color-scheme: dark) {{\n{_colours(DARK)}\n}}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}" rx="8"/>',
        _text(16, 30, "What clients see of a restart", "title"),
        _text(16, 50, subtitle, "soft"),
        *_legend(),
    ]
    for number, one in enumerate(strips):
        parts += _strip(one, TOP + number * (STRIP + GAP))
    parts += _axis(TOP + len(strips) * (STRIP + GAP) - GAP)
    return "\n".join([*parts, "</svg>", ""])


def _legend() -> Iterable[str]:
    x: float = LEFT
    entries = (
        ("old", "answered by the old code"),
        ("new", "answered by the new code"),
        ("bad", "failed"),
    )
    for kind, text in entries:
        yield f'<path class="{kind}" style="stroke-width:10" d="M{x} 73h14"/>'
        yield _text(x + 20, 77, text)
        x += 34 + 6.6 * len(text)
    yield _text(16, 77, "latency, log scale", "soft")


def _axis(y: int) -> Iterable[str]:
    for second in range(-math.floor(BEFORE), math.floor(AFTER) + 1):
        x = _x(second)
        yield f'<line class="line" x1="{x}" x2="{x}" y1="{y}" y2="{y + 5}"/>'
        yield _text(x, y + 19, str(second), "soft", anchor="middle")
    yield _text(
        LEFT + PLOT / 2, y + 38, "seconds since the restart was ordered", "soft", anchor="middle"
    )


def _strip(one: Strip, y: int) -> Iterable[str]:
    yield _text(16, y + 18, one.name, "name")
    yield _text(16, y + 34, one.way, "soft")
    verdict = "none failed"
    if one.failed_in_all:
        verdict = f"{one.failed:,} failed; {one.failed_in_all:,} in {one.restarts} restarts"
    yield _text(16, y + 50, verdict, "bad" if one.failed_in_all else "good")
    yield f'<rect class="field" x="{LEFT}" y="{y}" width="{PLOT}" height="{STRIP}"/>'
    for seconds, label in GRID:
        line = _y(seconds, y)
        yield f'<line class="line" x1="{LEFT}" x2="{LEFT + PLOT}" y1="{line}" y2="{line}"/>'
        yield _text(LEFT - 5, line + 3, label, "tick", anchor="end")
    yield from _cells(one, y)
    lane = Counter(_column(at) for at in one.failures if -BEFORE <= at < AFTER)
    if lane:
        marks = "".join(f"M{LEFT + CELL * at + 1} {y}v{LANE}" for at in sorted(lane))
        yield f'<path class="bad" d="{marks}"/>'
    if later := one.failed - lane.total():
        yield _text(LEFT + PLOT - 4, y + 12, f"{later:,} more later", "tick bad", anchor="end")
    yield f'<line class="now" x1="{_x(0)}" x2="{_x(0)}" y1="{y}" y2="{y + STRIP}"/>'


def _cells(one: Strip, y: int) -> Iterable[str]:
    counts: dict[tuple[int, int], Counter[int]] = {}
    for at, took, who in one.answers:
        if -BEFORE <= at < AFTER:
            row = round(_y(took, y) - y) // CELL
            counts.setdefault((_column(at), row), Counter())[who] += 1
    for who, kind in ((OLD, "old"), (NEW, "new")):
        for few in (True, False):
            cells = sorted(
                cell
                for cell, seen in counts.items()
                if seen.most_common(1)[0][0] == who and (seen.total() < FEW) == few
            )
            if cells:
                classes = f"{kind} few" if few else kind
                yield f'<path class="{classes}" d="{_strokes(cells, y)}"/>'


def _strokes(cells: Sequence[tuple[int, int]], y: int) -> str:
    """Cells of a column that touch, as one stroke; in order, each from where the last one began."""
    runs: list[list[int]] = []
    for column, row in cells:
        if runs and runs[-1][0] == column and runs[-1][1] + runs[-1][2] == row:
            runs[-1][2] += 1
        else:
            runs.append([column, row, 1])
    parts, last = [], (0, 0)
    for column, row, length in runs:
        x, top = LEFT + column * CELL + 1, y + row * CELL
        parts.append(f"m{x - last[0]} {top - last[1]}v{length * CELL}")
        last = (x, top + length * CELL)
    return "".join(parts).replace(" -", "-")


def _column(at: float) -> int:
    return int((at + BEFORE) / (BEFORE + AFTER) * PLOT / CELL)


def _x(seconds: float) -> float:
    return round(LEFT + (seconds + BEFORE) / (BEFORE + AFTER) * PLOT, 1)


def _y(seconds: float, top: int) -> float:
    span = math.log(SLOWEST / FASTEST)
    share = math.log(min(max(seconds, FASTEST), SLOWEST) / FASTEST) / span
    return round(top + STRIP - CELL - share * (STRIP - LANE - 2 * CELL), 1)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    classes = f' class="{kind}"' if kind else ""
    where = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{round(x, 1)}" y="{round(y, 1)}"{classes}{where}>{escape(text)}</text>'


def save(strips: Sequence[Strip], subtitle: str, path: Path) -> None:
    """For another look at it later."""
    value = {"subtitle": subtitle, "strips": [asdict(one) for one in strips]}
    path.write_text(json.dumps(value))


def main() -> None:
    """The command."""
    source, target = map(Path, sys.argv[1:3])
    value = json.loads(source.read_text())
    strips = [Strip(**one) for one in value["strips"]]
    target.write_text(draw(strips, value["subtitle"]))


if __name__ == "__main__":
    main()
