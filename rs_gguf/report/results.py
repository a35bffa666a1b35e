"""A run folder's results, read for people: every string in them can be shown as it is.

`metrics.json`, `test_answers.jsonl` and `recipe.toml` go in. So do, where they are, `tune.json`, `fit.json`,
the answers and judgements of the fit prompts, and `scale_sweep*.json`, written by `rs-export eval --scales`.
Prompts and answers are untrusted. Characters that could hide, reorder or break text are made visible here.
"""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rs_gguf.errors import InputError
from rs_gguf.evaluation.outcomes import outcome_of
from rs_gguf.records.conversation import Answer, Judgement
from rs_gguf.records.metrics import RunRecord
from rs_gguf.records.rows import Row, json_lines
from rs_gguf.records.sealed import SealedRecord

_NEEDED = ("metrics.json", "test_answers.jsonl", "recipe.toml")
# What a folder lacks that holds only what was published: the page leaves those parts out.
_EMPTY = {"tune.json": '{"trials": [], "selected": {}}', "fit.json": "{}"}

# Controls except tab and line feed, line and paragraph separators, bidirectional embeddings, overrides and
# isolates (left-to-right and right-to-left marks stay: ordinary text needs them), surrogates, noncharacters,
# and characters without width: soft hyphen, zero-width space, word joiner and its kin, fillers, tags (the two
# zero-width joiners and variation selectors stay: scripts and emoji need them).
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufeff"
    "\ufff0-\ufffb\ufffe\uffff\xad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b\u2060-\u2065\u206a-\u206f\u3164"
    "\uffa0\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff]"
)


@dataclass(frozen=True)
class Results:
    """What the stages left.

    rows: of test_answers.jsonl. tune: without trials where the search left none. fit: empty where the fit
    stage left no summary. fitted: `kind` and `confidence` of the fit prompts (None for failures), in the
    order of their activations; empty where they were not kept.
    sweeps: contents of the scale sweeps. sealed: None where no sealed set was opened.
    """

    record: RunRecord
    rows: list[Row]
    tune: Row
    fit: Row
    fitted: list[Row]
    sweeps: list[Row]
    recipe: Row
    recipe_text: str
    sealed: SealedRecord | None = None


def load(folder: Path) -> Results:
    """Read a measured run folder.

    Raises:
        InputError: one of the files is missing or not what the stages write.
    """
    texts = {name: _text(folder / name) for name in _NEEDED}
    for name, empty in _EMPTY.items():
        texts[name] = _text(folder / name) if (folder / name).is_file() else empty
    try:
        rows = json_lines(texts["test_answers.jsonl"])
        metrics, tune, fit = (json.loads(texts[f"{name}.json"]) for name in ("metrics", "tune", "fit"))
        fitted = _fitted(folder)
        sweeps = [_sweep(path) for path in sorted(folder.glob("scale_sweep*.json"))]
        recipe_text = without_home(texts["recipe.toml"])
        recipe = tomllib.loads(recipe_text)
    except (ValueError, KeyError, TypeError) as error:  # JSONDecodeError and TOMLDecodeError are ValueErrors
        raise InputError(f"{folder}: a result file is damaged ({error}). Run with --fresh.") from error
    record = RunRecord.of(printable(metrics), folder / "metrics.json")
    sealed = SealedRecord.in_folder(folder, record)
    if sealed is not None:
        sealed = SealedRecord.model_validate(printable(sealed.mapping()))
    shown = Results(record, *map(printable, (rows, tune, fit, fitted, sweeps, recipe, recipe_text)))
    return replace(shown, sealed=sealed)


def _sweep(path: Path) -> Row:
    """Return what `rs-export eval --scales` wrote. `InputError` names a file that holds anything else."""
    try:
        sweep: Row = json.loads(_text(path))
        whole = {"sweep", "control_vectors", "adapters", "tokens", "judge"} <= sweep.keys()
        whole = whole and len(sweep["sweep"]) > 0
        whole = whole and all({"scale", "rows", "benign_text"} <= step.keys() for step in sweep["sweep"])
    except (ValueError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise InputError(
            f"{path} does not hold a scale sweep. The report reads what `rs-export eval --scales` writes. "
            "Move the file away or measure the sweep again."
        )
    return sweep


def _fitted(folder: Path) -> list[Row]:
    answers, scores = folder / "answers.jsonl", folder / "judgements.jsonl"
    if not (answers.is_file() and scores.is_file()):
        return []
    judgements = {row["id"]: Judgement.from_row(row) for row in json_lines(_text(scores))}
    fitted = []
    for row in json_lines(_text(answers)):
        if row["split"] == "fit":
            judgement = judgements.get(row["id"], Judgement(None, "missing"))
            fails = outcome_of(Answer.from_row(row), judgement) == "fails"  # neither an answer nor a refusal
            fitted.append({"kind": row["kind"], "confidence": None if fails else judgement.confidence})
    return fitted


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot read {path}: {reason}. A report needs a measured run: `rs-export run`."
        ) from error


def without_home(text: str) -> str:
    """Return a text whose paths below the home folder begin with `~`, so that they name nobody."""
    with contextlib.suppress(RuntimeError):  # there is no home
        return re.sub(rf"(?<![\w./-]){re.escape(Path.home().as_posix())}/", "~/", text)
    return text


def printable(value: Any) -> Any:
    """Return the JSON value with every character that could hide, reorder or break text made visible."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub(_visible, value.replace("\r\n", "\n"))
    if isinstance(value, list):
        return [printable(item) for item in value]
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return value


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's control pictures
    if code in (0x2028, 0x2029):
        return "\n"
    return "\ufffd" if 0xD800 <= code < 0xE000 else f"⟨U+{code:04X}⟩"
