"""The timeline of `orchard-infra history --html`: one file of HTML and SVG, without any script.

Everything that comes from a record is escaped, and the page forbids itself scripts and all loading:
a project's name is text that anybody may have written.
"""

from __future__ import annotations

import datetime
import html
import math
import time
from collections.abc import Iterator, Sequence

import attrs

from orchard_infra.cli import output
from orchard_infra.cli.history import Entry
from orchard_infra.system import processes
from orchard_infra.system.text import printable

_NARROWEST, _WIDEST = 860, 6000  # pixels of the drawing; a wider page stretches it
_BAR, _GAP, _LANE, _AXIS = 18, 4, 52, 34  # pixels: bar, gap between bars, lane, axis
_PAD = 10  # pixels above and below the bars of a lane
_THINNEST = 3  # pixels of a bar, at least
_LETTER = 6.6  # pixels of a letter in a bar
_MARGIN = 36  # pixels before the first bar and after the last
_TICK = 96  # pixels between two ticks, at least
_MOST_ROWS = 40  # rows of bars in one lane; what does not fit is drawn over others

# What the colours mean: the class, the words in the legend, and the endings that have it.
_KINDS = (
    ("wait", "waited for the lock", ("waiting",)),
    ("running", "running now", ("running",)),
    ("normal", "ended normally", ("normal",)),
    ("failed", "failed: exception or exit status", ("exit", "exception")),
    ("asked", "stopped: signal or request", ("signal", "stopped")),
    ("killed", "killed, found dead later", ("killed",)),
    ("lost", "lost its lock", ("lost lock",)),
)
_KIND_OF = {how: kind for kind, _, endings in _KINDS for how in endings}

_STEPS = (
    *(1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800),
    *(3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800),
)


