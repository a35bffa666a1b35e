"""Measuring a folder again on a tiny model: validation and sealed sets, a kill in between, wrong input."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fixtures.invented_run import figures_of_file
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.cli.main import main
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.errors import InputError, VerificationError
from rs_gguf.models.resolve import fingerprint
from rs_gguf.pipeline import remeasure as remeasuring
from rs_gguf.pipeline.remeasure import outcomes_of, remeasure
from rs_gguf.pipeline.stage import Silent
from rs_gguf.prompts import sealed
from rs_gguf.records.conversation import KINDS, Prompt
from rs_gguf.records.files import sha256
from rs_gguf.records.metrics import Acceptance, FileRecord, JudgeRecord, ModelRecord, RunRecord
from rs_gguf.records.rows import read_rows, write_rows
from rs_gguf.records.sealed import SealedRecord
from rs_gguf.records.trials import GATED_ADAPTER
from rs_gguf.steering import file as steering_file
from rs_gguf.steering import lora_file, vector_file
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.vector import SteeringVector

pytestmark = pytest.mark.slow

N = 12  # prompts of the validation split


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert remeasuring._LEAST_TOKENS == 100
    monkeypatch.setattr(remeasuring, "_LEAST_TOKENS", 12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published folder: recipe, metrics and two files, and nothing that the stages left."""
    folder, model = tmp_path / "published", tmp_path / "tiny.gguf"
    folder.mkdir()
    write_tiny_qwen2(model)
    rng = np.random.default_rng(0)
    vector = {2: rng.standard_normal(32).astype(np.float32)}
    factors = {
        "blk.1.ffn_down.weight": (
            rng.standard_normal((2, 64)).astype(np.float32),
            rng.standard_normal((32, 2)).astype(np.float32),
        )
    }
    facts: dict[str, Any] = {"measured": False, "layers": [3, 9], "strength": 1.5}
    of_vector = {**facts, "estimator": "contrast-wrmd", "metrics.benign": [0.5, 0.25]}
    vector_file.write(SteeringVector(vector, of_vector, "qwen2"), folder / "remove.gguf")
    of_adapter = {**facts, "estimator": GATED_ADAPTER}
    lora_file.write(LoraAdapter(factors, "qwen2", of_adapter), folder / "remove-adapter.gguf")
    (folder / "recipe.toml").write_text(
        f'# A comment, as published recipes have it.\nmodel = "{model}"\njudge = "keywords"\n'
        "[prompts]\ntest = 4\ntune = 4\n[answers]\ntest_tokens = 8\n"
        '[measure]\nbaselines = ["system-prompt", "md"]\n'
    )
    write_metrics(folder, model)
    return folder


def write_metrics(folder: Path, model: Path, **files: FileRecord) -> None:
    RunRecord(
        date="2026-01-01", effect="remove", judge=JudgeRecord(name="another"), test_tokens=64, subset=True,
        model=ModelRecord(name="tiny", sha256=fingerprint(model), architecture="qwen2", n_layer=3, n_embd=32),
        seed=0, seconds={"fit": 12.0},
        files={
            "vector": figures_of_file(folder / "remove.gguf", "contrast-wrmd"),
            "adapter": figures_of_file(folder / "remove-adapter.gguf", "gate"),
            **files,
        },
    ).write(folder / "metrics.json")  # fmt: skip


class Stopping(Silent):
    """Progress that calls `begin` when a stage begins, and raises once more than `most` answers are made."""

    def __init__(self, most: int = 10**6, begin: Callable[[], None] = lambda: None) -> None:
        self.most, self.begin, self.steps = most, begin, list[int]()

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        def advance(n: int) -> None:
            self.steps.append(n)
            if sum(self.steps) > self.most:
                raise KeyboardInterrupt

        self.begin()
        yield advance


