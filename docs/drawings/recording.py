"""Record a command in a terminal as an animated SVG: `python docs/drawings/recording.py FILE COMMAND…`.

What the command writes is played in at most 20 seconds; then the last screen stays. Where nothing moves, only
the last screen is shown. Of the styles, colours and bold text are drawn. The file is written whatever the
command's exit status, which is then this script's own.
"""

from __future__ import annotations

import datetime
import os
import pty
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

import pyte

from rs_gguf.report.results import printable

COLUMNS, LINES = 100, 30  # of the terminal
FRAMES = 120  # at most, and the last screen
PLAYED, HELD = 20.0, 6.0  # seconds: all screens except the last one, at most, and the last one
CELL, LINE, MARGIN = 8.0, 18.0, 16.0  # px
_QUIET = "#9ba6aa"
_COLOURS = {
    "default": "#e5e9e8", "black": "#59636a", "red": "#ff9299", "green": "#67cfc0", "brown": "#d2c77a",
    "blue": "#8fb4ff", "magenta": "#d7a6f7", "cyan": "#7fd4e8", "white": "#ffffff",
}  # fmt: skip
_STYLE = """text { font: 13px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
g { animation-timing-function: step-end; animation-iteration-count: infinite; }
@media (prefers-reduced-motion: reduce) { g { animation: none !important; } }
"""
_WORDS = re.compile(r"\S+(?: \S+)*")  # a drawing may collapse more blanks than one


@dataclass(frozen=True)
class Output:
    """What the command wrote after `seconds`."""

    seconds: float
    text: bytes


@dataclass(frozen=True)
class Words:
    """Text in one style, from a column on and as many columns wide."""

    column: int
    width: int
    text: str
    colour: str
    bold: bool = False


Line = tuple[Words, ...]


@dataclass(frozen=True)
class Frame:
    """The screen from `seconds` on."""

    seconds: float
    lines: tuple[Line, ...]


def record(command: str) -> tuple[list[Output], int]:
    """Run the command, pass its output on, and return it with the exit status."""
    start = time.monotonic()
    written = [Output(0.0, f"$ {command}\r\n".encode())]

    def read(terminal: int) -> bytes:
        text = os.read(terminal, 65536)
        # The home folder names somebody. A path in two reads keeps it: look at the picture.
        shown = text.replace(f"{Path.home()}/".encode(), b"~/")
        written.append(Output(time.monotonic() - start, shown))
        return text

    prepared = f"stty cols {COLUMNS} rows {LINES}; export TERM=xterm-256color; {command}"
    return written, os.waitstatus_to_exitcode(pty.spawn(["sh", "-c", prepared], read))


def frames(written: Sequence[Output]) -> list[Frame]:
    """Return the different screens at equal steps of time; the last one is always among them."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    step = written[-1].seconds / FRAMES or 1.0
    taken: list[Frame] = []
    for number, output in enumerate(written, 1):
        stream.feed(output.text)
        if number == len(written) or written[number].seconds // step > output.seconds // step:
            lines = tuple(_line(screen, line) for line in range(LINES))
            if not taken or taken[-1].lines != lines:
                taken.append(Frame(output.seconds, lines))
    return taken


def _line(screen: pyte.Screen, line: int) -> Line:
    cells = [screen.buffer[line][column] for column in range(COLUMNS)]
    found, column = [], 0
    for (colour, bold), group in groupby(cells, lambda cell: (cell.fg, cell.bold)):
        # The second cell of a wide character holds nothing.
        text = "".join(cell.data or "\0" for cell in group)
        fill = _COLOURS.get(colour.removeprefix("bright"), f"#{colour}")
        for words in _WORDS.finditer(text):
            shown = printable(words[0].replace("\0", ""))
            found.append(Words(column + words.start(), len(words[0]), shown, fill, bold))
        column += len(text)
    return tuple(found)


def draw(taken: Sequence[Frame], title: str) -> str:
    """Return the SVG of the screens, below a title and the time. A line that stays is drawn once."""
    duration = min(taken[-1].seconds, PLAYED) + HELD
    # In percent of the animation for a second of the recording.
    pace = 100 * (duration - HELD) / duration / (taken[-1].seconds or 1.0)
    starts = [pace * frame.seconds for frame in taken]
    clocks = [(_clock(frame.seconds),) for frame in taken]
    used = (number for frame in taken for number, line in enumerate(frame.lines, 1) if line)
    height = max(used, default=1)
    parts, styles = [_text(Words(0, len(title), title, _QUIET), 0)], dict[tuple[int, int], str]()
    for number, lines in enumerate([clocks, *zip(*(frame.lines for frame in taken), strict=True)]):
        for line, group in groupby(range(len(taken)), lines.__getitem__):
            first, *rest = group
            end = first + len(rest) + 1
            if line:
                styles[first, end] = _visible(first, end, starts, duration)
                words = "".join(_text(words, number) for words in line)
                parts.append(f'<g class="f{first}-{end}">{words}</g>')
    size = COLUMNS * CELL + 2 * MARGIN, (height + 1.5) * LINE + 2 * MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]:g} {size[1]:g}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}{''.join(styles.values())}</style>\n"
        f'<rect width="{size[0]:g}" height="{size[1]:g}" rx="10" fill="#14181a"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _clock(seconds: float) -> Words:
    text = str(datetime.timedelta(seconds=round(seconds)))
    return Words(COLUMNS - len(text), len(text), text, _QUIET)


def _visible(first: int, end: int, starts: Sequence[float], duration: float) -> str:
    """Return the style of lines that show from frame `first` to before frame `end`.

    Without animation only the lines of the last frame show.
    """
    steps, hidden = f"{starts[first]:.3f}% {{ visibility: visible }}", ""
    if first:
        steps = f"0% {{ visibility: hidden }} {steps}"
    if end < len(starts):
        steps, hidden = f"{steps} {starts[end]:.3f}% {{ visibility: hidden }}", "visibility: hidden; "
    return (
        f".f{first}-{end} {{ {hidden}animation-name: f{first}-{end}; animation-duration: {duration:.1f}s }}\n"
        f"@keyframes f{first}-{end} {{ {steps} }}\n"
    )


def _text(words: Words, line: int) -> str:
    """Return words of the line with the title, 0, or of a line of the screen."""
    x, y = MARGIN + words.column * CELL, MARGIN + (line + 0.7 + 0.5 * (line > 0)) * LINE
    weight = ' font-weight="bold"' if words.bold else ""
    return (
        f'<text x="{x:g}" y="{y:.1f}" textLength="{words.width * CELL:g}" fill="{words.colour}"{weight}>'
        f"{escape(words.text)}</text>"
    )


def main(file: Path, command: str) -> int:
    """Record the command into the file and return its exit status."""
    written, status = record(command)
    file.write_text(draw(frames(written), f"{command} · {datetime.date.today()}"), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), shlex.join(sys.argv[2:])))
