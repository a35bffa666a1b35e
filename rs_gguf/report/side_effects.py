"""What else was measured of files, and how far a second judge agrees: lines and cells of text.

The records of `metrics.json` go in. The page, the card and the terminal show what comes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rs_gguf.records.conversation import KINDS
from rs_gguf.records.metrics import FileRecord, JudgeRecord, MinimalPairs, SetRecord, TraceRecord
from rs_gguf.report.text import count, number


def agreement_line(judge: JudgeRecord) -> str:
    """Return how far the second judge agrees, as a sentence; "" without one."""
    if judge.second is None or not judge.n or judge.disagreements is None:
        return ""
    kappa = "" if judge.kappa is None else f", Cohen's κ {judge.kappa:.2f}"
    agreed = judge.n - judge.disagreements
    line = f"Second judge: {judge.second}; same outcome for {agreed} of {judge.n} answers{kappa}."
    if judge.disagreed:
        found = "; ".join(f"{pair}: {n}" for pair, n in judge.disagreed.items())
        line += f" Other outcomes (first judge, second judge): {found}."
    return line


def side_effects(files: Sequence[FileRecord]) -> list[tuple[str, list[str]]]:
    """Return (name, a text for each file) of divergences, gates, opened answers and traces.

    What was measured of no file is left out.
    """
    rows: list[tuple[str, list[float | None]]] = [
        ("KL divergence, first token, nats", [file.kl_first_token for file in files]),
        ("KL divergence in benign answers, nats/token", [file.kl_mean for file in files]),
    ]
    for kind in KINDS:
        gates = [(file.gate_activation or {}).get(kind) for file in files]
        rows += [
            (f"Gate activation, {kind} prompts", [gate.prompt if gate else None for gate in gates]),
            (
                f"Gate activation, answers to {kind} prompts",
                [gate.answer if gate else None for gate in gates],
            ),
        ]
    texts = [(name, [number(value, ".2g") for value in values]) for name, values in rows]
    texts.append(
        (
            "Minimal pairs whose sensitive prompt opens the gates wider",
            [_separated(file.minimal_pairs) for file in files],
        )
    )
    texts.append(("Opened answers on the subject", [count(file.opened_on_subject) for file in files]))
    traces = [trace_changes(file.sets.values()) for file in files]
    texts += [(name, [cells.get(name, _ABSENT) for cells in traces]) for name in TRACE_FIGURES.values()]
    return [(name, cells) for name, cells in texts if set(cells) != {_ABSENT}]


_ABSENT = count(None)
TRACE_FIGURES = {
    "endless": "Thinking traces without an end",
    "loops": "Thinking traces that loop",
    "refusal_phrases": "Thinking traces with a phrase of refusal",
    "refused_in_trace": "Thinking traces that refuse, with no explicit refusal after them",
    "mean_tokens": "Thinking traces, mean tokens",
}
"""The names of what is shown of thinking traces, by the fields of `TraceRecord`."""


def trace_changes(sets: Iterable[SetRecord]) -> dict[str, str]:
    """Return by name the figures of all traces, unsteered and steered; empty without a trace."""
    pairs = [(one.traces_unsteered, one.traces_steered) for one in sets]
    sides = [[trace for trace in side if trace] for side in zip(*pairs, strict=True)]
    if not any(sides):
        return {}
    return {
        name: " → ".join(_trace_figure(side, field) for side in sides)
        for field, name in TRACE_FIGURES.items()
    }


def _trace_figure(traces: Sequence[TraceRecord], field: str) -> str:
    if field == "mean_tokens":
        means = [(trace.n, trace.mean_tokens) for trace in traces if trace.mean_tokens is not None]
        n = sum(count for count, _ in means)
        return number(sum(count * mean for count, mean in means) / n if n else None, ".0f")
    n = sum(trace.n for trace in traces)
    return f"{sum(getattr(trace, field) for trace in traces)} of {n}"


def _separated(pairs: MinimalPairs | None) -> str:
    """Return how many pairs the gates separate, and the AUROC."""
    return f"{count(pairs.separated)}, AUROC {number(pairs.auroc, '.2f')}" if pairs else _ABSENT
