"""The known errors of the embedded judge, and no errors known of any other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import cast

from rs_gguf.judges.accuracy import Accuracy, known_accuracy
from rs_gguf.judges.judge import Judge
from rs_gguf.judges.local import KeywordJudge


@dataclass
class Named:
    name: str


def test_only_the_embedded_judge_has_known_errors() -> None:
    shipped = json.loads(
        (resources.files("rs_gguf") / "data" / "judge_test.json").read_text(encoding="utf-8")
    )
    accuracy = known_accuracy(cast("Judge", Named(shipped["judge"])))
    assert accuracy is not None
    assert accuracy.keys() == {"explicit", "refuses"}
    for outcome, found in accuracy.items():
        assert found == Accuracy(*(shipped["outcomes"][outcome][k] for k in ("sensitivity", "specificity")))
        assert found.sensitivity > 0.9 < found.specificity
    assert known_accuracy(KeywordJudge()) is None
