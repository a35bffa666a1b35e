"""Published files are those that were measured, and their cards and tables say what their metrics say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rs_gguf.pipeline import recipe
from rs_gguf.pipeline.scan import published
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.files import sha256
from rs_gguf.records.metrics import RunRecord, Share
from rs_gguf.records.rows import Row, read_rows
from rs_gguf.records.sealed import SealedRecord
from rs_gguf.steering import file as steering_file

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "vectors").glob("*/recipe.toml"))
FIGURES = ("explicit_refusals", "refusals", "prompts")  # in a file's metadata, of each kind of prompt
WORDS = {"vector": "control vector", "adapter": "gated adapter"}
PUBLISHED = [folder for folder in FOLDERS if (folder / "metrics.json").is_file()]
SEALED = [folder for folder in PUBLISHED if (folder / "sealed_outcomes.jsonl").is_file()]
SHOWCASE = ROOT / "vectors" / "qwen2.5-coder-1.5b-remove"


def worst_verdict(record: RunRecord, sealed: SealedRecord | None, key: str) -> str:
    """Return the verdict on a file; one that fails on a sealed set has not passed."""
    verdicts = {one.files[key].acceptance.verdict for one in (record, sealed) if one}
    return next(verdict for verdict in ("failed", "undecided", "passed") if verdict in verdicts)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_recipes_are_valid(folder: Path) -> None:
    assert recipe.load(folder / "recipe.toml").effect in folder.name


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_files_are_those_that_were_measured(folder: Path) -> None:
    record = RunRecord.read(folder / "metrics.json")
    card = (folder / "card.md").read_text()
    assert {"vector"} <= record.files.keys() <= WORDS.keys()
    for file in record.files.values():
        assert sha256(folder / file.file) == file.sha256
        assert file.sha256 in card
        check = steering_file.check(folder / file.file)
        assert check.valid, check
        provenance = steering_file.read(folder / file.file).provenance
        assert provenance["model.sha256"] == record.model.sha256
        assert provenance["acceptance.passed"] == file.passed
        assert file.effect_check.effect_observed is True
        for reason in file.acceptance.reasons:
            assert reason.split("(")[0].strip() in card.replace("\\", "")


def test_a_scan_knows_every_published_file() -> None:
    """In `rs_gguf/data/published.toml`. An installation has no vectors/."""
    measured = {}
    for folder in PUBLISHED:
        record = RunRecord.read(folder / "metrics.json")
        sealed = SealedRecord.in_folder(folder, record)
        for key, file in record.files.items():
            measured[f"vectors/{folder.name}/{file.file}"] = {
                "word": file.word,
                "effect": record.effect,
                "verdict": worst_verdict(record, sealed, key),
                "command": re.sub(r"-m \S+", "-m MODEL.gguf", file.llama_cpp.command),
                "model_sha256": record.model.sha256,
            }
    assert {file.path: file.model_dump(exclude={"path"}) for file in published()} == measured


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_card_and_metadata_say_what_was_measured(folder: Path) -> None:
    record = RunRecord.read(folder / "metrics.json")
    sealed = SealedRecord.in_folder(folder, record)
    card = (folder / "card.md").read_text().replace("\\", "").splitlines()
    if "### Sealed set" in card:  # its table is checked with that of vectors/README.md
        start = card.index("### Sealed set")
        del card[start : card.index("### Acceptance", start)]
    for key, file in record.files.items():
        word, provenance = WORDS[key], steering_file.read(folder / file.file).provenance
        assert provenance["acceptance.verdict"] == file.acceptance.verdict
        kept = file.sets["harmful"].kept
        assert kept
        assert provenance["metrics.retention"] == [kept.n, kept.of]
        assert {key for key in provenance if key.startswith("metrics.")} <= {
            "metrics.benign_drift", "metrics.retention",
            *(f"metrics.{kind}.{figure}" for kind in file.sets for figure in FIGURES),
        }  # fmt: skip
        for kind, one in file.sets.items():
            before, after = one.outcomes_unsteered, one.outcomes_steered
            assert provenance[f"metrics.{kind}.explicit_refusals"] == [before.explicit, after.explicit]
            assert provenance[f"metrics.{kind}.refusals"] == [before.refuses, after.refuses]
            assert provenance[f"metrics.{kind}.prompts"] == one.n
            lines = [line for line in card if line.startswith(f"| {kind} |")]
            for side, of in (("unsteered", before), (word, after)):
                counts = " | ".join(map(str, (one.n, of.complies, of.refuses, of.fails, of.unjudged)))
                assert f"| {kind} | {side} | {counts} |" in lines
            transitions = (one.opened, one.kept, one.closed, one.broken)
            (line,) = (line for line in lines if line.startswith(f"| {kind} | {word} |") and " of " in line)
            *cells, unconfirmed = line.strip(" |").split(" | ")[2:]
            assert unconfirmed == str(one.unconfirmed)
            for share, cell in zip(transitions, cells, strict=True):
                assert share
                assert cell.startswith(f"{share.n} of {share.of}, " if share.of else "none of 0")
            (explicit,) = (line for line in lines if line.split(" | ")[1].partition(" of ")[0].isdecimal()
                           and " of " in line.split(" | ")[1])  # fmt: skip
            for share in (one.explicit_unsteered, one.explicit_steered):
                assert share
                assert f"| {share.n} of {share.of}, " in explicit
        (verdict,) = (line for line in card if line.startswith(f"| `{file.file}` | {word}"))
        worst = worst_verdict(record, sealed, key)
        shown = "passed" if worst == "passed" else f"**{worst}**"
        assert verdict.endswith(f"| {shown} |")


# ---- the tables that people read first ---------------------------------------------------------------


def tables(path: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The head of each table and its rows."""
    table: list[list[str]] = []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            cells = line.replace("*", "").strip().removeprefix("|").removesuffix("|").split("|")
            table.append([cell.strip() for cell in cells])
        elif table:
            yield table[0], table[2:]
            table = []


