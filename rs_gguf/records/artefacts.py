"""The stages of a run, and the names of what they leave in its folder."""

from __future__ import annotations

STAGES = ("answer", "score", "capture", "fit", "tune", "write", "measure", "report")
# What the stages leave for one another.
FILES = (
    "state.json", "answers.jsonl", "scores.jsonl", "directions.safetensors", "gates.safetensors", "fit.json",
    "trials.jsonl", "tune.json", "proof.json", "measured.jsonl", "evaluation.jsonl", "metrics.json",
)  # fmt: skip
FOLDERS = ("activations", "adapters", "baselines", "figures")