@attrs.frozen
class Scale:
    """From a time, in epoch seconds, to a place on the axis."""

    begin: float
    end: float
    width: int  # pixels, where the page is no wider

    @classmethod
    def of(cls, runs: Sequence[Entry]) -> Scale:
        """So wide that most bars can be seen, and everything within a margin."""
        begin = min(run.record.started_at for run in runs)
        seen = max(run.last_seen_at for run in runs)
        found = max(run.ended_at for run in runs)
        end = min(found, seen + 0.1 * (seen - begin))  # it may have been found days later
        lengths = sorted(run.last_seen_at - run.record.started_at for run in runs)
        typical = max(lengths[len(lengths) // 2], 1e-3)
        span = max(end - begin, 1.0)
        width = int(min(max(16 * span / typical, _NARROWEST), _WIDEST))
        margin = span * _MARGIN / (width - 2 * _MARGIN)
        return cls(begin - margin, end + margin, width)

    def share(self, at: float) -> float:
        """Where on the axis, in percent of it."""
        return 100 * (at - self.begin) / (self.end - self.begin)

    def pixels(self, seconds: float) -> float:
        return seconds / (self.end - self.begin) * self.width

    def seconds(self, pixels: float) -> float:
        return pixels * (self.end - self.begin) / self.width

    def ticks(self) -> list[tuple[float, str, str]]:
        """Times at round places of the local clock, each with its label, and the day at its first.

        >>> [label for _, label, _ in Scale(0.0, 50.0, 600).ticks()][-1][-3:]
        ':50'
        """
        fewest = self.seconds(_TICK)
        step = next((step for step in _STEPS if step >= fewest), None)
        if step is None:
            step = 604800 * math.ceil(fewest / 604800)
        found: list[tuple[float, str, str]] = []
        day = ""
        for at in _days(self, step // 86400) if step >= 86400 else _times(self, step):
            local = time.localtime(at)
            date = time.strftime("%a %d %b", local)
            if step >= 86400:
                year = time.strftime("%Y", local)
                found.append((at, date, year if year != day else ""))
                day = year
            else:
                clock = time.strftime("%H:%M:%S" if step < 60 else "%H:%M", local)
                found.append((at, clock, date if date != day else ""))
                day = date
        return found


def _times(scale: Scale, step: int) -> Iterator[float]:
    # Where the clocks are changed within the picture, ticks go on in whole steps.
    offset = time.localtime(scale.begin).tm_gmtoff
    at = math.ceil((scale.begin + offset) / step) * step - offset
    while at <= scale.end:
        yield at
        at += step


def _days(scale: Scale, step: int) -> Iterator[float]:
    day = datetime.date.fromtimestamp(scale.begin)
    while (at := time.mktime(day.timetuple())) <= scale.end:
        if at >= scale.begin:
            yield at
        day += datetime.timedelta(days=step)


def pack(runs: Sequence[Entry], scale: Scale) -> list[int]:
    """A row for each run of a lane, in the order in which they began, so that no two overlap.

    Runs that wait for the same lock begin early and end late: they come to lie below each other.
    """
    rows: list[float] = []  # the end of the last bar in each row
    found = []
    for run in runs:
        begin = run.record.started_at
        end = max(run.ended_at, begin + scale.seconds(_THINNEST))
        free = (row for row, until in enumerate(rows) if until <= begin)
        row = next(free, len(rows))
        if row == len(rows) == _MOST_ROWS:
            row = rows.index(min(rows))
        if row == len(rows):
            rows.append(end)
        rows[row] = max(rows[row], end)
        found.append(row)
    return found


def render(runs: Sequence[Entry], now: float | None = None) -> str:
    """The whole page."""
    now = time.time() if now is None else now
    host = _text(processes.host_name())
    zone = _text(time.strftime("%Z", time.localtime(now)))
    made = _text(time.strftime("%A %d %B %Y, %H:%M", time.localtime(now)))
    body = _figure(runs) + _table(runs) if runs else '<p class="empty">No run has ended yet.</p>'
    return _PAGE.format(
        style=_STYLE,
        host=host,
        about=_text(_about(runs)),
        made=f"{made} {zone}",
        body=body,
    )


def _about(runs: Sequence[Entry]) -> str:
    if not runs:
        return "nothing on record"
    projects = len({run.record.project for run in runs})
    begin = min(run.record.started_at for run in runs)
    end = max(run.last_seen_at for run in runs)
    return (
        f"{output.count(len(runs), 'run')} of {output.count(projects, 'project')}, "
        f"{_moment(begin)} to {_moment(end, begin)}"
    )


def _figure(runs: Sequence[Entry]) -> str:
    scale = Scale.of(runs)
    lanes: dict[str, list[Entry]] = {}
    for run in sorted(runs, key=lambda run: run.record.started_at):
        lanes.setdefault(run.record.project, []).append(run)
    labels, drawn, grid = [], [], []
    top = _AXIS
    for number, (project, those) in enumerate(sorted(lanes.items())):
        rows = pack(those, scale)
        bars = (max(rows) + 1) * (_BAR + _GAP) - _GAP
        height = max(_LANE, bars + 2 * _PAD)
        drawn.append(
            f'<rect class="lane{" odd" * (number % 2)}" y="{top}" width="100%" height="{height}"/>'
        )
        first = top + (height - bars) // 2 if bars < _LANE - 2 * _PAD else top + _PAD
        for run, row in zip(those, rows, strict=True):
            drawn.append(_bar(run, scale, first + row * (_BAR + _GAP)))
        ran = sum(run.ran_seconds or 0.0 for run in those)
        labels.append(
            f'<li style="height:{height}px" title="{_text(project)}"><b>{_text(project)}</b>'
            f"<span>{output.count(len(those), 'run')}, {output.age(ran)}</span></li>"
        )
        top += height
    for at, label, day in scale.ticks():
        x = f"{scale.share(at):.3f}%"
        # Beside the edge there is no room for the left half of a label.
        side = " right" if scale.pixels(at - scale.begin) < _MARGIN else ""
        grid.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_AXIS - 6}" y2="{top}"/>')
        grid.append(f'<text class="tick{side}" x="{x}" y="{_AXIS - 11}">{_text(label)}</text>')
        if day:
            grid.append(f'<text class="day{side}" x="{x}" y="10">{_text(day)}</text>')
    lane_shapes = [shape for shape in drawn if shape.startswith("<rect")]
    bar_shapes = [shape for shape in drawn if not shape.startswith("<rect")]
    return _FIGURE.format(
        axis=_AXIS,
        labels="".join(labels),
        width=scale.width,
        height=top + 1,
        description=_text(_about(runs)),
        shapes="\n".join((*lane_shapes, *grid, *bar_shapes)),
        legend=_legend(runs),
    )


def _bar(run: Entry, scale: Scale, y: int) -> str:
    """One run: hatched while it waited, coloured while it ran, dashed while nobody knows."""
    record, kind = run.record, _KIND_OF[run.how]
    began = record.started_at if run.running_at is None else run.running_at
    shapes = []
    if scale.pixels(began - record.started_at) >= 1:
        shapes.append(_rect("wait", scale, record.started_at, began, y))
    if scale.pixels(run.ended_at - run.last_seen_at) >= 1:
        x1, x2 = scale.share(run.last_seen_at), scale.share(run.ended_at)
        middle = y + _BAR / 2
        shapes.append(
            f'<line class="unknown" x1="{x1:.3f}%" x2="{x2:.3f}%" y1="{middle}" y2="{middle}"/>'
        )
    shapes.append(_rect(kind, scale, began, run.last_seen_at, y))
    width = scale.pixels(run.last_seen_at - began)
    words = [f"{run.outcome}, {run.ran}", run.outcome]
    if run.how in ("normal", "running"):
        words = [run.ran]
    label = next((word for word in words if len(word) * _LETTER + 12 <= width), None)
    if label is not None:
        x = scale.share((began + run.last_seen_at) / 2)
        shapes.append(
            f'<text class="in {kind}-in" x="{x:.3f}%" y="{y + _BAR - 5}">{_text(label)}</text>'
        )
    return (
        f'<a href="#run-{record.run_id}"><g class="run"><title>{_text(_told(run))}</title>'
        f"{''.join(shapes)}</g></a>"
    )


def _rect(kind: str, scale: Scale, begin: float, end: float, y: int) -> str:
    width = max(scale.share(end) - scale.share(begin), 100 * _THINNEST / scale.width)
    return (
        f'<rect class="{kind}" x="{scale.share(begin):.3f}%" y="{y}" width="{width:.3f}%" '
        f'height="{_BAR}" rx="3"/>'
    )


def _told(run: Entry) -> str:
    """Everything of a run, for a pointer that rests on it."""
    record = run.record
    began = record.started_at if run.running_at is None else run.running_at
    lines = [f"{record.project}: {_how(run)}"]
    if run.how == "running":
        lines.append(f"since {_moment(began)}, for {run.ran}")
    elif run.how != "waiting":
        end = _moment(run.last_seen_at, began)
        lines.append(f"{_moment(began)} to {end}, ran {run.ran}")
    if run.waited != "-":
        lines.append(f"waited {run.waited} for the lock, since {_moment(record.started_at)}")
    if run.alive_at is not None:
        lines.append(f"found dead {_moment(run.ended_at)}")
    lines += [
        _who(run),
        output.shorten(output.command(record.argv), 200),
        *run.notes,
    ]
    return "\n".join(map(printable, lines))


def _how(run: Entry) -> str:
    words = {
        "normal": "ended normally",
        "exit": f"ended with exit status {run.exit_status}",
        "exception": f"ended with {run.error}",
        "signal": f"ended by {run.signal}",
        "stopped": "ended, as it was asked to",
        "lost lock": "lost its lock",
        "killed": "was killed",
        "running": "is running",
        "waiting": "is waiting",
    }
    return words[run.how]


def _who(run: Entry) -> str:
    record = run.record
    rank = "" if record.rank is None else f", rank {record.rank}"
    return f"{record.user} on {record.host}, pid {record.pid}{rank}"


def _moment(at: float, after: float | None = None) -> str:
    """A moment; without its day, if that is the day of the moment before."""
    local = time.localtime(at)
    same_day = after is not None and time.localtime(after)[:3] == local[:3]
    return time.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M:%S", local)


def _legend(runs: Sequence[Entry]) -> str:
    there = {_KIND_OF[run.how] for run in runs}
    if any((run.waited_seconds or 0) >= 1 for run in runs):
        there.add("wait")
    entries = [(kind, words) for kind, words, _ in _KINDS if kind in there]
    return "".join(
        f'<li><svg class="key" width="22" height="12" aria-hidden="true">'
        f'<rect class="{kind}" x="0.5" y="0.5" width="21" height="11" rx="3"/></svg>{words}</li>'
        for kind, words in entries
    )


def _table(runs: Sequence[Entry]) -> str:
    rows = []
    for run in reversed(runs):
        record = run.record
        notes = "; ".join(run.notes)
        if run.alive_at is not None:
            found = f"found dead {_moment(run.ended_at)}"
            notes = f"{found}; {notes}" if notes else found
        kind = _KIND_OF[run.how]
        at = ("~" if run.alive_at is not None else "") + _moment(run.last_seen_at)
        cells = (
            ("Ended", "-" if run.is_live else at, "number"),
            ("Project", record.project, "name"),
            ("How", run.outcome, f"how {kind}-how"),
            ("Waited", run.waited, "number"),
            ("Ran", run.ran, "number"),
            ("Who", _who(run), "who"),
            ("Command", " ".join(record.argv)[:1000], "code"),
            ("Directory", record.cwd, "code"),
            ("Freed and stopped", notes or "-", ""),
        )
        drawn = "".join(
            f'<td class="{style}" data-label="{name}"><span>{_text(value)}</span></td>'
            for name, value, style in cells
        )
        rows.append(f'<tr id="run-{record.run_id}">{drawn}</tr>')
    names = ("Ended", "Project", "How", "Waited", "Ran", "Who", "Command", "Directory")
    heads = "".join(f'<th scope="col">{name}</th>' for name in (*names, "Freed and stopped"))
    return (
        f'<section><h2>Every run, the last one first</h2><div class="runs"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _text(value: str) -> str:
    """Text for HTML, attributes included; nothing in it turns the direction of writing around."""
    lines = value.split("\n")
    return html.escape("\n".join(map(printable, lines)))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="orchard-infra history">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Runs on {host}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>Runs on {host}</h1>
<p>{about}</p>
</header>
{body}
<footer>Made {made} by <code>orchard-infra history --html</code>. Times are of this zone.</footer>
</main>
</body>
</html>
"""

_FIGURE = """<figure>
<ul class="legend" aria-label="Legend">{legend}</ul>
<div class="timeline">
<ul class="labels" aria-label="Projects" style="padding-top:{axis}px">{labels}</ul>
<div class="plot" tabindex="0" role="region" aria-label="Timeline, can be scrolled">
<svg role="img" aria-labelledby="timeline-title timeline-text" height="{height}"
 style="min-width:{width}px">
<title id="timeline-title">Timeline of runs by project</title>
<desc id="timeline-text">{description}. The table below has the same runs.</desc>
<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse"
 patternTransform="rotate(45)"><rect class="hatch-back" width="6" height="6"/>
<line class="hatch-line" x1="1.5" x2="1.5" y1="0" y2="6"/></pattern></defs>
{shapes}
</svg>
</div>
</div>
</figure>
"""

_STYLE = """
:root {
  --page: #f6f7f9; --card: #fff; --text: #1b2430; --soft: #5b6675; --line: #dde2e8; --lane: #f3f5f8;
  --normal: #1a936f; --failed: #d1441f; --asked: #e8a317; --killed: #8a3f9e; --lost: #2f6fd0;
  --running: #0b8fa8; --wait: #e9edf2; --hatch: #a9b4c2; --in: #fff; --in-asked: #3a2800;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1a2029; --text: #e6eaf0; --soft: #9aa6b5; --line: #2d3643;
    --lane: #1f2630; --normal: #2fb58c; --failed: #f0683f; --asked: #f2b93b; --killed: #c07ad4;
    --lost: #6aa2f5; --running: #3fc3da; --wait: #2a323e; --hatch: #66748a;
    --in: #0d1117; --in-asked: #0d1117;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1500px; margin: 0 auto; padding: 28px 24px 40px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 30px 0 10px; }
header p { margin: 2px 0 18px; color: var(--soft); }
footer { margin-top: 22px; color: var(--soft); font-size: 13px; }
.empty { padding: 40px; text-align: center; background: var(--card); border-radius: 10px;
  border: 1px solid var(--line); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  overflow: hidden; }
.legend { list-style: none; margin: 0; padding: 12px 16px; display: flex; flex-wrap: wrap;
  gap: 4px 20px; font-size: 13px; color: var(--soft); border-bottom: 1px solid var(--line); }
.legend li { display: flex; align-items: center; gap: 7px; }
.timeline { display: flex; }
.labels { list-style: none; margin: 0; padding: 0; flex: 0 0 auto; width: 210px; min-width: 0;
  border-right: 1px solid var(--line); }
.labels li { padding: 0 10px 0 16px; display: flex; flex-direction: column;
  justify-content: center; line-height: 1.3; }
.labels li:nth-child(even) { background: var(--lane); }
.labels b { font-weight: 600; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.labels span { color: var(--soft); font-size: 12px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
/* Scrolled to its end, where the last runs are, without a script. */
.plot { flex: 1 1 auto; min-width: 0; overflow-x: auto; overflow-y: hidden; direction: rtl; }
.plot:focus-visible, a:focus-visible .run { outline: 2px solid var(--lost); outline-offset: -2px; }
.plot > svg { display: block; width: 100%; direction: ltr; font: 11px/1 inherit; }
svg text { font-family: inherit; font-size: 11px; fill: var(--soft); text-anchor: middle; }
.lane { fill: none; } .lane.odd { fill: var(--lane); }
svg .right { text-anchor: start; }
.grid { stroke: var(--line); stroke-width: 1; }
svg .day { font-weight: 600; fill: var(--text); }
.normal { fill: var(--normal); } .failed { fill: var(--failed); } .asked { fill: var(--asked); }
.killed { fill: var(--killed); } .lost { fill: var(--lost); } .running { fill: var(--running); }
.wait { fill: url(#hatch); stroke: var(--hatch); stroke-width: 1; }
.hatch-back { fill: var(--wait); } .hatch-line { stroke: var(--hatch); stroke-width: 1.6; }
.unknown { stroke: var(--killed); stroke-width: 2; stroke-dasharray: 3 4; }
svg .in { fill: var(--in); font-weight: 600; pointer-events: none; }
svg .asked-in { fill: var(--in-asked); }
.run { cursor: pointer; } .run:hover rect { filter: brightness(1.12); stroke: var(--text); }
.runs { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { text-align: left; color: var(--soft); font-weight: 600; white-space: nowrap; }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
tr:target { background: var(--lane); box-shadow: inset 4px 0 var(--lost); }
td span { overflow-wrap: anywhere; }
td.name { font-weight: 600; min-width: 90px; } td.who { min-width: 120px; }
td.number { white-space: nowrap; }
td.code { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace;
  font-size: 12px; min-width: 150px; }
td.how span { display: inline-block; white-space: nowrap; padding-left: 7px;
  border-left: 9px solid; }
.normal-how span { border-color: var(--normal) !important; }
.failed-how span { border-color: var(--failed) !important; }
.asked-how span { border-color: var(--asked) !important; }
.killed-how span { border-color: var(--killed) !important; }
.running-how span { border-color: var(--running) !important; }
.wait-how span { border-color: var(--hatch) !important; }
.lost-how span { border-color: var(--lost) !important; }
code { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; font-size: 0.92em; }
@media (max-width: 760px) {
  main { padding: 18px 12px 28px; }
  .labels { width: 104px; } .labels li { padding: 0 6px 0 10px; } .labels b { font-size: 13px; }
  thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
  table, tbody, tr, td { display: block; }
  tr { padding: 8px 0; border-bottom: 1px solid var(--line); }
  tbody tr:last-child { border-bottom: 0; }
  td { display: grid; grid-template-columns: 108px minmax(0, 1fr); padding: 2px 12px; border: 0; }
  td::before { content: attr(data-label); color: var(--soft);
    font: 13px/1.6 system-ui, sans-serif; font-weight: 400; }
  td.how span { justify-self: start; }
}
@media print { body { background: none; } .plot { overflow: visible; } }
"""
