"""`rs-export scan` prints one record, as tables or as JSON; foreign text cannot control the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.cli.main import main
from rs_gguf.records.metrics import ModelRecord, Outcomes
from rs_gguf.records.scan import Example, PlannedRun, PublishedFile, ScannedSet, ScanRecord

COMMAND = "llama-server -m model.gguf --lora vectors/a/remove-adapter.gguf --and --a --very --long --line"
RECORD = ScanRecord(
    model=ModelRecord(name="[b]m\x1b", sha256="0" * 64, architecture="qwen2", n_layer=3, n_embd=32),
    judge="keywords",
    tokens=48,
    sets={
        "sensitive": ScannedSet(
            n=20, outcomes=Outcomes(complies=11, refuses=7, explicit=4, fails=2, unjudged=0)
        ),
        "harmful": ScannedSet(
            n=20, outcomes=Outcomes(complies=1, refuses=19, explicit=17, fails=0, unjudged=0)
        ),
    },
    examples=(Example(kind="sensitive", outcome="explicit", prompt="Who?", answer=f"No\x1b, {'no' * 99}"),),
    files=(
        PublishedFile(
            path="vectors/a/remove-adapter.gguf", word="gated adapter", effect="remove", verdict="passed",
            command=COMMAND, model_sha256="0" * 64,
        ),
    ),
    run=PlannedRun(seconds=2700, memory=1e9, disk=1e6),
    advice="file",
    reason="A file for this model exists.",
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asked for; the answer is `RECORD`."""
    calls: dict[str, Any] = {}

    def scan(
        model: str, judge: str | None, *, tokens: int, overrides: tuple[str, ...], progress: object
    ) -> ScanRecord:
        calls.update(model=model, judge=judge, tokens=tokens, overrides=overrides)
        return RECORD

    monkeypatch.setattr("rs_gguf.pipeline.scan.scan", scan)
    return calls


def test_the_record_is_printed(asked: dict[str, Any]) -> None:
    done = CliRunner().invoke(main, ["scan", "--model", "m", "--judge", "keywords"])
    assert done.exit_code == 0, done.output
    assert asked == {"model": "m", "judge": "keywords", "tokens": 48, "overrides": ()}
    lines = done.stdout.splitlines()
    cells = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in lines if line.count("│") == 8}
    assert [cell.strip() for cell in cells["sensitive"]] == ["20", "11", "4", "3", "2", "0"]
    assert [cell.strip() for cell in cells["harmful"]] == ["20", "1", "17", "2", "0", "0"]
    assert f"  {COMMAND}" in lines  # in one line
    assert "A default run takes about 45 min 0 s on this machine." in lines
    assert lines[-1] == RECORD.reason
    assert "[b]m" in done.stdout
    assert "\x1b" not in done.stdout
    assert "nonono …" in done.stdout


def test_json_is_the_record(asked: dict[str, Any]) -> None:
    done = CliRunner().invoke(main, ["scan", "--model", "m", "--tokens", "64", "--json", "-ngl", "9"])
    overrides = ('engine.gpu_layers="9"',)
    assert asked == {"model": "m", "judge": None, "tokens": 64, "overrides": overrides}
    value = json.loads(done.stdout)
    assert value["schema_version"] == 1
    assert ScanRecord.model_validate(value) == RECORD


def test_a_model_that_cannot_answer_is_wrong_input(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    done = CliRunner().invoke(main, ["scan", "--model", str(tmp_path / "tiny.gguf"), "--judge", "keywords"])
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "the model cannot answer" in line