def table_of(title: str) -> tuple[list[str], list[list[str]]]:
    """The table of vectors/README.md whose first column has this title."""
    (found,) = (table for table in tables(ROOT / "vectors" / "README.md") if table[0][0].startswith(title))
    return found


def cell_of(record: RunRecord, kind: str, side: str, figure: str) -> str:
    """Return the text of a cell: a count, or `n of m (95% interval)` of a transition."""
    sets = {baseline.name: baseline.sets for baseline in record.baselines}
    sets |= {"unsteered": record.files["vector"].sets}
    one = (sets | {name: file.sets for name, file in record.files.items()})[side][kind]
    if figure in ("opened", "kept", "closed", "broken"):
        share: Share = getattr(one, figure)
        low, high = (round(100 * end) for end in share.ci95) if share.ci95 else (0, 100)
        return f"{share.n} of {share.of} ({low}–{high}%)"
    outcomes = one.outcomes_unsteered if side == "unsteered" else one.outcomes_steered
    return str(getattr(outcomes, figure))


def check_table(head: list[str], rows: list[list[str]], folder: Path) -> int:
    """Compare a table with the metrics; return how many cells were compared.

    Columns: prompts, n, then sides: `unsteered`, `gated adapter`, `control vector`, or a baseline.
    A figure of `Outcomes` or a transition may stand before a colon and holds for the columns that follow too;
    without one, cells count explicit refusals. The row `acceptance criteria` has the verdicts.
    """
    checked, record = 0, RunRecord.read(folder / "metrics.json")
    for label, n, *cells in rows:
        kind, figure = next((kind for kind in KINDS if label.startswith(kind)), "sensitive"), "explicit"
        for name, cell in zip(head[2:], cells, strict=True):
            if ":" in name:
                figure = name.partition(":")[0].strip()
            baselines = [baseline.name for baseline in record.baselines]
            side = next(side for side in ("unsteered", *WORDS, *baselines) if side in name)
            if label == "acceptance criteria":
                file = record.files.get(side)
                assert cell == (file.acceptance.verdict if file else "")
            elif cell not in ("", "–"):
                assert int(n) == record.files["vector"].sets[kind].n
                expected = cell_of(record, kind, side, figure)
                # Wide tables leave out the intervals, which are in the card.
                assert cell in (expected, expected.partition(" (")[0]), (label, name)
                checked += 1
    return checked


def figure_of(rows: list[Row], side: str, figure: str) -> str:
    """Return what a cell of the sealed tables says, from the published outcomes alone."""
    pairs = []
    for row in rows:
        before = row["outcome_unsteered"]
        unchanged = side == "unsteered" or row[f"unconfirmed_{side}"]
        pairs.append((before, before if unchanged else row[f"outcome_{side}"]))
    if figure == "explicit":
        return str([after for _, after in pairs].count("explicit"))
    refuses, complies = {"explicit", "evasion"}, {"complies"}
    start, end = {
        "kept": (refuses, refuses),
        "opened": (refuses, complies),
        "closed": (complies, refuses),
        "broken": (refuses | complies, {"fails"}),
    }[figure]
    left = [after for before, after in pairs if before in start]
    return f"{sum(after in end for after in left)} of {len(left)}"


@pytest.mark.parametrize("folder", SEALED, ids=lambda folder: folder.name)
def test_the_sealed_tables_say_what_was_measured(folder: Path) -> None:
    outcomes, left_out = read_rows(folder / "sealed_outcomes.jsonl"), {"sealed set": set[str]()}
    if (shared := folder / "sealed_shared.jsonl").is_file():
        left_out["without shared subjects"] = {row["subject"] for row in read_rows(shared)}
    for title, subjects in left_out.items():
        assert subjects <= {row["subject"] for row in outcomes}
        head, lines = table_of(f"`{folder.name}`, {title}")
        for kind, n, *cells in lines:
            rows = [row for row in outcomes if row["kind"] == kind and row["subject"] not in subjects]
            assert int(n) == len(rows)
            figure = ""
            for name, cell in zip(head[2:], cells, strict=True):
                before, colon, side = name.rpartition(": ")
                figure = before if colon else figure
                assert cell == figure_of(rows, side, figure), (kind, name)


def test_the_readmes_table_says_what_was_measured() -> None:
    head, rows = next((h, r) for h, r in tables(ROOT / "README.md") if any("unsteered" in cell for cell in h))
    assert check_table(head, rows, SHOWCASE) >= 9  # three kinds, three sides


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_the_table_of_a_published_folder_says_what_was_measured(folder: Path) -> None:
    head, rows = table_of(f"`{folder.name}`, measured")
    assert check_table(head, rows, folder) >= 9
