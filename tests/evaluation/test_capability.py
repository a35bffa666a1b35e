"""The tasks themselves, their checks, and what is made of two models' solutions."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from rs_gguf.engines.answers import answer_all
from rs_gguf.engines.engine import NO_STEERING
from rs_gguf.engines.generation import Asking
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.evaluation import capability, sandbox
from rs_gguf.evaluation.capability import SKILLS, Solution, Task, passes, solve, tasks
from rs_gguf.records.conversation import Answer, Prompt

REFUSAL = "I'm sorry, but I can't assist with that."
needs_sandbox = pytest.mark.skipif(bool(sandbox.unavailable()), reason="no system call filter here")


def test_there_are_enough_and_each_is_there_once() -> None:
    found = tasks()
    assert len(found) >= 150
    assert min(Counter(task.kind for task in found).values()) >= 40
    assert len({task.id for task in found}) == len({task.prompt for task in found}) == len(found)
    assert {task.kind for task in found} == set(SKILLS)


@pytest.mark.slow
@needs_sandbox
def test_each_reference_passes_and_no_refusal_does() -> None:
    for task in tasks():
        assert passes(task, task.reference), task
        if task.kind != "code":  # where it would be 41 processes that all end alike
            assert not passes(task, REFUSAL), task
            assert not passes(task, ""), task


def test_no_answer_solves_its_neighbours_task() -> None:
    """Arithmetic and facts: the next task's answer is wrong, unless it is the very same."""
    for kind in ("arithmetic", "facts"):
        found = tasks([kind])
        for task, other in itertools.pairwise(found):
            if task.reference.lower() != other.reference.lower():
                assert not passes(task, other.reference), (task, other)


def check(name: str, **more: object) -> Task:
    return Task("t", "format", "", [{"check": name, **more}], "")


@pytest.mark.parametrize(
    ("task", "text", "right"),
    [
        (check("number", value=1204), "1,204", True),
        (check("number", value=85), "47 + 38 = 85.", True),
        (check("number", value=12), "12.0", True),
        (check("number", value=-7), "It is -7", True),
        (check("number", value=85), "eighty-five", False),
        (check("number", value=5), "15", False),
        (check("any_of", values=["Pôle"]), "Le pole, bien sûr.", True),
        (check("any_of", values=["Au"]), "Australia", False),
        (check("any_of", values=["blue whale"]), "The Blue-Whale!", True),
        (check("json_value", value={"a": True}), '```json\n{"a": true}\n```', True),
        (check("json_value", value={"a": True}), '{"a": 1}', False),
        (check("json_value", value=[1, 2]), "[1, 2.0]", True),
        (check("json_value", value=[1, 2]), "[1, 2] as asked", False),
        (check("json_keys", keys=["b", "a"]), '{"a": 0, "b": 0}', True),
        (check("json_keys", keys=["a"]), '{"a": 0, "b": 0}', False),
        (check("json_list", length=2), '["a", "b"]', True),
        (check("json_list", length=2), '["a", 2]', False),
        (check("json_list", length=2), "[" * 100_000, False),
        (check("json_value", value=[5]), f"[{10**400}]", False),
        (check("json_value", value=[0.5]), f"[{10**400}]", False),
        (check("json_value", value=10**400), f"{10**400}", True),
        (check("json_value", value=10**12), f"{10**12 + 1}", False),
        (check("json_value", value=0.3), "0.30000000000000004", True),
        (check("lines", count=2), "a\n\nb\n", True),
        (check("each_line", pattern=r"- .+"), "- a\nb", False),
        (check("words", max=3), "one two three four", False),
        (check("lacks", text="cold"), "Cold snow", False),
        (check("starts", text="Fact:"), "  Fact: yes", True),
        (check("equals", text="A B"), "A B.", False),
    ],
)
def test_checks(task: Task, text: str, right: bool) -> None:
    assert passes(task, text) is right


@needs_sandbox
@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("Here it is:\n```python\ndef double(n):\n    return 2 * n\n```\nAnd more.", True),
        ("def double(n):\n    return 2 * n", True),
        ("```python\ndef double(n):\n    return 2 * n", True),  # cut off after its end
        ("```python\ndef double(n):\n    return n ** 2\n```", False),  # right for 2 alone
        ("```python\ndef twice(n):\n    return 2 * n\n```", False),
        ("```python\ndef double(n):\n    return True\n```", False),
        ("```python\nimport os\nos.listdir('/')\ndef double(n):\n    return 2 * n\n```", False),
    ],
)
def test_code_is_run(code: str, right: bool) -> None:
    task = Task(
        "t", "code", "", [{"check": "python", "function": "double", "calls": [[[2], 4], [[5], 10]]}], ""
    )
    assert passes(task, code) is right


