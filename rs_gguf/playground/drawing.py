"""Gate activations as HTML and SVG: a prompt whose tokens are shaded, and a bar for each layer.

Activations go in; markup comes out. Every text is escaped, since tokens may hold markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 560, 200, 40, 14, 24
_FULL = 0.6  # opacity at an activation of 1 or more, at which the text is still easy to read
_OPEN, _SHUT = "79, 70, 229", "217, 119, 6"  # activation above and below 0


def shaded(tokens: Sequence[tuple[str, float]]) -> str:
    """Return a paragraph in which each token's background shows its activation; 1 is the darkest."""
    spans = []
    for text, value in tokens:
        colour = f"rgba({_OPEN if value > 0 else _SHUT}, {_FULL * min(1.0, abs(value)):.2f})"
        shown = escape(text.replace("\n", "↵\n"))
        spans.append(f'<span title="{value:.2f}" style="background: {colour}">{shown}</span>')
    return f'<p style="white-space: pre-wrap; line-height: 1.7">{"".join(spans)}</p>'


def bars(layers: Mapping[int, float]) -> str:
    """Return an SVG with a bar for the activation of each layer. The dashed line is 1."""
    high, low = max(1.0, *layers.values()), min(0.0, *layers.values())
    scale = (_HEIGHT - _TOP - _BOTTOM) / (high - low)
    step = (_WIDTH - _LEFT) / len(layers)

    def y(value: float) -> float:
        return _TOP + (high - value) * scale

    parts = [
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="currentColor" '
        f'stroke-opacity=".5" {dash}/>'
        f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        for value, dash in ((0.0, ""), (1.0, 'stroke-dasharray="4 4"'))
    ]
    for k, (layer, value) in enumerate(layers.items()):
        top, bottom = sorted((y(value), y(0.0)))
        x = _LEFT + k * step
        parts.append(
            f'<rect x="{x + 2:.1f}" y="{top:.1f}" width="{max(1.0, step - 4):.1f}" '
            f'height="{bottom - top:.1f}" fill="rgb({_OPEN if value > 0 else _SHUT})">'
            f"<title>layer {layer}: {value:.2f}</title></rect>"
            f'<text x="{x + step / 2:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{layer}</text>'
        )
    values = ", ".join(f"layer {layer} {value:.2f}" for layer, value in layers.items())
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Gate activation: {values}" '
        f'font-size="11" fill="currentColor" style="max-width: {_WIDTH}px">{"".join(parts)}</svg>'
    )
