"""The tasks of benchmarks/capability: their format, their checks, and the table of their results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import run_tools
import yaml
from instructions import CHECKS, follows_all, process_results
from questions import multiple_choice, word_problem

FOLDER = Path(__file__).parents[1] / "benchmarks" / "capability"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def definition(name: str) -> dict[str, Any]:
    """Return a task file of lm-evaluation-harness, its `!function` as text."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text.replace("!function ", ""))
    return found


def test_there_are_100_different_tasks() -> None:
    texts = [
        row.get("question", row.get("prompt")) for name in ("gsm8k", "ifeval", "mmlu") for row in rows(name)
    ]
    assert len(texts) == len(set(texts)) == 100


def test_word_problems_are_worked_out_correctly() -> None:
    for row in rows("gsm8k"):
        *steps, last = row["answer"].split("\n")
        for step in steps:
            left, right = step.translate(str.maketrans("×÷−", "*/-")).split(" = ")
            assert re.fullmatch(r"[\d +*/-]+", left)
            assert eval(left) == int(right), row
        assert last == f"#### {steps[-1].split(' = ')[1]}"


def test_instructions_are_known_and_have_their_arguments() -> None:
    for row in rows("ifeval"):
        assert set(row["instruction_id_list"]) <= set(CHECKS)
        follows_all("An answer.", row["instruction_id_list"], row["kwargs"])
    assert [row["key"] for row in rows("ifeval")] == list(range(20))


def test_choices_are_balanced() -> None:
    answers = [row["answer"] for row in rows("mmlu")]
    assert sorted(answers) == sorted([0, 1, 2, 3] * 5)
    assert all(len(set(row["choices"])) == 4 for row in rows("mmlu"))


@pytest.mark.parametrize("name", run_tools.NAMES)
def test_definitions_name_their_file_and_generate(name: str) -> None:
    found = definition(name)
    assert found["task"] == name
    path = Path(found["dataset_kwargs"]["data_files"]["test"])
    assert FOLDER.parents[1] / path == FOLDER / f"{name.removeprefix('own_')}.jsonl"
    assert found["output_type"] == "generate_until"
    assert found["generation_kwargs"]["temperature"] == 0


def test_both_tools_ask_in_the_same_words_and_length() -> None:
    inspect = (FOLDER / "inspect_tasks.py").read_text(encoding="utf-8")
    for name, function in (("own_gsm8k", "word_problem"), ("own_mmlu", "multiple_choice")):
        assert definition(name)["doc_to_text"] == f"questions.{function}"
        assert f"input={function}(row)" in inspect
    for name in run_tools.NAMES:
        body = inspect.partition(f"def {name}()")[2].partition("@")[0]
        assert f", {definition(name)['generation_kwargs']['max_gen_toks']})" in body


def test_questions_are_no_examples_and_choices_have_letters() -> None:
    for row in rows("gsm8k"):
        assert word_problem(row).count(row["question"]) == 1
        assert word_problem(row).endswith("?\nAnswer:")
    for row in rows("mmlu"):
        assert f"\n{'ABCD'[row['answer']]}. {row['choices'][row['answer']]}\n" in multiple_choice(row)


@pytest.mark.parametrize(
    ("name", "answer", "found"),
    [
        ("own_gsm8k", "6 × 12 = 72, and 72 − 45 = 27.\n\n27", "27"),
        ("own_gsm8k", "It is **$1,250**.", "1,250"),
        ("own_mmlu", "B. Mercury", "B"),
        ("own_mmlu", "The answer is C.", "C"),
    ],
)
def test_the_answer_is_found(name: str, answer: str, found: str) -> None:
    regex = definition(name)["filter_list"][0]["filter"][0]
    assert re.findall(regex["regex_pattern"], answer)[regex.get("group_select", 0)] == found


@pytest.mark.parametrize(
    ("instruction", "arguments", "good", "bad"),
    [
        ("change_case:english_capital", {}, "GOOD DAY, 7.", "Good day."),
        ("change_case:english_lowercase", {}, "good day, 7.", "Good day."),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a\n* b\n* c"),
        ("detectable_format:title", {}, "<<Light>>\nOver the sea", "< <Light> >"),
        ("keywords:existence", {"keywords": ["lemon"]}, "A Lemon.", "Lemonade."),
        ("keywords:forbidden_words", {"forbidden_words": ["water"]}, "Waterfalls.", "Water!"),
        ("length_constraints:number_words", {"relation": "less than", "num_words": 3}, "a b", "a b c"),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "a b c", "a b"),
        ("punctuation:no_comma", {}, "a b", "a, b"),
        ("startend:end_checker", {"end_phrase": "Try it!"}, "Swim. try it!", "Try it! Swim."),
        ("startend:quotation", {}, '"Good day."', '"Good" day.'),
    ],
)
def test_instructions(instruction: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    row = {"instruction_id_list": [instruction], "kwargs": [arguments]}
    assert process_results(row, [f" {good}\n"]) == {"prompt_level_strict_acc": 1.0}
    assert process_results(row, [bad]) == {"prompt_level_strict_acc": 0.0}


def test_an_empty_answer_follows_nothing() -> None:
    assert not follows_all(" ", ["punctuation:no_comma"], [{}])


def test_every_instruction_must_be_followed() -> None:
    both = ["punctuation:no_comma", "change_case:english_lowercase"]
    assert follows_all("a b", both, [{}, {}])
    assert not follows_all("a, b", both, [{}, {}])


def test_the_table_is_paired() -> None:
    before = {"Inspect": {name: {0: True, 1: True, 2: False} for name in run_tools.NAMES}}
    after = {"Inspect": {name: {2: True, 1: False, 0: False} for name in run_tools.NAMES}}
    lines = run_tools.table(before, after).splitlines()
    assert lines[2] == "| Inspect | own_gsm8k | 3 | 2 | 1 | 1 | 2 | 1.00 |"
    assert lines[5] == "| Inspect | all | 9 | 6 | 3 | 3 | 6 | 0.51 |"
