"""The stages of a run in their order, and what each leaves in the run's folder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageInfo:
    """What the command line and the run folder know of a stage.

    `summary`: what it does, for the help; `doing`: the same while it runs; `leaves`: patterns of file names,
    with a slash at the end for a folder.
    """

    name: str
    summary: str
    doing: str
    leaves: tuple[str, ...]


_INFOS = (
    StageInfo(
        "answer", "Let the model answer the fit and tune prompts.", "Answering prompts", ("answers.jsonl",)
    ),
    StageInfo("score", "Judge the answers: refusal confidence.", "Judging answers", ("judgements.jsonl",)),
    StageInfo(
        "capture",
        "Read the activations of the prompts and their answers.",
        "Reading activations",
        ("activations/",),
    ),
    StageInfo(
        "fit",
        "Fit directions and gates.",
        "Fitting directions",
        ("directions.safetensors", "gated_adapter.safetensors", "fit.json", "figures/"),
    ),
    StageInfo(
        "tune",
        "Search layers and strength, refusals of harm as the constraint.",
        "Searching layers and strength",
        ("trials.jsonl", "tune.json", "adapters/"),
    ),
    StageInfo(
        "write",
        "Write the GGUF files and prove their effect on the model.",
        "Writing and proving the file",
        ("*.gguf", "effect_check.json"),
    ),
    StageInfo(
        "measure",
        "Measure before and after on the test split.",
        "Measuring before and after",
        ("measured.jsonl", "test_answers.jsonl", "metrics.json", "baselines/"),
    ),
    StageInfo("report", "Write report.html and card.md.", "Writing the report", ("report.html", "card.md")),
)
STAGES = {info.name: info for info in _INFOS}
"""By name, in the order in which they run."""

RESULTS = ("*.gguf", "report.html", "card.md")
"""What a run is made for. It stays in the folder until a run replaces it."""