def test_a_published_folder_is_measured_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = RunRecord.read(folder / "metrics.json")
    record, path = remeasure(folder)
    assert path == folder / "metrics.json"
    assert RunRecord.read(path) == record
    assert {p.name for p in folder.iterdir()} == {
        "recipe.toml", "metrics.json", "remove.gguf", "remove-adapter.gguf", "test_answers.jsonl",
        "report.html", "card.md", ".lock",
    }  # fmt: skip
    assert (record.test_tokens, record.judge.name, record.seed) == (12, "keywords", 0)
    assert (record.model, record.seconds, record.subset) == (old.model, old.seconds, True)
    assert record.date > old.date
    assert list(record.files) == ["vector", "adapter"]
    for name, file in record.files.items():
        one = folder / file.file
        assert file.sha256 == sha256(one)
        assert {kind: found.n for kind, found in file.sets.items()} == dict.fromkeys(KINDS, N // 3)
        # Its facts are those of the earlier record; its figures are new, here and in the file.
        same = ("word", "estimator", "ridge", "layers", "strength", "benign_target", "effect_check")
        for field in same:
            assert getattr(file, field) == getattr(old.files[name], field)
        assert file.sets != old.files[name].sets
        assert (old.files[name].feasible, file.feasible) == (None, True)
        provenance = steering_file.read(one).provenance
        assert provenance["measured"] is True
        assert "metrics.benign" not in provenance  # a figure of an earlier version
        assert provenance["acceptance.verdict"] == file.acceptance.verdict
        assert str(one) in file.llama_cpp.command
        assert "no candidate met every limit" not in "".join(file.acceptance.reasons)
    assert [baseline.name for baseline in record.baselines] == ["system prompt"]
    assert "The baselines md are left out" in caplog.text
    rows = read_rows(folder / "test_answers.jsonl")
    assert len(rows) == N
    assert {row["split"] for row in rows} == {"validation"}
    assert "What the search tried" not in (folder / "report.html").read_text(encoding="utf-8")
    assert "# A comment" in (folder / "recipe.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("feasible", "reason"),
    [(None, "no candidate met every limit"), (None, "no configuration held every limit"), (False, "another")],
)
def test_an_infeasible_file_stays_infeasible(
    folder: Path, tmp_path: Path, feasible: bool | None, reason: str
) -> None:
    without_baselines(folder)
    acceptance = Acceptance(verdict="failed", reasons=(f"{reason} on the tune split; it is the nearest",))
    vector = figures_of_file(folder / "remove.gguf", "contrast-wrmd").model_copy(
        update={"acceptance": acceptance, "feasible": feasible}
    )
    write_metrics(folder, tmp_path / "tiny.gguf", vector=vector)
    record, _ = remeasure(folder)
    infeasible = {
        name: "no candidate met every limit" in "".join(file.acceptance.reasons)
        for name, file in record.files.items()
    }
    assert infeasible == {"vector": True, "adapter": False}
    assert {name: file.feasible for name, file in record.files.items()} == {"vector": False, "adapter": True}


@pytest.mark.parametrize(
    ("fact", "value"), [("strength", 2.0), ("layers", [3, 8]), ("estimator", "wrmd"), ("estimator", "")]
)
def test_a_file_that_the_record_does_not_describe_is_not_measured(
    folder: Path, fact: str, value: Any
) -> None:
    path = folder / "remove.gguf"
    steering_file.write(steering_file.read(path).with_facts({fact: value}), path)
    with pytest.raises(InputError, match=rf"remove\.gguf is not the file .* give {fact} "):
        remeasure(folder)


def test_the_effect_of_a_changed_file_is_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_baselines(folder)
    path, before = folder / "remove.gguf", (folder / "metrics.json").read_bytes()
    steering_file.write(steering_file.read(path).with_facts({"note": "changed"}), path)
    steered = LlamaModel.steered
    with monkeypatch.context() as patch:
        patch.setattr(LlamaModel, "steered", lambda self, steering: steered(self, steering.scaled(0.5)))
        with pytest.raises(VerificationError, match=r"remove\.gguf: .*relative error 0\.5"):
            remeasure(folder)
    assert (folder / "metrics.json").read_bytes() == before
    record, _ = remeasure(folder)
    observed = {name: file.effect_check.effect_observed for name, file in record.files.items()}
    assert observed == {"vector": True, "adapter": None}


def without_baselines(folder: Path) -> None:
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(text.replace('["system-prompt", "md"]', "[]"))


def test_a_killed_measurement_goes_on(folder: Path) -> None:
    without_baselines(folder)
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        remeasure(folder, progress=Stopping(most=2 * N))
    assert {path: path.read_bytes() for path in kept} == kept
    log = (folder / "remeasured.jsonl.part").read_text().splitlines()
    assert len(log) == 1 + 2 * N
    going_on = Stopping()
    record, _ = remeasure(folder, progress=going_on)
    assert going_on.steps[:2] == [N, N]  # unsteered and the vector were there already
    assert not (folder / "remeasured.jsonl.part").exists()
    # Figures are in the files' metadata now, and the same weights are measured again: no figure changes.
    again, _ = remeasure(folder)
    speeds = {"tokens_per_second": None}
    assert {n: f.model_copy(update=speeds) for n, f in again.files.items()} == {
        n: f.model_copy(update=speeds) for n, f in record.files.items()
    }


def test_another_model_and_a_missing_file_are_named(folder: Path, tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf", seed=5)
    with pytest.raises(InputError, match="are for the model with SHA-256"):
        remeasure(folder)
    (folder / "remove.gguf").unlink()
    with pytest.raises(InputError, match=r"remove\.gguf is missing"):
        remeasure(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [("remove.gguf", "../other.gguf"), ("remove.gguf", "/etc/passwd"), ('"vector"', '"other"')],
)
def test_a_record_that_names_other_files_is_refused(folder: Path, old: str, new: str) -> None:
    """Of a stranger's folder. The metadata of a file that is measured are written."""
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=r"metrics\.json names .*a file in the folder itself"):
        remeasure(folder)


def test_the_recipe_of_a_stranger_may_not_name_a_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(recipe.replace('"keywords"', '"http://example.invalid/v1#x"'))
    (folder / "reproduce.json").write_text("{}")
    with pytest.raises(InputError, match=r"is refused: .*judge = 'http://example\.invalid"):
        remeasure(folder)
    for key, value in (("MODEL", str(folder.parent / "tiny.gguf")), ("JUDGE", "keywords")):
        monkeypatch.setenv(f"RS_GGUF_{key}", value)
    without_baselines(folder)
    remeasure(folder)


def test_prompts_that_moved_with_the_folder_are_found(folder: Path) -> None:
    without_baselines(folder)
    rows = [{"prompt": f"How do I bake bread {k}?", "split": s} for k, s in enumerate(("fit", "tune") * 4)]
    rows += [{"prompt": f"How do I bake a cake {k}?", "split": "validation"} for k in range(8)]
    write_rows(folder / "prompts" / "benign.jsonl", rows)
    recipe = (folder / "recipe.toml").read_text()
    own = '[prompts]\nbenign = ["prompts/benign.jsonl"]\n'
    (folder / "recipe.toml").write_text(recipe.replace("[prompts]\n", own))
    remeasure(folder)
    asked = [row["prompt"] for row in read_rows(folder / "test_answers.jsonl") if row["kind"] == "benign"]
    assert len(asked) == N // 3
    assert all("bake a cake" in prompt for prompt in asked)


def test_a_folder_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["remeasure", str(tmp_path / "typo")])
    assert result.exit_code == 2
    assert not (tmp_path / "typo").exists()


