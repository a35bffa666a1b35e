"""Inspect: the tasks of this folder, with the prompts and rules of the lm-evaluation-harness files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import Sample, json_dataset
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Score, Scorer, Target, accuracy, match, pattern, scorer, stderr
from inspect_ai.solver import TaskState, generate
from instructions import follows_all
from questions import multiple_choice, word_problem

FOLDER = Path(__file__).parent


@task
def own_gsm8k() -> Task:
    """Word problems in GSM8K's format, with two examples. The last number of the answer counts."""

    def sample(row: dict[str, Any]) -> Sample:
        return Sample(input=word_problem(row), target=row["answer"].split("#### ")[-1])

    return _task("gsm8k", sample, match(numeric=True), 160)


@task
def own_ifeval() -> Task:
    """Instructions in IFEval's format."""

    def sample(row: dict[str, Any]) -> Sample:
        return Sample(input=row["prompt"], metadata=row)

    return _task("ifeval", sample, instructions_followed(), 160)


@task
def own_mmlu() -> Task:
    """Questions in MMLU's format, answered by generation: the first letter A to D counts."""

    def sample(row: dict[str, Any]) -> Sample:
        return Sample(input=multiple_choice(row), target="ABCD"[row["answer"]])

    return _task("mmlu", sample, pattern(r"\b([A-D])\b", ignore_case=False), 16)


@scorer(metrics=[accuracy(), stderr()])
def instructions_followed() -> Scorer:
    """Score 1 if the answer follows every instruction of its row."""

    async def score(state: TaskState, target: Target) -> Score:
        row, answer = state.metadata, state.output.completion
        followed = follows_all(answer, row["instruction_id_list"], row["kwargs"])
        return Score(value="C" if followed else "I", answer=answer)

    return score


def _task(name: str, sample: Any, scored_by: Scorer, max_tokens: int) -> Task:
    return Task(
        dataset=json_dataset(str(FOLDER / f"{name}.jsonl"), sample),
        solver=generate(),
        scorer=scored_by,
        config=GenerateConfig(temperature=0.0, max_tokens=max_tokens),
    )
