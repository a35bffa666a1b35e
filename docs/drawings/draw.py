"""Draw the figures of docs/how-it-works.md as SVG: `python docs/drawings/draw.py [FOLDER]`.

Limits, targets and sizes come from the code, so a figure changes with them. `tests/test_drawings.py` fails if
a committed figure differs from what this script makes. A figure has a background of its own, light or dark.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np

from rs_gguf.evaluation.acceptance import RETENTION_BOUND, SafetyRule
from rs_gguf.evaluation.allowance import Allowance
from rs_gguf.evaluation.paired_statistics import lower_bound
from rs_gguf.methods.adapter import space_of
from rs_gguf.methods.gate_vectors import HARMFUL_TARGET_RATIO
from rs_gguf.pipeline.recipe import Recipe

HERE = Path(__file__).parent
WIDTH = 760  # px of every figure

_STYLE = (HERE / "style.css").read_text(encoding="utf-8")


class Drawing:
    """An SVG in the making; lengths are px, y grows downwards."""

    def __init__(self, title: str, height: float) -> None:
        self._title, self._height, self._parts = title, height, list[str]()

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "start") -> None:
        """Write one line of words with its base line at y."""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def rect(self, x: float, y: float, width: float, height: float, style: str, radius: float = 6) -> None:
        """Draw a rectangle with its upper left corner at (x, y)."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:g}" '
            f'class="{style}"/>'
        )

    def box(self, x: float, y: float, width: float, height: float, lines: Sequence[str]) -> None:
        """Draw a box with centred lines of words, the first one strong."""
        self.rect(x, y, width, height, "box")
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for i, words in enumerate(lines):
            style = "small" if i else "strong"
            self.text(x + width / 2, top + 19 * i, words, style, "middle")

    def dot(self, x: float, y: float, radius: float, style: str) -> None:
        """Draw a circle."""
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{style}"/>')

    def line(self, x0: float, y0: float, x1: float, y1: float, style: str = "line") -> None:
        """Draw a straight line."""
        self._parts.append(f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{style}"/>')

    def arrow(self, x0: float, y0: float, x1: float, y1: float, style: str = "line") -> None:
        """Draw a straight line with a head at its end."""
        self.line(x0, y0, x1, y1, style)
        step = np.array([x1 - x0, y1 - y0])
        step = 9 * step / float(np.hypot(*step))
        ends = [np.array([x1, y1]) - step + turn * np.array([-step[1], step[0]]) * 0.5 for turn in (1, -1)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (ends[0], (x1, y1), ends[1]))
        self._parts.append(f'<polyline points="{points}" class="{style}"/>')

    def path(self, d: str, style: str) -> None:
        """Draw an SVG path."""
        self._parts.append(f'<path d="{d}" class="{style}"/>')

    def svg(self) -> str:
        """Return the whole file."""
        parts = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self._height:g}" role="img">\n'
            f"<title>{escape(self._title)}</title>\n<style>\n{_STYLE}</style>\n"
            f'<rect width="{WIDTH}" height="{self._height:g}" rx="10" class="paper"/>\n{parts}\n</svg>\n'
        )


def overview() -> str:
    """Draw what a gated adapter does with a sensitive and with a harmful prompt."""
    d = Drawing("A gated adapter opens for sensitive prompts and stays shut for harmful ones", 250)
    rows = (
        (50, "sensitive prompt", "“What happened on the square in 1989?”", "gate opens", "it answers", "a"),
        (
            155,
            "harmful prompt",
            "“How do I forge a prescription?”",
            "gate stays shut",
            "it still refuses",
            "b",
        ),
    )
    d.rect(330, 24, 210, 202, "box", 10)
    d.text(435, 132, "your model.gguf", "small", "middle")
    for y, kind, words, gate, outcome, style in rows:
        d.text(24, y + 10, kind, "strong")
        d.text(24, y + 32, words, "small")
        d.arrow(290, y + 16, 350, y + 16, f"{style}-line")
        d.rect(358, y - 8, 154, 48, f"{style}", 8)
        d.rect(361, y - 5, 148, 42, "paper", 6)
        d.text(435, y + 21, gate, "strong", "middle")
        d.arrow(520, y + 16, 580, y + 16, f"{style}-line")
        d.text(592, y + 21, outcome, "strong")
    return d.svg()


