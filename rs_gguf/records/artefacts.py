"""The stages of a run in order, and the files that each stage writes to the run folder.

The command line and the run folder read `STAGES`. The module imports nothing heavy, so `--help` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageInfo:
    """One stage, as the command line and the run folder describe it.

    `summary`: a sentence for the help. `activity`: the label of its progress bar. `artefacts`: patterns of
    the files that it writes; a trailing slash marks a folder.
    """

    name: str
    summary: str
    activity: str
    artefacts: tuple[str, ...]


_INFOS = (
    StageInfo(
        "answer", "Let the model answer the fit and tune prompts.", "Answering prompts", ("answers.jsonl",)
    ),
    StageInfo(
        "score",
        "Judge the answers: a refusal confidence for each.",
        "Judging answers",
        ("judgements.jsonl",),
    ),
    StageInfo(
        "capture",
        "Read the activations of the prompts and their answers.",
        "Reading activations",
        ("activations/",),
    ),
    StageInfo(
        "fit",
        "Fit directions and gated adapters.",
        "Fitting directions",
        (
            "directions.safetensors",
            "gated_adapter.safetensors",
            "fit.json",
            "figures/",
            "activations-refit/",
        ),
    ),
    StageInfo(
        "tune",
        "Search layers and strength; harmful refusals must stay.",
        "Searching layers and strength",
        ("trials.jsonl", "tune.json", "adapters/"),
    ),
    StageInfo(
        "write",
        "Write the GGUF files and check their effect on the model.",
        "Writing and checking the files",
        ("*.gguf", "effect_check.json"),
    ),
    StageInfo(
        "measure",
        "Measure the validation split, unsteered and steered.",
        "Measuring the validation split",
        ("measured.jsonl", "test_answers.jsonl", "metrics.json", "baselines/"),
    ),
    StageInfo("report", "Write report.html and card.md.", "Writing the report", ("report.html", "card.md")),
)
STAGES = {info.name: info for info in _INFOS}
"""Stages by name, in the order in which they run."""

LAST = _INFOS[-1].name

RESULTS = ("*.gguf", "report.html", "card.md")
"""Patterns of the results that a user keeps. They stay in the folder until a new run replaces them."""