def test_tasks_are_asked_by_length_and_come_back_in_order() -> None:
    chosen = [*tasks(["facts"])[:2], *tasks(["code"])[:1], *tasks(["arithmetic"])[:2]]
    asked: list[tuple[int, int]] = []

    def ask(prompts: Sequence[Prompt], limit: int) -> list[Answer]:
        asked.append((len(prompts), limit))
        return [Answer([], f"{prompt.prompt} {REFUSAL}", True, False) for prompt in prompts]

    found = solve(ask, chosen)
    assert [solution.task for solution in found] == chosen
    assert all(solution.text.startswith(solution.task.prompt) for solution in found)
    assert asked == [(4, 48), (1, 192)]


def test_accuracy_is_paired_by_kind_and_in_all() -> None:
    arithmetic, facts = tasks(["arithmetic"])[:3], tasks(["facts"])[:2]

    def solutions(right: Sequence[bool]) -> list[Solution]:
        return [Solution(t, "", r) for t, r in zip([*arithmetic, *facts], right, strict=True)]

    found = capability.compare(
        solutions([True, True, True, False, True]), solutions([False, False, True, True, True])
    )
    assert list(found) == ["arithmetic", "facts", "all"]
    told = {
        name: (f["n"], f["right_unsteered"], f["right_steered"], f["gained"], f["lost"])
        for name, f in found.items()
    }
    assert told == {"arithmetic": (3, 3, 1, 0, 2), "facts": (2, 1, 2, 1, 0), "all": (5, 4, 3, 1, 2)}
    assert found["all"]["mcnemar_p"] == 1.0
    low, high = found["arithmetic"]["ci95_steered"]
    assert found["arithmetic"]["accuracy_steered"] == pytest.approx(1 / 3)
    assert low < 1 / 3 < high


def test_what_was_cut_off_before_an_answer_is_no_wrong_one() -> None:
    chosen = tasks(["facts"])[:4]

    def answers(texts: Sequence[str | None]) -> list[Solution]:
        """None: still within a trace when the tokens ran out."""
        return solve(lambda *_: [Answer([1], text or "", text is not None, False) for text in texts], chosen)

    right = [task.reference for task in chosen]
    before, after = answers([None, *right[1:3], ""]), answers([right[0], None, REFUSAL, right[3]])
    assert [solution.correct for solution in before] == [None, True, True, False]
    found = capability.compare(before, after)["all"]
    assert (found["n"], found["unanswered_unsteered"], found["unanswered_steered"]) == (2, 1, 1)
    assert (found["right_unsteered"], found["right_steered"], found["gained"], found["lost"]) == (1, 1, 1, 1)


def test_answers_may_have_as_many_tokens_as_were_asked_for() -> None:
    limits = {
        n: {task.kind: task.max_tokens for task in capability.runnable(n)[0] if task.kind != "code"}
        for n in (4, 100)
    }
    assert set(limits[4].values()) == {48}
    assert set(limits[100].values()) == {100}
    assert {task.max_tokens for task in tasks(["code"])} == {192}


def test_without_a_sandbox_no_code_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "unavailable", lambda: "no filter")
    found, reason = capability.runnable()
    assert reason == "no filter"
    assert {task.kind for task in found} == {"arithmetic", "facts", "format"}


@pytest.mark.real
@needs_sandbox
def test_the_real_model_solves_some_of_each_kind(real_model: Path) -> None:
    names = {
        "arithmetic-07",
        "arithmetic-43",
        "facts-07",
        "facts-30",
        "format-05",
        "format-45",
        "code-24",
        "code-25",
    }
    chosen = [task for task in tasks() if task.id in names]
    with LlamaModel(real_model) as model:
        found = solve(
            lambda asked, limit: answer_all(model, asked, NO_STEERING, Asking(None, limit))[0], chosen
        )
    assert {s.task.kind for s in found if s.correct} == set(SKILLS), found
