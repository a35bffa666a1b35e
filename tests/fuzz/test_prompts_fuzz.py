"""20,000 broken text files and 20,000 broken parquet files: each is refused or read, in bounded memory."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
from fuzz.mutator import limits, mutate, replace

from rs_gguf.errors import InputError
from rs_gguf.prompts import user_files as prompts
from rs_gguf.records.conversation import SPLITS, Prompt

pytestmark = pytest.mark.slow

SEED = 20260714
FILES = 20_000

ROWS = [
    {"prompt": "Name three rivers, please.", "topic": "geography", "split": "fit"},
    {"prompt": 'Who said "no"?\nAnswer briefly.', "language": "en", "split": "tune"},
    {"prompt": "写一首关于秋天的短诗。", "form": "poem", "split": "test"},
]
TURNS = [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]}]
COLUMNS = {"Goal": ["Bake bread", "Tie a knot"], "category": ["food", None]}
SEEDS = {
    ".txt": ["What is tea?\nWho was Ada?\n\nWhy?\n", "\ufeffÜber den Fluss\r\n第二\r\n"],
    ".csv": ['Goal,category\n"Bake, then eat",food\n"Say ""hi""\nto her",talk\n', "instruction,input\na,b\n"],
    ".tsv": ["question\tsubject\nWhat is tea?\tdrinks\nWhy?\t\n"],
    ".json": [json.dumps(ROWS), json.dumps(COLUMNS), json.dumps({"data": TURNS}), json.dumps(["a", "b"])],
    ".jsonl": ["\n".join(json.dumps(row, ensure_ascii=False) for row in [*ROWS, *TURNS]) + "\n"],
}
# Text that is difficult for parsers: nesting, very long numbers, halves of characters, other line ends.
PIECES = [
    *(b'"', b"'", b",", b"\t", b"\n", b"\r", b"\0", b"\\", b"{", b"[", b"]", b"}", b":", b"null", b"NaN"),
    *(b'""', b"\\ud800", b"\\u0000", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80"),
    *(b"1e999", b"9" * 5_000, b"[" * 50_000, b'{"prompt":' * 20_000, b"," * 5_000, b"x" * 200_000),
    *(b'"prompt"', b'"role": "user"', b'"split": "train"', b"true", b"-1"),
]


def test_mutated_prompt_files_are_refused_or_read(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    outcomes = {(suffix, name): 0 for suffix in SEEDS for name in ("read", "refused")}
    with limits() as start:
        for number in range(FILES):
            suffix = rng.choice(list(SEEDS))
            path = tmp_path / f"f{suffix}"
            replace(path, mutate(rng, [seed.encode() for seed in SEEDS[suffix]], PIECES))
            start()
            try:
                outcomes[suffix, outcome(path)] += 1
            except Exception as error:
                kept = path.rename(tmp_path / f"failed-{number}{suffix}")
                raise AssertionError(f"mutation {number} (kept as {kept}): {error!r}") from error
    assert min(outcomes.values()) > FILES // len(outcomes) // 20, outcomes


def test_mutated_parquet_files_are_refused_or_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    seeds = []
    for compression in ("none", "snappy", "zstd"):
        file = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(ROWS * 3), file, compression=compression)
        seeds.append(file.getvalue())
    rng = random.Random(SEED)
    path = tmp_path / "f.parquet"
    outcomes = {"read": 0, "refused": 0}
    with limits() as start:
        for number in range(FILES):
            replace(path, mutate(rng, seeds, [b"PAR1", b"\xff" * 8, b"\0" * 16]))
            start()
            try:
                outcomes[outcome(path)] += 1
            except Exception as error:
                kept = path.rename(tmp_path / f"failed-{number}.parquet")
                raise AssertionError(f"mutation {number} (kept as {kept}): {error!r}") from error
    assert min(outcomes.values()) > FILES // 20, outcomes


def outcome(path: Path) -> str:
    """Load one file and return "read" or "refused"; check the message or the prompts."""
    try:
        rows = prompts.load(path, "benign")
    except InputError as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        assert str(path) in reason
        assert len(reason) < 2_000
        assert reason.isprintable()
        return "refused"
    assert rows
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        assert row.prompt == row.prompt.strip() != ""
        row.prompt.encode()
        assert row.split in SPLITS
        # A correct prompt survives a JSON round trip, as in the run folder.
        assert Prompt.from_row(json.loads(json.dumps(row.to_row()))) == row
    return "read"


def test_many_columns_times_many_rows_stay_small(tmp_path: Path) -> None:
    columns = {"prompt": [f"Why {i}?" for i in range(5_000)], **{f"c{i}": [] for i in range(5_000)}}
    (tmp_path / "f.json").write_text(json.dumps(columns))
    with limits():
        assert len(prompts.load(tmp_path / "f.json", "benign")) == 5_000
