"""A recording of a terminal: nothing is lost of the last screen, text is only text, hours take seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import recording
from recording import Output

SCRIPT = Path(recording.__file__)
SVG = "{http://www.w3.org/2000/svg}"


def at_rest(svg: str) -> list[str]:
    """Return the words of a line each that are visible without animation, from the title on."""
    hidden = set(re.findall(r"^\.(\S+) \{ visibility: hidden;", svg, re.MULTILINE))
    root = ElementTree.fromstring(svg)
    groups = [group for group in root.iter(f"{SVG}g") if group.attrib["class"] not in hidden]
    return ["  ".join(text.text or "" for text in group) for group in groups]


def visible_at(svg: str, percent: float) -> list[str]:
    """Return what the animation shows at a share of its time."""
    shown = {}
    for name, steps in re.findall(r"^@keyframes (\S+) \{ (.*) \}$", svg, re.MULTILINE):
        for start, state in re.findall(r"([\d.]+)% \{ visibility: (\w+) \}", steps):
            if float(start) <= percent:
                shown[name] = state == "visible"
    root = ElementTree.fromstring(svg)
    groups = [group for group in root.iter(f"{SVG}g") if shown.get(group.attrib["class"])]
    return ["  ".join(text.text or "" for text in group) for group in groups]


def progress(seconds: float, steps: int) -> list[Output]:
    """Return what a command writes that moves a bar, then removes it and says that it is done."""
    bars = [Output(seconds * k / steps, f"\r\x1b[2K{k} of {steps}".encode()) for k in range(steps)]
    return [*bars, Output(seconds, b"\r\x1b[2K\x1b[1;32mdone\x1b[0m\r\nUse it")]


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 1), (2.0, 30), (5400.0, 3000)])
def test_the_last_screen_stays_and_shows_without_animation(seconds: float, steps: int) -> None:
    taken = recording.frames(progress(seconds, steps))
    svg = recording.draw(taken, "title")
    assert len(taken) <= recording.FRAMES + 2
    assert at_rest(svg)[1:] == ["done", "Use it"]
    assert visible_at(svg, 99.9)[1:] == ["done", "Use it"]
    longest = recording.PLAYED + recording.HELD
    assert all(float(s) <= longest for s in re.findall(r"animation-duration: ([\d.]+)s", svg))


def test_a_bar_is_seen_at_its_time_of_the_recording() -> None:
    svg = recording.draw(recording.frames(progress(1000.0, 1000)), "title")
    played = 100 * recording.PLAYED / (recording.PLAYED + recording.HELD)
    clock, bar = visible_at(svg, played / 2)
    assert clock.startswith("0:08:")
    assert 480 <= int(bar.split()[0]) <= 500


def test_a_screen_that_scrolled_keeps_its_last_lines() -> None:
    lines = "".join(f"line {k}\r\n" for k in range(100)).encode()
    svg = recording.draw(recording.frames([Output(0.0, b"$ x\r\n"), Output(1.0, lines)]), "title")
    assert at_rest(svg)[1:] == [f"line {k}" for k in range(101 - recording.LINES, 100)]


def test_what_a_command_writes_is_text_in_its_columns() -> None:
    hostile = (
        "</text><script>&\"' \x1b]0;title\x07\x1b[31mred\x1b[0m  ok 你\x00好 \x1b[38;5;208mx\ufffe\x9b1m"
    )
    svg = recording.draw(recording.frames([Output(0.0, hostile.encode())]), "<title> &")
    assert "<script" not in svg
    (line,) = at_rest(svg)[1:]
    assert line.startswith("</text><script>&\"'  red  ok 你好  x")
    columns = {
        text.text: (float(text.attrib["x"]) - recording.MARGIN) / recording.CELL
        for text in ElementTree.fromstring(svg).iter(f"{SVG}text")
    }
    assert columns["red"] == 19
    assert columns["ok 你好"] == 24
    assert re.search(r'fill="#ff8700"[^>]*>x', svg)


def test_a_command_is_recorded_in_a_terminal_with_its_exit_status(tmp_path: Path) -> None:
    file, home = tmp_path / "recording.svg", tmp_path / "home"
    command = ["sh", "-c", f"test -t 1 && stty size && echo {home}/model.gguf; exit 3"]
    done = subprocess.run(
        [sys.executable, SCRIPT, file, *command],
        stdin=subprocess.DEVNULL, env=os.environ | {"HOME": str(home)}, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    shown = at_rest(file.read_text(encoding="utf-8"))
    assert shown[-2:] == [f"{recording.LINES} {recording.COLUMNS}", "~/model.gguf"]
