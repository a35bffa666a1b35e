"""`metrics.json`: what is written is read again, as are files of schema 1, and no others."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from fixtures.invented_run import make_run

from rs_gguf.errors import InputError
from rs_gguf.records.metrics import RunRecord
from rs_gguf.report.page import write_card, write_report

SCHEMA_1 = Path(__file__).parents[1] / "fixtures" / "metrics_1.json"  # of a published run


def old() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(SCHEMA_1.read_text(encoding="utf-8"))
    return value


def test_what_is_written_is_schema_2_and_is_read_again(tmp_path: Path) -> None:
    record = RunRecord.read(make_run(tmp_path / "run") / "metrics.json")
    record.write(tmp_path / "again.json")
    assert RunRecord.read(tmp_path / "again.json") == record
    value = json.loads((tmp_path / "again.json").read_text())
    assert value == record.mapping()
    assert value["schema_version"] == 2
    assert value["files"]["adapter"]["acceptance"]["verdict"] == "passed"
    assert {key: file["file"] for key, file in value["files"].items()} == {
        "vector": "remove.gguf", "adapter": "remove-adapter.gguf",
    }  # fmt: skip
    # What no run measures yet is there, and null.
    assert value["judge"]["second"] is None


def test_a_key_of_an_earlier_version_is_ignored(tmp_path: Path) -> None:
    path = make_run(tmp_path) / "metrics.json"
    record, value = RunRecord.read(path), json.loads(path.read_text(encoding="utf-8"))
    value["files"]["adapter"]["other_files"] = {}
    path.write_text(json.dumps(value), encoding="utf-8")
    assert RunRecord.read(path) == record


def test_schema_1_is_read_with_one_notice_and_nothing_is_lost(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(SCHEMA_1, tmp_path))  # another test may have read the file itself before
    with caplog.at_level(logging.WARNING):
        record = RunRecord.read(copy)
        RunRecord.read(copy)
    assert [message.count("schema 1") for message in caplog.messages] == [1]
    value = old()
    words = {"remove.gguf": "control vector", "remove-adapter.gguf": "gated adapter"}
    assert list(record.files) == ["vector", "adapter"]
    for before, file in ((value, record.files["vector"]), (value["adapter"], record.files["adapter"])):
        told = before.get("vector", before)
        for name in ("file", "sha256", "ridge", "strength", "scale"):
            assert getattr(file, name) == told[name]
        assert (file.benign_target, file.word) == (told["margin"], words[file.file])
        assert file.estimator == {"gate": "gated-adapter"}.get(told["estimator"], told["estimator"])
        assert list(file.layers) == told["layers"]
        for kind, found in file.sets.items():
            figures = before["sets"][kind]
            assert (found.kind, found.n) == (kind, figures["n"] + figures["unjudged"])
            assert (found.transitions, found.opened, found.explicit_steered) == (None, None, None)
            for side, outcomes in (
                ("baseline", found.outcomes_unsteered), ("steered", found.outcomes_steered),
            ):  # fmt: skip
                assert outcomes.refuses + outcomes.fails == figures[f"refused_{side}"]
                assert outcomes.complies == figures["n"] - figures[f"refused_{side}"]
                categories = figures[f"categories_{side}"]
                assert outcomes.explicit == categories.get("direct", 0)
                assert outcomes.fails == categories.get("nonsense", 0) + categories.get("empty", 0)
        assert file.benign_drift == before["benign_drift"]
        assert file.top1_agreement == before["top1_agreement_benign"]
        assert file.benign_drift_ci95 == tuple(before["spread95"]["benign_drift"])
        assert file.passed == before["gate"]["passed"]
        assert list(file.acceptance.reasons) == before["gate"]["reasons"]
        assert list(file.notes) == before["notes"]
        assert file.effect_check.model_dump(mode="json") == before["proof"]
        speed = {"baseline": file.tokens_per_second.unsteered, "steered": file.tokens_per_second.steered}
        assert speed == before["tokens_per_second"]
        assert file.llama_cpp.model_dump(include={"command", "build"}) == before["llama_cpp"]
    mapping = record.mapping()
    same = ["date", "tool", "effect", "model", "test_tokens", "subset", "seed", "seconds"]
    assert {name: mapping[name] for name in same} == {name: value[name] for name in same}
    assert record.judge.name == value["judge"]


def test_what_is_read_as_schema_1_is_written_as_schema_2(tmp_path: Path) -> None:
    record = RunRecord.read(SCHEMA_1)
    record.write(tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text())["schema_version"] == 2
    assert RunRecord.read(tmp_path / "metrics.json") == record


def test_a_report_is_made_of_schema_1_as_of_schema_2(tmp_path: Path) -> None:
    texts: list[list[str]] = []
    for value in (old(), RunRecord.read(SCHEMA_1).mapping()):
        folder = make_run(tmp_path / str(len(texts)), metrics=lambda _, value=value: value)
        texts.append([write(folder).read_text(encoding="utf-8") for write in (write_report, write_card)])
    assert texts[0] == texts[1]
    assert "**Use the gated adapter.**" in texts[0][1]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"schema_version": 3}, "schema_version 3"),
        ([], "schema_version None"),
        ({}, "schema 1"),
        ({"vector": {}, "gate": None}, "schema 1"),
        ({"schema_version": 2, "date": "2026-11-24"}, "effect"),
    ],
)
def test_anything_else_is_refused(value: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=said):
        RunRecord.read(path)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.json"):
        RunRecord.read(tmp_path / "metrics.json")
