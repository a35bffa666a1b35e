"""Drawings of gate activations: every text is escaped, and marks have the size of their values."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from rs_gguf.playground.drawing import bars, shaded


def test_tokens_are_escaped_and_shaded_by_their_activation() -> None:
    tokens = [("<script>", 0.0), ("a & b", 0.5), ("'\"\n", 7.0), ("é", -1.0)]
    paragraph = ElementTree.fromstring(shaded(tokens))
    spans = list(paragraph)
    assert [span.text for span in spans] == ["<script>", "a & b", "'\"↵\n", "é"]
    assert {span.tag for span in paragraph.iter()} == {"p", "span"}
    opacity = [float(re.findall(r", ([\d.]+)\)$", span.attrib["style"])[0]) for span in spans]
    assert opacity == [0.0, 0.3, 0.6, 0.6]  # full from 1 on
    colours = [span.attrib["style"].rpartition(",")[0] for span in spans]
    assert colours[1] == colours[2] != colours[3]
    assert [span.attrib["title"] for span in spans] == ["0.00", "0.50", "7.00", "-1.00"]


def test_bars_have_the_height_of_their_values() -> None:
    svg = ElementTree.fromstring(bars({8: 2.0, 9: 1.0, 10: -0.5}))
    heights = [float(rect.attrib["height"]) for rect in svg.iter("rect")]
    assert heights == pytest.approx([2 * heights[1], heights[1], heights[1] / 2], abs=0.2)
    assert "layer 8 2.00, layer 9 1.00, layer 10 -0.50" in svg.attrib["aria-label"]
    zero, one = (float(line.attrib["y1"]) for line in svg.iter("line"))
    assert zero - one == pytest.approx(heights[1], abs=0.2)
