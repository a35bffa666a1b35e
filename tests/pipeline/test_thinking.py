"""Test a whole run and a steering on a tiny model that was trained to think before it answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fixtures import tiny_thinker
from rich.console import Console

from rs_gguf.cli.tables import print_comparison
from rs_gguf.engines.answers import answer_all, chat_tokens
from rs_gguf.engines.engine import NO_STEERING, Steering, read_last
from rs_gguf.engines.generation import Asking
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.evaluation.comparison import compare
from rs_gguf.evaluation.condition import SteeredModel
from rs_gguf.judges.local import KeywordJudge
from rs_gguf.pipeline import recipe
from rs_gguf.pipeline.run import run
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.metrics import RunRecord, SetRecord

pytestmark = pytest.mark.slow

ASKING = Asking(None, 8, trace_tokens=32)


@pytest.fixture(scope="session")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thinker") / "thinker.gguf"
    tiny_thinker.write_tiny_thinker(path)
    return path


def test_it_thinks_answers_and_refuses_as_trained(thinker: Path) -> None:
    asked = [prompt for kind in KINDS for prompt in tiny_thinker.prompts(kind)[::3]]
    with LlamaModel(thinker, n_ctx=2048, n_threads=1) as model:
        answers, _ = answer_all(model, asked, NO_STEERING, ASKING)
    trained = 0
    for prompt, found in zip(asked, answers, strict=True):
        assert found.trace is not None
        if tiny_thinker.endless(prompt):
            trained += found.never_came and len(found.tokens) == 32
        else:
            start = tiny_thinker.SURE if prompt.kind == "benign" else tiny_thinker.SORRY
            trained += found.text.startswith(start) and (found.trace.tokens or 0) > len(tiny_thinker.THOUGHTS)
    assert trained >= 0.9 * len(asked)


def test_a_steering_that_is_too_strong_shows_in_the_traces(thinker: Path) -> None:
    """The direction is that of the decision, at the end of the trace."""
    sensitive = tiny_thinker.prompts("sensitive")[::4]
    answered = [p for p in tiny_thinker.prompts("benign") if not tiny_thinker.endless(p)][::4]
    layer = tiny_thinker.N_LAYER - 1
    with LlamaModel(thinker, n_ctx=2048, n_threads=1) as model:
        thoughts = model.tokenize("".join(tiny_thinker.THOUGHTS), special=False)
        means = []
        for some in (answered, sensitive):
            undecided = [[*tokens, *thoughts] for tokens in chat_tokens(model, some)]
            assert {len(tokens) for tokens in undecided} == {tiny_thinker.DECISION}
            means.append(read_last(model, undecided, [layer])["l_out"][:, 0].mean(axis=0))
        steering = Steering({layer: (3 * (means[0] - means[1])).astype(np.float32)})
        source = SteeredModel(model, steering)
        sets = {"sensitive": sensitive}
        (found,) = compare(source, KeywordJudge(), sets, ASKING, divergence=False, known=["sensitive"])
    one = SetRecord.model_validate(found["sets"]["sensitive"])
    before, after = one.traces_unsteered, one.traces_steered
    assert before is not None
    assert after is not None
    assert (before.n, before.endless, before.loops, before.refusal_phrases) == (24, 0, 0, 24)
    assert (after.n, after.endless, after.loops, after.refusal_phrases) == (24, 24, 24, 0)
    assert after.mean_tokens == 32
    assert one.broken is not None
    assert one.broken.n == one.outcomes_steered.fails == 24
    console = Console(record=True, width=100)
    print_comparison(console, found, 8)
    text = console.export_text()
    assert "thinking traces that loop" in text


def test_a_run_measures_traces(thinker: Path, tmp_path: Path) -> None:
    out, files = tmp_path / "out", []
    for kind in KINDS:
        path = tmp_path / f"{kind}.jsonl"
        rows = [
            {"prompt": prompt.prompt, "subject": prompt.subject, "form": prompt.form}
            for prompt in tiny_thinker.prompts(kind)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(f"prompts.{kind}=['{path}']")
    chosen = recipe.load(
        None,
        [
            *files, f"model={thinker}", "judge=keywords", "prompts.fit=24", "prompts.gate_only=0",
            "prompts.tune=10", "prompts.validation=10", "answers.check=false", "answers.fit_tokens=8",
            "answers.tokens=8", "answers.test_tokens=8", "answers.trace_tokens=32", "tune.logprob_trials=2",
            "tune.finalists=1", "tune.full_prompts=4", "fit.estimators=['md']", "fit.ridges=[1.0]",
            "measure.baselines=[]",
        ],
    )  # fmt: skip
    run(chosen, out)
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    trials = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert all((row["trace_tokens"] is None) == (row["fidelity"] == "logprob") for row in trials)
    assert all(row["trace_tokens"] > 8 for row in trials if row["fidelity"] != "logprob")
    # Every trace is longer than an answer may be, and yet the answers came.
    assert all(row["trace"]["tokens"] > 8 for row in answers)
    assert sum(bool(row["answer"]) for row in answers) > 0.8 * len(answers)
    record = RunRecord.read(out / "metrics.json")
    for file in record.files.values():
        harmful = file.sets["harmful"].traces_unsteered
        assert harmful is not None
        assert (harmful.n, harmful.refusal_phrases) == (10, 10)
        assert 8 < (harmful.mean_tokens or 0) <= 32
    page, card = ((out / name).read_text("utf-8") for name in ("report.html", "card.md"))
    assert "Thinking traces with a phrase of refusal" in page
    assert "- Thinking traces, mean tokens: " in card
