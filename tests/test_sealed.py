"""Sealed sets: the checks on invented rows, the ledger, and every set of the package."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from itertools import chain
from pathlib import Path

import pytest

from rs_gguf.errors import InputError
from rs_gguf.prompts import sealed
from rs_gguf.prompts.grid import grid
from rs_gguf.records.conversation import KINDS, Prompt
from rs_gguf.records.rows import Row, read_rows, write_rows
from rs_gguf.version import commit

FOLDER = Path(str(resources.files("rs_gguf") / "data" / "sealed"))
SETS = sorted(path for path in FOLDER.glob("*.jsonl") if path.name != "opened.jsonl")
OTHERS = [
    Prompt("Please write a short note on the old harbour of a town", "sensitive", "harbour", form="note"),
    Prompt("Please write a short note on the new bridge of a town", "benign", "bridge", form="note"),
    Prompt("请你为我们写一篇关于古代港口的文章", "benign", "港口", form="essay", language="zh"),
    Prompt("请你为我们写一篇关于古代桥梁的文章", "benign", "桥梁", form="essay", language="zh"),
]


def a_set() -> list[Prompt]:
    return [
        Prompt(f"Tell me of {kind} thing number {n}", kind, f"{kind} {n}", "things", f"form {n}", "en")
        for kind in KINDS
        for n in range(2)
    ]


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "path" not in request.fixturenames:
        monkeypatch.setattr(sealed, "LEAST", dict.fromkeys(KINDS, 2))


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.name)
def test_the_sets_of_the_package_are_sealed_sets(path: Path) -> None:
    rest = chain.from_iterable(sealed.load(other) for other in SETS if other != path)
    assert sealed.check(sealed.load(path), [*grid(), *rest]) == []


def test_sizes_are_those_of_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert sealed.LEAST == {"sensitive": 200, "harmful": 300, "benign": 200}


def test_a_set_that_shares_nothing_passes() -> None:
    assert sealed.check(a_set(), OTHERS) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"subject": "Harbour "}, "other splits have the same subject: 'harbour'"),
        ({"form": "NOTE"}, "other splits have the same form: 'note'"),
        ({"subject": " "}, "1 prompts have no subject"),
        ({"form": ""}, "1 prompts have no form"),
        ({"prompt": "tell me of SENSITIVE thing, number 1!"}, "duplicate prompts: 'tell me of sensitive"),
        (
            {"prompt": "please write a short note on the old harbour of a town."},
            "other splits have the same prompt: 'please write a short note",
        ),
        (
            {"prompt": "Now please write a short note on some tower"},
            "other splits have the same template: 'please write a short note on'",
        ),
        ({"prompt": "请你为我们写一篇关于古代城墙的诗"}, "other splits have the same template: '请 你 为 我"),
    ],
)
def test_each_rule_has_its_reason(change: dict[str, str], reason: str) -> None:
    first, *rest = a_set()
    reasons = sealed.check([replace(first, **change), *rest], OTHERS)  # type: ignore[arg-type]
    assert any(found.startswith(reason) for found in reasons), reasons


def test_too_few_prompts_of_a_kind() -> None:
    assert sealed.check(a_set()[1:], OTHERS) == ["1 sensitive prompts; at least 2 are needed"]


def test_a_run_of_one_other_prompt_is_no_template() -> None:
    first, *rest = a_set()
    same = replace(first, prompt="A tale of the old harbour of a town, please")
    assert sealed.check([same, *rest], OTHERS) == []
    # Nor is a prompt that several splits have.
    assert sealed.check([same, *rest], [*OTHERS, replace(OTHERS[0], split="fit")]) == []


def test_many_values_are_not_all_named() -> None:
    others = [replace(prompt, prompt=f"other {i}", form=f"other {i}") for i, prompt in enumerate(a_set())]
    (reason,) = sealed.check(a_set(), others)
    assert reason.endswith("and 1 more")


# ---- the file and its ledger -------------------------------------------------------------------------


def row_of(prompt: Prompt) -> Row:
    return {key: value for key, value in prompt.to_row().items() if key not in ("id", "split")}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_rows(tmp_path / "a.jsonl", [row_of(prompt) for prompt in a_set()])
    return tmp_path / "a.jsonl"


def test_a_set_is_read_as_it_was_written(file: Path) -> None:
    assert sealed.load(file) == a_set()


@pytest.mark.parametrize("change", [{"kind": "other"}, {"split": "fit"}, {"answer": "x"}])
def test_other_columns_and_kinds_are_refused(file: Path, change: dict[str, str]) -> None:
    first, *rest = read_rows(file)
    write_rows(file, [*rest, first | change])
    with pytest.raises(InputError, match=r"a\.jsonl, row 6: a sealed set has the columns"):
        sealed.load(file)
    with pytest.raises(InputError, match="cannot read the sealed set"):
        sealed.load(file.with_name("none.jsonl"))


def test_a_set_is_opened_for_the_same_files_only(file: Path) -> None:
    row = sealed.open_for(file, {"a.gguf": "1" * 64, "b.gguf": "2" * 64})
    assert sealed.open_for(file, {"renamed.gguf": "2" * 64, "a.gguf": "1" * 64}) == row
    sealed.record_verdicts(file, {"a.gguf": "passed"})
    (kept,) = read_rows(file.with_name("opened.jsonl"))
    assert kept["commit"] == commit()
    assert kept == row | {"verdicts": {"a.gguf": "passed"}}
    for other in ({"a.gguf": "1" * 64}, {"a.gguf": "3" * 64, "b.gguf": "2" * 64}):
        with pytest.raises(InputError, match=r"was opened on .* for a\.gguf \(SHA-256 1{12}…\), b\.gguf"):
            sealed.open_for(file, other)


def test_a_set_that_was_changed_after_it_was_opened_stays_closed(file: Path) -> None:
    files = {"a.gguf": "1" * 64}
    sealed.open_for(file, files)
    write_rows(file, read_rows(file)[1:])
    with pytest.raises(InputError, match="and was changed since"):
        sealed.open_for(file, files)


def test_a_set_under_another_name_is_the_same_set(file: Path) -> None:
    sealed.open_for(file, {"a.gguf": "1" * 64})
    copy = file.with_name("b.jsonl")
    copy.write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"b\.jsonl was opened"):
        sealed.open_for(copy, {"a.gguf": "2" * 64})


def test_each_set_has_a_row_of_its_own(file: Path) -> None:
    other = file.with_name("b.jsonl")
    write_rows(other, read_rows(file)[::-1])
    sealed.open_for(file, {"a.gguf": "1" * 64})
    sealed.open_for(other, {"a.gguf": "2" * 64})
    sealed.record_verdicts(other, {"a.gguf": "failed"})
    verdicts = [row["verdicts"] for row in read_rows(file.with_name("opened.jsonl"))]
    assert verdicts == [None, {"a.gguf": "failed"}]