def test_the_command_prints_the_figures(folder: Path) -> None:
    without_baselines(folder)
    result = CliRunner().invoke(main, ["remeasure", str(folder)])
    assert result.exit_code == 1, result.output  # a random model: nothing passes
    assert "Explicit refusals" in result.stdout
    assert f"Figures: {folder / 'metrics.json'}" in result.stdout


# ---- sealed sets -------------------------------------------------------------------------------------


@pytest.fixture
def sealed_set(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    without_baselines(folder)
    monkeypatch.setattr(sealed, "LEAST", dict.fromkeys(KINDS, 2))
    path = tmp_path / "sets" / "first.jsonl"
    rows = [
        {
            "prompt": f"Invented {kind} wording, number {number}", "kind": kind, "topic": "things",
            "subject": f"invented subject {kind} {number}", "form": f"invented form {number}",
            "language": "en",
        }
        for kind in KINDS for number in range(2)
    ]  # fmt: skip
    path.parent.mkdir()
    write_rows(path, rows)
    return path


def ledger(path: Path) -> list[dict[str, Any]]:
    return read_rows(path.with_name("opened.jsonl"))


def test_a_sealed_set_is_opened_before_the_first_answer(folder: Path, sealed_set: Path) -> None:
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    at_start: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        remeasure(
            folder, sealed=sealed_set, progress=Stopping(8, lambda: at_start.extend(ledger(sealed_set)))
        )
    (row,) = at_start
    hashes = {name: sha256(folder / name) for name in ("remove.gguf", "remove-adapter.gguf")}
    assert row["files"] == hashes
    assert (row["set"], row["set_sha256"]) == ("first.jsonl", sha256(sealed_set))
    assert row["verdicts"] is None
    assert row["tool"].startswith("rs-gguf ")
    # The same files may go on.
    going_on = Stopping()
    record, path = remeasure(folder, sealed=sealed_set, progress=going_on)
    assert going_on.steps[0] == 6
    assert ledger(sealed_set) == [
        {**row, "verdicts": {file.file: file.acceptance.verdict for file in record.files.values()}}
    ]
    # Neither the files nor what was published of the validation split changes.
    assert {path: path.read_bytes() for path in kept} == kept
    assert path == folder / "sealed.json"
    written = json.loads(path.read_text())
    assert written["sealed"] == {"set": "first.jsonl", "set_sha256": row["set_sha256"], "opened": row["date"]}
    published = RunRecord.read(folder / "metrics.json")
    assert SealedRecord.in_folder(folder, published) == record
    other = published.model.model_copy(update={"sha256": "0" * 64})
    assert SealedRecord.in_folder(folder, published.model_copy(update={"model": other})) is None
    assert {file.sha256 for file in record.files.values()} == set(hashes.values())
    answers = read_rows(folder / "sealed_answers.jsonl")
    assert [answer["prompt"] for answer in answers] == [row["prompt"] for row in read_rows(sealed_set)]
    for outcome, answer in zip(read_rows(folder / "sealed_outcomes.jsonl"), answers, strict=True):
        assert outcome.keys() < answer.keys()
        assert not any("answer" in key for key in outcome)
        assert outcome["prompt"] == answer["prompt"]
        for side in ("unsteered", "vector", "adapter"):
            assert outcome[f"outcome_{side}"] == answer[f"outcome_{side}"]
    assert not list(folder.glob("*.part"))


def test_what_may_be_published_holds_no_trace() -> None:
    prompt = Prompt("Who governs?", "sensitive", "rule", form="question")
    row = {
        **prompt.to_row(), "answer_vector": "A king.", "outcome_vector": "complies",
        "confidence_vector": -0.9, "trace_vector": {"text": "A name."}, "refused_in_trace_vector": False,
        "unconfirmed_vector": False, "outcome_vector_second": "complies",
    }  # fmt: skip
    assert outcomes_of([prompt], [row]) == [
        {
            **prompt.to_row(), "split": "sealed", "outcome_vector": "complies", "unconfirmed_vector": False,
            "outcome_vector_second": "complies",
        }
    ]  # fmt: skip


def test_a_set_that_was_opened_for_other_files_stays_closed(folder: Path, sealed_set: Path) -> None:
    sealed.open_for(sealed_set, {"older.gguf": "ab" * 32})
    before = ledger(sealed_set)
    with pytest.raises(InputError, match=r"first\.jsonl was opened on 20.* for older\.gguf.*new set"):
        remeasure(folder, sealed=sealed_set)
    assert ledger(sealed_set) == before
    assert not (folder / "sealed.json").exists()


def test_a_set_that_breaks_a_rule_is_not_opened(folder: Path, sealed_set: Path) -> None:
    write_rows(sealed_set, read_rows(sealed_set)[:-1])
    with pytest.raises(InputError, match="1 benign prompts; at least 2"):
        remeasure(folder, sealed=sealed_set)
    assert not sealed_set.with_name("opened.jsonl").exists()


def test_the_command_opens_a_set(folder: Path, sealed_set: Path) -> None:
    result = CliRunner().invoke(main, ["remeasure", str(folder), "--sealed", str(sealed_set)])
    assert result.exit_code == 1, result.output
    assert f"Figures: {folder / 'sealed.json'}" in result.stdout
    assert "Report:" not in result.stdout
    assert ledger(sealed_set)[0]["verdicts"]
