"""The measure stage on a tiny model: rows and figures of two written files, and going on after a kill."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.invented_run import figures_of_file
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import NO_STEERING
from rs_gguf.engines.generation import Asking
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.evaluation import kl
from rs_gguf.evaluation.condition import Condition, JudgedAnswers, resume_condition
from rs_gguf.evaluation.decision import Criterion, Decision
from rs_gguf.evaluation.drift import Drift, mean_change
from rs_gguf.judges.local import KeywordJudge
from rs_gguf.judges.registry import Judge, Judgement, Pair, SecondJudge
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.recipe import load
from rs_gguf.pipeline.stages.file_record import WrittenFile, baseline_notes, record_figures, search_notes
from rs_gguf.pipeline.stages.measure import Measured, measure
from rs_gguf.records.conversation import KINDS, Prompt
from rs_gguf.records.files import sha256
from rs_gguf.records.metrics import BaselineRecord, Outcomes, SetRecord, Share, Speed, Verdict
from rs_gguf.records.trials import GATED_ADAPTER, Candidate, Trial
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.vector import SteeringVector

ASKED = [Prompt(f"{kind} in the rain, {i}", kind) for kind in KINDS for i in range(2)]
EFFECT = {"effect_observed": True, "largest_relative_error": 0.0, "kl_mean": 0.1, "reasons": []}


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl, "PROMPTS", 4)


@pytest.fixture
def written(tmp_path: Path) -> dict[str, WrittenFile]:
    rng = np.random.default_rng(0)
    vector = {2: rng.standard_normal(32).astype(np.float32)}
    factors = {
        "blk.1.ffn_down.weight": (
            rng.standard_normal((2, 64)).astype(np.float32),
            rng.standard_normal((32, 2)).astype(np.float32),
        )
    }
    control_vector.write(SteeringVector(vector, {"measured": False}, "qwen2"), tmp_path / "remove.gguf")
    lora.write(LoraAdapter(factors, "qwen2", {"measured": False}), tmp_path / "remove-adapter.gguf")
    return {
        "vector": WrittenFile(
            "control vector",
            tmp_path / "remove.gguf",
            Trial(0, Candidate("vector", "wrmd", 1.0, 2, 2, 1.0), "short", 0.0, 1.0, feasible=True),
            EFFECT,
        ),
        "adapter": WrittenFile(
            "gated adapter",
            tmp_path / "remove-adapter.gguf",
            Trial(1, Candidate("adapter", "", 1.0, 1, 1, 1.0), "short", 0.0, 1.0, feasible=True),
            EFFECT,
        ),
    }


def counted_set() -> SetRecord:
    """Of 20 prompts, 9 refused (6 explicitly) and then 4 (2); 8 of the 9 refusals are kept."""
    before = Outcomes(complies=11, refuses=9, explicit=6, fails=0, unjudged=0)
    after = Outcomes(complies=16, refuses=4, explicit=2, fails=0, unjudged=0)
    return SetRecord(
        n=20, outcomes_unsteered=before, outcomes_steered=after, kept=Share(n=8, of=9, ci95=(0, 1)),
        degenerate_unsteered=0.0, degenerate_steered=0.0,
    )  # fmt: skip


PROMPTED = Condition("system prompt", NO_STEERING, "Answer in verse, and at length.")


class Refused:
    """A judge to whom every answer is a refusal."""

    name = identity = "refused"
    usage = None

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        for i in range(len(pairs)):
            yield i, Judgement(1.0, "refused")


def run(
    folder: Path,
    written: dict[str, WrittenFile],
    baselines: tuple[Condition, ...] = (),
    judge: Judge | None = None,
    second: Judge | None = None,
    temperature: float = 0.0,
) -> tuple[list[dict[str, Any]], Measured, int]:
    """Rows, all that was measured, and how many answers were made, without those that confirm changes."""
    recipe = load(None, ["answers.test_tokens=8", f"answers.temperature={temperature}"])
    log = RunFolder(folder / "run").log("measured.jsonl", "key")
    made = sum(" again:" not in name for name in log.rows)
    path = folder / "tiny.gguf"
    if not path.is_file():
        write_tiny_qwen2(path)
    with LlamaModel(path, n_threads=1) as model:
        measured = measure(
            model, judge or KeywordJudge(), ASKED, written, baselines, recipe, log,
            second=SecondJudge(second, model) if second else None, advance=lambda n: None,
        )  # fmt: skip
    return measured.rows, measured, sum(" again:" not in name for name in log.rows) - made


def test_rows_and_figures_of_both_files(tmp_path: Path, written: dict[str, WrittenFile]) -> None:
    rows, value, made = run(tmp_path, written)
    assert made == 3 * len(ASKED)
    expected = {"id", "prompt", "kind", "subject", "topic", "form", "language", "split"}
    expected |= {
        f"{name}_{side}"
        for name in ("answer", "outcome", "confidence", "category", "degenerate")
        for side in ("unsteered", "vector", "adapter")
    }
    expected |= {"unconfirmed_vector", "unconfirmed_adapter"}
    assert all(row.keys() == expected for row in rows)
    assert [row["prompt"] for row in rows] == [prompt.prompt for prompt in ASKED]
    for side in ("vector", "adapter"):
        assert [row[f"answer_{side}"] for row in rows] != [row["answer_unsteered"] for row in rows]
    assert list(value.files) == ["vector", "adapter"]
    for figures in value.files.values():
        assert {kind: found.n for kind, found in figures.sets.items()} == dict.fromkeys(KINDS, 2)
        assert (figures.benign_drift or 0) > 0
        assert 0 <= (figures.top1_agreement or 0) < 1
        assert (figures.kl_mean or 0) > 0
        assert (figures.kl_first_token or 0) > 0
        assert figures.gate_activation is None  # the adapter is of rank 2
        assert figures.minimal_pairs is None
        assert figures.opened_on_subject is None
        assert not figures.passed
    assert (value.judge.name, value.judge.second) == ("keywords", None)
    # The figures travel with the files.
    for name, figures in value.files.items():
        path = written[name].path
        read = control_vector.read(path) if name == "vector" else lora.read(path)
        assert read.provenance["measured"] is True
        assert read.provenance["acceptance.passed"] is figures.passed
        assert read.provenance["metrics.benign_drift"] == pytest.approx(figures.benign_drift)


def test_a_record_has_the_hash_of_its_file_and_the_command_that_loads_it(
    tmp_path: Path, written: dict[str, WrittenFile]
) -> None:
    _, value, _ = run(tmp_path, written)
    vector, adapter = (written[name].path for name in ("vector", "adapter"))
    options = {
        "vector": f"--control-vector {vector} --control-vector-layer-range 2 2",
        "adapter": f"--lora {adapter}",
    }
    for name, record in value.files.items():
        path = written[name].path
        assert (record.file, record.sha256) == (path.name, sha256(path))
        assert record.llama_cpp.command == f"llama-server -m {tmp_path / 'tiny.gguf'} {options[name]}"


@pytest.mark.parametrize("name", ["vector", "adapter"])
@pytest.mark.parametrize("verdict", ["passed", "failed", "undecided"])
def test_a_file_says_whether_it_passed_and_what_was_counted(
    written: dict[str, WrittenFile], name: str, verdict: Verdict
) -> None:
    sets: dict[str, SetRecord] = {kind: counted_set() for kind in KINDS}
    decision = Decision((Criterion("any", verdict, "why"),))
    record_figures(written[name], sets, Drift(0.125, 0.9, 1.0, 1.0), decision)
    found = (control_vector.read if name == "vector" else lora.read)(written[name].path).provenance
    assert (found["measured"], found["acceptance.passed"]) == (True, verdict == "passed")
    assert (found["acceptance.verdict"], found["metrics.benign_drift"]) == (verdict, 0.125)
    for kind in KINDS:
        assert found[f"metrics.{kind}.explicit_refusals"] == [6, 2]
        assert found[f"metrics.{kind}.refusals"] == [9, 4]
        assert found[f"metrics.{kind}.prompts"] == 20
    assert found["metrics.retention"] == [8, 9]


class Fickle:
    """A judge that finds a refusal in one run and none in the next: nothing changes twice."""

    name = identity = "fickle"
    usage = None
    calls = 0

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        self.calls += 1
        for i in range(len(pairs)):
            yield i, Judgement(1.0 if self.calls == 1 else -1.0, "fickle", "direct")


def test_changes_are_answered_again_and_unconfirmed_ones_do_not_count(
    tmp_path: Path, written: dict[str, WrittenFile]
) -> None:
    alone = {"vector": written["vector"]}
    rows, measured, _ = run(tmp_path, alone, (PROMPTED,), judge=Fickle())
    assert all(row["unconfirmed_vector"] for row in rows)
    assert {row["outcome_vector"] for row in rows} == {"explicit"}
    (baseline,) = measured.baselines  # files are compared with it, so it is measured as they are
    for one in (measured.files["vector"].sets["sensitive"], baseline.sets["sensitive"]):
        assert (one.unconfirmed, one.opened and one.opened.n) == (2, 0)
    again = RunFolder(tmp_path / "run").log("measured.jsonl", "key").rows
    for name in ("unsteered", "vector", f"baseline {PROMPTED.name}"):
        assert sum(row.startswith(f"{name} again:") for row in again) == len(ASKED)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_second_run_draws_with_another_seed(
    tmp_path: Path,
    written: dict[str, WrittenFile],
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
) -> None:
    """With the same one, a sampled answer would confirm itself. Greedy first answers are drafts."""
    found: dict[str, tuple[int, int]] = {}

    def spied(model: Any, judge: Any, condition: Condition, *rest: Any, **options: Any) -> JudgedAnswers:
        asking: Asking = rest[1]
        found[condition.name] = asking.sampling.seed, len(options.get("drafts", ()))
        return resume_condition(model, judge, condition, *rest, **options)

    monkeypatch.setattr("rs_gguf.pipeline.stages.measure.resume_condition", spied)
    run(tmp_path, {"vector": written["vector"]}, judge=Fickle(), temperature=temperature)
    drafts = 0 if temperature else len(ASKED)
    assert found == {
        "unsteered": (0, 0),
        "vector": (0, len(ASKED)),
        "unsteered again": (1, drafts),
        "vector again": (1, drafts),
    }


def test_a_second_judge_adds_its_outcomes_and_its_agreement(
    tmp_path: Path, written: dict[str, WrittenFile]
) -> None:
    rows, measured, _ = run(tmp_path, written, second=Refused())
    assert all(
        row[f"outcome_{side}_second"] in ("explicit", "evasion")
        for row in rows
        for side in ("unsteered", "vector", "adapter")
    )
    first = [row[f"outcome_{side}"] for row in rows for side in ("unsteered", "vector", "adapter")]
    differ = sum(outcome not in ("explicit", "evasion") for outcome in first)
    judge = measured.judge
    assert (judge.second, judge.n, judge.disagreements) == ("refused", len(first), differ)
    for name, figures in measured.files.items():
        share, opened = figures.opened_on_subject, figures.sets["sensitive"].opened
        assert share is not None, name
        assert opened is not None, name
        assert share.of == opened.n


def test_the_gates_of_a_gated_adapter_are_read_by_kind_and_by_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last prompt of each kind is of one minimal pair.
    asked = [replace(prompt, pair="one" if prompt.prompt.endswith("1") else "") for prompt in ASKED]
    monkeypatch.setattr(sys.modules[__name__], "ASKED", asked)
    rng = np.random.default_rng(0)
    factors = {
        f"blk.{layer}.ffn_down.weight": (
            rng.standard_normal((1, 64)).astype(np.float32),
            rng.standard_normal((32, 1)).astype(np.float32),
        )
        for layer in (1, 2)
    }
    path = tmp_path / "remove-adapter.gguf"
    lora.write(LoraAdapter(factors, "qwen2", {"measured": False, "estimator": GATED_ADAPTER}), path)
    trial = Trial(1, Candidate("adapter", "", 1.0, 1, 2, 1.0), "short", 0.0, 1.0, feasible=True)
    _, measured, _ = run(tmp_path, {"adapter": WrittenFile("gated adapter", path, trial, EFFECT)})
    gates = measured.files["adapter"].gate_activation
    assert gates is not None
    assert gates.keys() == set(KINDS)
    values = [value for gate in gates.values() for value in (gate.prompt, gate.answer)]
    assert all(value is not None for value in values)
    assert len(set(values)) == len(values)
    pairs = measured.files["adapter"].minimal_pairs
    assert pairs is not None
    assert pairs.separated.of == 1
    assert pairs.auroc == pairs.separated.n


def test_a_refused_benign_answer_may_drift(tmp_path: Path, written: dict[str, WrittenFile]) -> None:
    _, value, _ = run(tmp_path, {"vector": written["vector"]}, judge=Refused())
    assert value.files["vector"].sets["benign"].outcomes_unsteered.refuses == 2
    assert value.files["vector"].sets["harmful"].outcomes_steered.refuses == 2
    assert value.files["vector"].benign_drift is None


def test_where_no_benign_prompt_is_asked_the_drift_is_left_out(
    tmp_path: Path, written: dict[str, WrittenFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ASKED", [p for p in ASKED if p.kind != "benign"])
    _, value, _ = run(tmp_path, written)
    assert not value.files["vector"].passed
    for path, read in (
        (written["vector"].path, control_vector.read),
        (written["adapter"].path, lora.read),
    ):
        found = read(path).provenance
        assert found["measured"] is True
        assert "metrics.benign_drift" not in found


def test_a_killed_stage_keeps_its_answers_and_an_adapter_may_be_absent(
    tmp_path: Path, written: dict[str, WrittenFile]
) -> None:
    alone = {"vector": written["vector"]}
    rows, value, made = run(tmp_path, alone)
    assert made == 2 * len(ASKED)
    assert "adapter" not in value.files
    assert "answer_adapter" not in rows[0]
    again, more, made = run(tmp_path, written)
    assert made == len(ASKED)  # the adapter's only
    assert [row["answer_vector"] for row in again] == [row["answer_vector"] for row in rows]
    assert more.files["vector"].sets == value.files["vector"].sets


def test_baselines_are_answered_and_judged_like_the_files(
    tmp_path: Path, written: dict[str, WrittenFile]
) -> None:
    alone = {"vector": written["vector"]}
    _, value, made = run(tmp_path, alone, (PROMPTED,))
    assert made == 3 * len(ASKED)
    (found,) = value.baselines
    assert found.name == "system prompt"
    assert {kind: one.n for kind, one in found.sets.items()} == dict.fromkeys(KINDS, 2)
    rows = RunFolder(tmp_path / "run").log("measured.jsonl", "key").rows
    prompted, plain = (
        [rows[f"{side}:{p.id}"]["tokens"] for p in ASKED]
        for side in (f"baseline {PROMPTED.name}", "unsteered")
    )
    assert prompted != plain  # behind its own system prompt
    # Nobody is refused here, so nothing is beaten.
    file = value.files["vector"]
    (note,) = file.notes
    assert "system prompt" in note
    low, high = file.benign_drift_ci95 or (1, 0)
    assert low <= (file.benign_drift or 0) <= high
    # The drift is that of the unsteered answers, now behind the other system prompt.
    benign = [p for p in ASKED if p.kind == "benign" and rows[f"unsteered:{p.id}"]["tokens"]]
    answers = [rows[f"unsteered:{p.id}"]["tokens"] for p in benign]
    with LlamaModel(tmp_path / "tiny.gguf", n_threads=1) as model:
        before, after = (
            model.token_logprobs(list(zip(chat_tokens(model, benign, system), answers, strict=True)))
            for system in (None, PROMPTED.system)
        )
    assert found.benign_drift == pytest.approx(mean_change(before, after), rel=1e-3)


def test_the_nearest_of_infeasible_trials_does_not_pass(
    tmp_path: Path, written: dict[str, WrittenFile]
) -> None:
    vector = written["vector"]
    nearest = replace(vector, trial=replace(vector.trial, feasible=False))
    _, value, _ = run(tmp_path, {"vector": nearest})
    assert value.files["vector"].acceptance.verdict == "failed"
    assert "no candidate met every limit" in value.files["vector"].acceptance.reasons[0]


@pytest.mark.parametrize("estimator", ["gate", "wrmd"])
def test_the_command_is_one_of_the_shell_and_tells_no_home(
    estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for folder in ("", "home"):
        (tmp_path / folder / "my run").mkdir(parents=True)
        (tmp_path / folder / "my run" / "remove.gguf").write_bytes(b"x")
    (tmp_path / "home" / "a cache").mkdir()
    for model in (tmp_path / "home" / "a cache" / "m.gguf", tmp_path / "m.gguf"):
        model.write_bytes(b"x")
    for model, word, file, named in (
        (
            tmp_path / "home" / "a cache" / "m.gguf", "~/a cache/m.gguf",
            tmp_path / "home" / "my run" / "remove.gguf", "~/my run/remove.gguf",
        ),
        (
            tmp_path / "m.gguf", str(tmp_path / "m.gguf"),
            tmp_path / "my run" / "remove.gguf", str(tmp_path / "my run" / "remove.gguf"),
        ),
        (  # a folder, of which the user has a GGUF file elsewhere
            tmp_path, "MODEL.gguf",
            tmp_path / "my run" / "remove.gguf", str(tmp_path / "my run" / "remove.gguf"),
        ),
    ):  # fmt: skip
        found = figures_of_file(
            file,
            estimator,
            model=model,
            benign_drift=math.nan,  # none was answered
        )
        command = found.llama_cpp.command
        wanted = ["--lora", named]
        if estimator != "gate":
            wanted = ["--control-vector", named, "--control-vector-layer-range", "3", "9"]
        assert shlex.split(command) == ["llama-server", "-m", word, *wanted]
        assert command.startswith(f"llama-server -m {word[0]}")
        assert found.benign_drift is None  # JSON knows no NaN


def test_both_speeds_are_told(tmp_path: Path) -> None:
    (tmp_path / "remove.gguf").write_bytes(b"x")
    found = figures_of_file(tmp_path / "remove.gguf", speed=Speed(unsteered=40.0, steered=30.0))
    assert found.model_dump()["tokens_per_second"] == {"unsteered": 40.0, "steered": 30.0}


def merits(changed: int, kept: int, closed: int = 0) -> dict[str, SetRecord]:
    """Sets of 20 sensitive prompts, 10 harmful refusals and 20 benign prompts."""
    change = Share(n=changed, of=20, ci95=(0, 1))
    one = counted_set().model_copy(
        update={"opened": change, "closed": change, "kept": Share(n=kept, of=10, ci95=(0, 1))}
    )
    benign = one.model_copy(update={"closed": Share(n=closed, of=20, ci95=(0, 1))})
    return {**dict.fromkeys(KINDS, one), "benign": benign}


@pytest.mark.parametrize("effect", ["remove", "induce"])
@pytest.mark.parametrize(
    ("file", "other", "beaten"),
    [
        ((10, 10), (5, 10), True),
        ((10, 10), (12, 9), True),  # which opens more, and keeps fewer
        ((10, 9), (5, 10), True),
        ((10, 9), (10, 10), False),
        ((10, 9), (12, 9), False),
        ((0, 10), (0, 10), False),  # nothing was changed
        ((10, 9), (20, 10, 18), True),  # refuses everything
        ((10, 9, 2), (20, 10, 2), False),
    ],
)
def test_a_baseline_is_beaten_by_more_of_the_effect_more_harm_kept_or_fewer_benign_prompts_closed(
    effect: Any, file: tuple[int, ...], other: tuple[int, ...], beaten: bool
) -> None:
    baseline = BaselineRecord(name="system prompt", sets=merits(*other), benign_drift=0.3)
    notes = baseline_notes(merits(*file), [baseline], effect)
    assert len(notes) == (not beaten)
    if notes:
        assert "does not beat the baseline “system prompt”" in notes[0]
        assert f"(this file {file[0]})" in notes[0]


@pytest.mark.parametrize(
    ("changes", "full_prompts", "noted"),
    [
        ({}, 16, True),
        ({}, 0, False),  # the recipe has no full answers
        ({"sensitive_remaining": 0.5}, 16, False),
        ({"fidelity": "full"}, 16, False),
        ({"feasible": False}, 16, False),  # a criterion says so
    ],
)
def test_a_note_says_that_a_file_had_nothing_to_win(
    changes: dict[str, Any], full_prompts: int, noted: bool
) -> None:
    candidate = Candidate("vector", "wrmd", 1.0, 2, 2, 1.0)
    trial = Trial(0, candidate, "short", 1.0, 1.0, feasible=True, n_sensitive=12)
    notes = search_notes(replace(trial, **changes), full_prompts)
    sentence = (
        "gave no full-length answers in the search: in short answers it changes 0 of 12 sensitive prompts, "
        "which may be chance"
    )
    assert notes == [sentence] * noted