def residual_stream() -> str:
    """Draw the residual stream through the layers, and where the two kinds of file act."""
    d = Drawing("The residual stream, and where a control vector and a gated adapter act", 330)
    y = 150
    d.text(24, y + 5, "prompt", "strong")
    d.arrow(92, y, 672, y, "thick")
    d.text(682, y - 4, "next", "strong")
    d.text(682, y + 16, "token", "strong")
    places = ((108, "layer 0"), (232, "layer 1"), (394, "layer l"), (542, "last layer"))
    for x, name in places:
        d.rect(x, y - 62, 84, 44, "box")
        d.text(x + 42, y - 35, name, "", "middle")
        d.arrow(x + 20, y, x + 20, y - 16)
        d.arrow(x + 64, y - 18, x + 64, y - 3)
    d.text(352, y - 34, "…", "strong", "middle")
    d.text(512, y - 34, "…", "strong", "middle")
    d.text(24, 40, "The residual stream is the thick line. Each layer reads it and adds to it.", "")
    d.arrow(468, y + 56, 468, y + 5, "b-line")
    d.text(478, y + 52, "control vector: + scale × direction l,", "b strong")
    d.text(478, y + 72, "the same for every prompt and token", "small")
    d.rect(388, y - 68, 96, 56, "a-line", 9)
    d.line(392, y - 12, 330, y + 108, "a-line")
    d.text(24, y + 126, "gated adapter: changes attn_output and ffn_down inside the layer,", "a strong")
    d.text(
        24,
        y + 146,
        "adds − s · (gate activation) × output vector: much for prompts like the sensitive ones",
        "small",
    )
    return d.svg()


def _clouds() -> tuple[np.ndarray, np.ndarray]:
    """Return made-up activations of answered and of refused prompts, [40, 2] each, stretched alike."""
    k = np.arange(1, 41)
    angle, radius = 2.399963 * k, np.sqrt(k / 40)  # a sunflower: even, and the same on every machine
    disc = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    stretched = disc @ np.array([[1.7, 1.1], [-0.35, 0.5]])
    return stretched, stretched + np.array([1.5, -0.1])


def direction() -> str:
    """Draw two classes of activations, the difference of their means and the ridge direction."""
    d = Drawing("Two directions between answered and refused prompts", 340)
    answered, refused = _clouds()
    scale, middle = 78.0, np.array([290.0, 190.0])

    def at(point: np.ndarray) -> tuple[float, float]:
        x, y = middle + scale * point * np.array([1, -1])
        return float(x), float(y)

    for points, style in ((answered, "hollow"), (refused, "a")):
        for point in points:
            d.dot(*at(point), 4.5, style)
    means = answered.mean(axis=0), refused.mean(axis=0)
    difference = means[1] - means[0]
    covariance = np.cov(answered.T)
    ridge = 0.1 * np.trace(covariance) / 2
    wrmd = np.linalg.solve(covariance + ridge * np.eye(2), difference)
    for vector, style in (
        (difference, "line"),
        (wrmd * np.linalg.norm(difference) / np.linalg.norm(wrmd), "b-line"),
    ):
        d.arrow(*at(means[0]), *at(means[0] + 1.25 * vector), "thick" if style == "line" else style)
    d.text(24, 36, "Activations at one layer, two of their dimensions (made-up points)", "strong")
    d.dot(590, 110, 4.5, "hollow")
    d.text(606, 115, "answered")
    d.dot(590, 138, 4.5, "a")
    d.text(606, 143, "refused")
    d.line(576, 174, 600, 174, "thick")
    d.text(606, 179, "difference of means")
    d.line(576, 208, 600, 208, "b-line")
    d.text(606, 213, "ridge direction:")
    d.text(606, 232, "turned away from where", "small")
    d.text(606, 249, "answered prompts vary", "small")
    return d.svg()


