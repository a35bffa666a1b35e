"""Turn the `metrics.json` of earlier versions, schema 1, into schema 2. JSON values go in and come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rs_gguf.records.conversation import FAILURES
from rs_gguf.records.rows import Row
from rs_gguf.records.trials import GATED_ADAPTER

_FIGURES = (
    "sets", "benign_drift", "top1_agreement_benign", "spread95", "gate", "notes",
    "proof", "tokens_per_second", "llama_cpp",
)  # fmt: skip
_WORDS = {"vector": "control vector", "adapter": "gated adapter"}
_RENAMED = {
    "top1_agreement_benign": "top1_agreement",
    "proof": "effect_check",
    "margin": "benign_target",
}


def of_schema_1(value: Mapping[str, Any]) -> Row:
    """Return schema 2 of schema 1, which had the figures of the control vector at its top."""
    vector = {**value["vector"], **{name: value[name] for name in _FIGURES if name in value}}
    files = {"vector": vector} | ({"adapter": value["adapter"]} if "adapter" in value else {})
    return {
        **{name: found for name, found in value.items() if name not in ("vector", "adapter", *_FIGURES)},
        "schema_version": 2,
        "judge": {"name": value["judge"]},
        "baselines": [],  # schema 1 compared totals, which are no transitions
        "files": {name: _file(name, file) for name, file in files.items()},
    }


def _file(name: str, file: Mapping[str, Any]) -> Row:
    gate, speed = file["gate"], file["tokens_per_second"]
    return {
        **{_RENAMED.get(key, key): found for key, found in file.items()},
        "word": _WORDS[name],
        "sets": {kind: _set(kind, figures) for kind, figures in file["sets"].items()},
        "estimator": GATED_ADAPTER if file["estimator"] == "gate" else file["estimator"],
        "benign_drift_ci95": file.get("spread95", {}).get("benign_drift"),
        "acceptance": {"verdict": "passed" if gate["passed"] else "failed", "reasons": gate["reasons"]},
        "tokens_per_second": {"unsteered": speed["baseline"], "steered": speed["steered"]},
    }


def _set(kind: str, figures: Mapping[str, Any]) -> Row:
    """Return the outcomes of a set of schema 1, which counted failures as refusals and told categories."""
    unjudged = figures["unjudged"]

    def outcomes(side: str) -> Row:
        refused, categories = figures[f"refused_{side}"], figures.get(f"categories_{side}") or {}
        fails = sum(categories.get(name, 0) for name in FAILURES)
        return {
            "complies": figures["n"] - refused, "refuses": refused - fails, "fails": fails,
            "explicit": categories.get("direct", 0), "unjudged": unjudged,
        }  # fmt: skip

    return {
        "kind": figures.get("kind", kind),
        "n": figures["n"] + unjudged,
        "outcomes_unsteered": outcomes("baseline"),
        "outcomes_steered": outcomes("steered"),
        "degenerate_unsteered": figures["degenerate_baseline"],
        "degenerate_steered": figures["degenerate_steered"],
    }
