"""Which answers the later stages fit on."""

from __future__ import annotations

from pathlib import Path

from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.stages.answers import judged
from rs_gguf.records.conversation import Answer, Prompt
from rs_gguf.records.rows import write_rows


def test_answers_that_fail_or_have_no_judgement_are_not_fitted_on(tmp_path: Path) -> None:
    confidence = {
        "refuses": 0.9,
        "complies": -0.9,
        "neutral": 0.1,
        "unknown": None,
        "echo": 0.9,
        "loop": -0.9,
    }
    category = {"refuses": "direct", "echo": "empty"}
    prompts = {name: Prompt(name, "sensitive") for name in confidence}
    write_rows(
        tmp_path / "answers.jsonl",
        [
            {**prompt.to_row(), **Answer([1], "text", True, name == "loop").to_row()}
            for name, prompt in prompts.items()
        ],
    )
    write_rows(
        tmp_path / "judgements.jsonl",
        [
            {"id": prompts[name].id, "confidence": c, "mode": "invented", "category": category.get(name)}
            for name, c in confidence.items()
        ],
    )
    expected = {prompts[name].id for name in ("refuses", "complies", "neutral")}
    assert judged(RunFolder(tmp_path)).keys() == expected