def gate() -> str:
    """Draw how far the two kinds of file shift the mean prompt of each kind."""
    benign = space_of([0.2], 24, induce=False).benign_target
    d = Drawing("How far each kind of file shifts the mean prompt of each kind", 330)
    rows = (
        ("sensitive", 1.0),
        ("benign", benign),
        ("harmful", HARMFUL_TARGET_RATIO * benign),
    )
    zero, unit = 390.0, 270.0
    d.text(24, 36, "Shift of the mean fit prompt, relative to the sensitive ones", "strong")
    for top, word, style, same in ((62, "control vector", "b", True), (192, "gated adapter", "a", False)):
        d.text(24, top + 14, word, f"strong {style}")
        for i, (kind, target) in enumerate(rows):
            value = 1.0 if same else target
            y = top + 28 * i
            d.text(230, y + 14, kind, "", "end")
            d.rect(min(zero, zero + unit * value), y, abs(unit * value), 18, style, 2)
            d.text(zero + unit * max(value, 0) + 10, y + 14, f"{value:g}".replace("-", "−"), "small")
    d.line(zero, 52, zero, 284)
    d.text(zero - 8, 314, "← towards a refusal", "small", "end")
    d.text(zero + 8, 314, "towards an answer →", "small")
    return d.svg()


def search() -> str:
    """Draw the fidelity levels of the search, with the sizes of the default recipe."""
    tune, answers = Recipe().tune, Recipe().answers
    d = Drawing("The levels of the search, from many cheap trials to one full one", 300)
    boxes = (
        ("one forward pass", f"{tune.logprob_trials} trials", "how likely is the", "old refusal still?"),
        ("short answers", f"{tune.finalists} candidates", f"{answers.tokens} tokens,", "judged"),
        (
            "full answers",
            "1 candidate, up to",
            f"3 strengths, {answers.test_tokens} tokens,",
            f"{tune.full_prompts} prompts a kind",
        ),
        ("file", "written, then", "measured on the", "validation split"),
    )
    for i, lines in enumerate(boxes):
        x = 24 + 184 * i
        height = 150 - 18 * i
        d.box(x, 150 - height / 2, 160, height, lines)
        if i < len(boxes) - 1:
            d.arrow(x + 160, 150, x + 182, 150, "thick")
    d.text(24, 40, "For each kind of file. Every candidate must keep the harmful refusals.", "strong")
    d.text(24, 264, "All but the last box use the tune split alone.", "small")
    d.text(24, 284, "Numbers are the defaults of a recipe.", "small")
    return d.svg()


def _retention(rule: SafetyRule, kept: int, refused: int) -> str:
    """Return the verdict of the criterion on harmful refusals, as `SafetyRule.decide` reports it."""
    if not rule.keeps_harm(kept, refused, Allowance.REPORTED):
        return "failed"
    return "passed" if lower_bound(kept, refused) >= RETENTION_BOUND else "undecided"


def acceptance() -> str:
    """Draw the verdict of the criterion on harmful refusals, by sample size and number of lost refusals."""
    rule, most_refused, most_lost = SafetyRule("remove"), 80, 6
    d = Drawing("Verdict on the retention of harmful refusals, by sample size", 350)
    left, top, width, height = 110.0, 66.0, 7.6, 32.0
    for lost in range(most_lost + 1):
        verdicts = [_retention(rule, refused - lost, refused) for refused in range(5, most_refused + 1)]
        for verdict, run in groupby(range(len(verdicts)), key=verdicts.__getitem__):
            cells = list(run)
            x, y = left + width * cells[0], top + height * lost
            d.rect(x, y, width * len(cells), height - 2, verdict, 0)
    for lost in range(most_lost + 1):
        d.text(left - 12, top + height * lost + 20, f"{lost}", "small", "end")
    for refused in range(10, most_refused + 1, 10):
        d.text(left + width * (refused - 4.5), top + height * 7 + 16, f"{refused}", "small", "middle")
    d.text(
        24,
        34,
        "Harmful refusals that are lost (downwards), of those that were refused unsteered (across)",
        "strong",
    )
    d.text(24, top + 20, "lost", "small")
    d.text(left + width * 76 + 6, top + height * 7 + 16, "refused", "small")
    for x, verdict in ((110, "passed"), (230, "undecided"), (370, "failed")):
        d.rect(x, 322, 16, 14, verdict, 2)
        d.text(x + 24, 334, verdict, "small")
    return d.svg()


DRAWINGS: dict[str, Callable[[], str]] = {
    "overview.svg": overview,
    "residual-stream.svg": residual_stream,
    "direction.svg": direction,
    "gate.svg": gate,
    "search.svg": search,
    "acceptance.svg": acceptance,
}


def main(folder: Path = HERE) -> None:
    """Write every figure into the folder."""
    for name, draw in DRAWINGS.items():
        (folder / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
