"""Sealed sets: prompts that nobody measured on before, opened once for the files of one release.

A set is a JSON Lines file with the columns of the grid. `check` returns why a file is not such a set.
`open_for` writes the ledger `opened.jsonl` beside the set, before the first answer, and refuses a set that
was opened for other files (docs/prompts.md).
"""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rs_gguf.errors import InputError
from rs_gguf.records.conversation import KINDS, Kind, Prompt
from rs_gguf.records.files import sha256
from rs_gguf.records.rows import Row, json_lines, read_rows, write_rows
from rs_gguf.version import __version__, commit

LEAST: dict[Kind, int] = {"sensitive": 200, "harmful": 300, "benign": 200}
"""Fewest prompts of each kind in a sealed set."""

_COLUMNS = {"prompt", "kind", "subject", "topic", "form", "language"}
_RUN = 6  # words of a template
_NAMED = 5  # examples in a reason
# Characters of scripts that put no space between words: Thai, kana and Han. Two of them count as a word.
_SPACELESS = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")


def load(path: Path) -> list[Prompt]:
    """Read a sealed set: JSON Lines with prompt, kind, subject, topic, form and language.

    Raises:
        InputError: the file cannot be read, or a row has other columns or an unknown kind.
    """
    try:
        rows = json_lines(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the sealed set {path} ({error}). Give a JSON Lines file.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or row.keys() != _COLUMNS or row["kind"] not in KINDS:
            raise InputError(
                f"{path}, row {number}: a sealed set has the columns {', '.join(sorted(_COLUMNS))}, and the "
                f"kinds {', '.join(KINDS)}."
            )
    return [Prompt(**row) for row in rows]


def check(sealed: Sequence[Prompt], others: Sequence[Prompt]) -> list[str]:
    """Return why `sealed` is not a sealed set beside `others`, the prompts of all other splits.

    A template is a run of 6 words that occurs in at least 2 of `others` and in the set. Case and punctuation
    do not count. In scripts without spaces between words, 12 characters are such a run.
    """
    counts = Counter(prompt.kind for prompt in sealed)
    reasons = [
        f"{counts[kind]} {kind} prompts; at least {least} are needed"
        for kind, least in LEAST.items()
        if counts[kind] < least
    ]
    fields: tuple[Literal["subject", "form"], ...] = ("subject", "form")
    for field in fields:
        values = [getattr(prompt, field).strip().casefold() for prompt in sealed]
        known = {getattr(prompt, field).strip().casefold() for prompt in others} - {""}
        if empty := values.count(""):
            reasons.append(f"{empty} prompts have no {field}")
        reasons += _named(f"other splits have the same {field}", set(values) & known)
    texts = [_words(prompt.prompt) for prompt in sealed]
    known_texts = {_words(prompt.prompt) for prompt in others}
    twice = {text for text, n in Counter(texts).items() if n > 1}
    reasons += _named("duplicate prompts", map(" ".join, twice))
    reasons += _named("other splits have the same prompt", map(" ".join, known_texts & set(texts)))
    # Each text once: a prompt that several splits share is not a template.
    runs = Counter(run for text in known_texts for run in set(_runs(text)))
    templates = {run for text in set(texts) for run in _runs(text) if runs[run] > 1}
    return reasons + _named("other splits have the same template", map(" ".join, templates))


def open_for(path: Path, files: Mapping[str, str]) -> Row:
    """Write to the ledger that the set at `path` is opened for `files`, and return the ledger's row.

    A set that is open for the same files stays open: a killed measurement goes on.

    files: SHA-256 by name of each file that is measured.

    Raises:
        InputError: the set was opened for other files, or was changed since it was opened.
    """
    ledger, digest = path.with_name("opened.jsonl"), sha256(path)
    rows = read_rows(ledger) if ledger.is_file() else []
    for row in rows:
        if digest != row["set_sha256"] and path.name != row["set"]:
            continue
        if digest == row["set_sha256"] and set(files.values()) == set(row["files"].values()):
            return row
        named = ", ".join(f"{name} (SHA-256 {value[:12]}…)" for name, value in row["files"].items())
        changed = "" if digest == row["set_sha256"] else ", and was changed since"
        raise InputError(
            f"the sealed set {path} was opened on {row['date']} for {named}{changed}. A set is opened for "
            "one release only: write a new set."
        )
    row = {
        "date": datetime.date.today().isoformat(),
        "tool": f"rs-gguf {__version__}",
        "commit": commit(),
        "set": path.name,
        "set_sha256": digest,
        "files": dict(files),
        "verdicts": None,  # until all files are measured
    }
    write_rows(ledger, [*rows, row])
    return row


def record_verdicts(path: Path, verdicts: Mapping[str, str]) -> None:
    """Write the verdict on each file to the ledger's row of the open set at `path`."""
    ledger, digest = path.with_name("opened.jsonl"), sha256(path)
    rows = [
        {**row, "verdicts": dict(verdicts)} if row["set_sha256"] == digest else row
        for row in read_rows(ledger)
    ]
    write_rows(ledger, rows)


def _named(what: str, values: Iterable[str]) -> list[str]:
    """Return a reason that names some of `values`; none if there are no values."""
    ordered = sorted(values)
    shown = ", ".join(repr(value[:60]) for value in ordered[:_NAMED])
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return [f"{what}: {shown}{more}"] if ordered else []


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


def _runs(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    spaceless = any(re.match(f"[{_SPACELESS}]", word) for word in words)
    size = 2 * _RUN if spaceless else _RUN
    return (tuple(words[i : i + size]) for i in range(len(words) - size + 1))
