"""The best wording of a system prompt is selected by the criteria of the search, and a killed run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rs_gguf.engines.answers import answer_all
from rs_gguf.engines.engine import NO_STEERING
from rs_gguf.engines.generation import Asking
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.evaluation.acceptance import SafetyRule
from rs_gguf.evaluation.condition import Condition, JudgedAnswers
from rs_gguf.evaluation.decision import Decision
from rs_gguf.judges.registry import Pair
from rs_gguf.records.conversation import KINDS, Answer, Judgement, Prompt
from rs_gguf.records.metrics import Effect
from rs_gguf.records.rows import RowLog
from rs_gguf.search import system_prompts
from rs_gguf.search.unsteered import UnsteeredAnswers

EACH = 8
PROMPTS = [Prompt(f"{kind} in the rain, {k}", kind, split="tune") for kind in KINDS for k in range(EACH)]
WORDINGS = [Condition(name, NO_STEERING, f"Be {name}.") for name in ("rude", "open", "quiet")]
ASKING = Asking(None, 6)


def judged(refused: Sequence[bool]) -> list[Judgement]:
    return [Judgement(1.0 if r else -1.0, "invented", "direct" if r else None) for r in refused]


@pytest.fixture
def unsteered(tiny_model: LlamaModel) -> UnsteeredAnswers:
    """Sensitive prompts but one, and harmful ones, are refused."""
    answers, _ = answer_all(tiny_model, PROMPTS, NO_STEERING, ASKING)
    answers = [Answer(a.tokens, a.text or "text", True, False) for a in answers]
    refused = [p.kind == "harmful" or (p.kind == "sensitive" and i > 0) for i, p in enumerate(PROMPTS)]
    return UnsteeredAnswers(PROMPTS, answers, judged(refused))


def new_log(folder: Path) -> RowLog:
    return RowLog(folder / "log.jsonl", "key", lambda path: None)


def select(
    model: LlamaModel, unsteered: UnsteeredAnswers, log: RowLog, effect: Effect = "remove", **options: Any
) -> Condition:
    rule = SafetyRule(effect, max_benign_drift=options.pop("max_benign_drift", 1e6))
    judge = options.pop("judge", None)
    return system_prompts.select_system_prompt(
        model, judge, unsteered, WORDINGS, ASKING, rule, log, n=EACH, seed=0, **options
    )


def answering(
    monkeypatch: pytest.MonkeyPatch, changed: Mapping[str, Mapping[str, int]], base: UnsteeredAnswers
) -> None:
    """Let a wording change so many verdicts of each kind, and answer as before else."""

    def invented(
        model: Any, judge: Any, condition: Condition, prompts: Sequence[Prompt], *_: Any, **__: Any
    ) -> JudgedAnswers:
        left = dict(changed[condition.name])
        index = {p.id: i for i, p in enumerate(base.prompts)}
        answers, refused = [], []
        for prompt in prompts:
            before = base.judgements[index[prompt.id]].verdict == "refusal"
            flips = left.get(prompt.kind, 0) > 0
            left[prompt.kind] = left.get(prompt.kind, 0) - 1
            answers.append(base.answers[index[prompt.id]])
            refused.append(before != flips)
        return JudgedAnswers(answers, judged(refused))

    monkeypatch.setattr(system_prompts, "resume_condition", invented)


@pytest.mark.parametrize(
    ("changed", "best"),
    [
        # Most opened, within the limits: "rude" opens more and gives up harmful refusals.
        (
            {"rude": {"sensitive": 7, "harmful": 4}, "open": {"sensitive": 5}, "quiet": {"sensitive": 2}},
            "open",
        ),
        # It closes benign prompts.
        (
            {"rude": {"sensitive": 7, "benign": 6}, "open": {"sensitive": 1}, "quiet": {"sensitive": 2}},
            "quiet",
        ),
        # None is within the limits: the one that keeps most, and of equals the one that opens more.
        (
            {
                "rude": {"sensitive": 7, "harmful": 5},
                "open": {"sensitive": 3, "harmful": 4},
                "quiet": {"sensitive": 4, "harmful": 4},
            },
            "quiet",
        ),
    ],
)
def test_the_feasible_wording_that_opens_most_is_selected(
    changed: dict[str, dict[str, int]],
    best: str,
    tiny_model: LlamaModel,
    unsteered: UnsteeredAnswers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answering(monkeypatch, changed, unsteered)
    assert select(tiny_model, unsteered, new_log(tmp_path)).name == best


def test_to_induce_the_wording_that_closes_most_is_selected(
    tiny_model: LlamaModel, unsteered: UnsteeredAnswers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, {"rude": {}, "open": {"harmful": 1}, "quiet": {"sensitive": 1}}, unsteered)
    log = new_log(tmp_path)
    assert select(tiny_model, unsteered, log, "induce").name == "quiet"


def test_a_wording_that_drifts_too_far_is_not_feasible(
    tiny_model: LlamaModel, unsteered: UnsteeredAnswers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(
        monkeypatch,
        {"rude": {"sensitive": 7, "harmful": 1}, "open": {"sensitive": 2}, "quiet": {"sensitive": 1}},
        unsteered,
    )
    log = new_log(tmp_path)
    assert select(tiny_model, unsteered, log).name == "rude"  # one harmful prompt is granted
    # No wording is within this limit, so the one that keeps most is taken.
    assert select(tiny_model, unsteered, log, max_benign_drift=1e-9).name == "open"


def test_targets_and_all_other_prompts_are_asked(unsteered: UnsteeredAnswers) -> None:
    kinds = [PROMPTS[i].kind for i in system_prompts.sample(unsteered, "remove", 4, 0)]
    assert kinds == [kind for kind in KINDS for _ in range(4)]
    assert 0 not in system_prompts.sample(unsteered, "remove", EACH, 0)  # the one that is not refused
    induce = system_prompts.sample(unsteered, "induce", EACH, 0)
    assert [i for i in induce if PROMPTS[i].kind == "sensitive"] == [0]


def test_failures_are_shares_of_all_prompts_that_the_asked_ones_stand_for(
    tiny_model: LlamaModel, unsteered: UnsteeredAnswers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    decide = SafetyRule.decide

    def noted(*arguments: Any, stands_for: int, **options: Any) -> Decision:
        counts.append(stands_for)
        return decide(*arguments, stands_for=stands_for, **options)

    answering(monkeypatch, {wording.name: {} for wording in WORDINGS}, unsteered)
    monkeypatch.setattr(SafetyRule, "decide", noted)
    select(tiny_model, unsteered, new_log(tmp_path))
    # The sensitive prompt that is not refused is not asked, and counts.
    assert counts == [len(PROMPTS)] * len(WORDINGS)
    assert unsteered.stands_for(PROMPTS[-EACH:], "remove") == EACH  # benign prompts stand for themselves


def test_a_killed_selection_keeps_its_answers(
    tiny_model: LlamaModel, unsteered: UnsteeredAnswers, tmp_path: Path
) -> None:
    class Counting:
        name = identity = "counting"
        usage = None
        pairs = 0

        def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
            self.pairs += len(pairs)
            yield from enumerate(judged([True] * len(pairs)))

    judge, advanced = Counting(), list[int]()
    n = 3 * EACH - 1
    for expected in (3 * n, 3 * n):  # the second time nothing is answered again
        log = new_log(tmp_path)
        select(tiny_model, unsteered, log, judge=judge, advance=advanced.append)
        assert judge.pairs == expected
        assert set(log.rows) >= {f"open:{PROMPTS[i].id}" for i in range(1, 3 * EACH)}
    assert sum(advanced) == 6 * n
