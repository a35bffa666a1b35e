"""The known errors of the embedded judge, and no errors known of any other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import cast

import pytest

from rs_gguf.judges.accuracy import Accuracy, known_accuracy
from rs_gguf.judges.judge import Judge
from rs_gguf.judges.local import KeywordJudge


@dataclass
class Named:
    name: str


@pytest.mark.parametrize("model", ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"])
def test_the_errors_of_shipped_judges_are_known(model: str) -> None:
    file = resources.files("rs_gguf") / "data" / "judges" / f"{model}.json"
    shipped = json.loads(file.read_text(encoding="utf-8"))
    accuracy = known_accuracy(cast("Judge", Named(shipped["judge"])))
    assert accuracy is not None
    assert accuracy.keys() == {"explicit", "refuses"}
    for outcome, found in accuracy.items():
        rates = [shipped["outcomes"]["rates"][outcome][k] for k in ("sensitivity", "specificity")]
        assert found == Accuracy(*(rate["n"] / rate["of"] for rate in rates))
        assert found.specificity > 0.85


def test_no_errors_are_known_of_another_judge() -> None:
    assert known_accuracy(KeywordJudge()) is None
