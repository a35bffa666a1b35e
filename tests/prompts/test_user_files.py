"""Prompt files are read in every format; the grid's splits share no subjects, forms or near-duplicates."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rs_gguf.errors import InputError
from rs_gguf.prompts import sealed, user_files
from rs_gguf.prompts.grid import grid, pool, stratified
from rs_gguf.prompts.user_files import load, load_own_kinds
from rs_gguf.records.conversation import KINDS, SPLITS, Kind, Prompt

# ---- files that users bring ----------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def texts(path: Path) -> list[str]:
    return [prompt.prompt for prompt in load(path, "sensitive")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p"}, "p"),
        ({"Goal": "g", "Behavior": "short name", "Target": "Sure"}, "g"),
        ({"goal": "g"}, "g"),
        ({"Behavior": "b", "ContextString": ""}, "b"),
        ({"Behavior": "b", "ContextString": "the context"}, "the context\n\nb"),
        ({"forbidden_prompt": "f", "category": "c"}, "f"),
        ({"instruction": "i", "input": "", "output": "o"}, "i"),
        ({"instruction": "i", "input": "the input"}, "i\n\nthe input"),
        ({"question": "q", "answer": "a"}, "q"),
        ({"text": "t"}, "t"),
        ({"vanilla": "v", "adversarial": "", "completion": "c"}, "v"),
        ({" Prompt ": "  p\n"}, "p"),
        ({"id": "7", "prompt": "p", "question": "q", "text": "t"}, "p"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
def test_every_well_known_column_is_found(
    tmp_path: Path, row: dict[str, str], expected: str, suffix: str
) -> None:
    path = tmp_path / f"file.{suffix}"
    if suffix == "json":
        write(path, json.dumps([row]))
    elif suffix == "jsonl":
        write(path, json.dumps(row) + "\n")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(row), delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerow(row)
    assert texts(path) == [expected]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"turns": ["first", "second"]}, "first"),
        ({"turns": [{"role": "user", "content": "first"}]}, "first"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}, "u"),
        ({"prompt": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, "u"),
        ("plain text", "plain text"),
    ],
)
def test_conversations_give_the_first_turn_of_the_user(tmp_path: Path, row: Any, expected: str) -> None:
    assert texts(write(tmp_path / "file.jsonl", json.dumps(row))) == [expected]
    assert texts(write(tmp_path / "file.json", json.dumps([row]))) == [expected]


@pytest.mark.parametrize(
    "value",
    [
        ["one", "two"],
        [{"goal": "one"}, {"goal": "two"}],
        {"version": 1, "data": [{"prompt": "one"}, {"prompt": "two"}]},
        {"languages": ["en", "zh"], "prompts": [{"prompt": "one"}, {"prompt": "two"}]},
        {"Train": ["one", "two"], "test": ["three"]},
        {"questions": ["one", "two"]},
        {"prompt": ["one", "two"]},
        {"category": ["x", "y"], "Goal": ["one", "two"]},
    ],
)
def test_json_lists_rows_and_columns(tmp_path: Path, value: Any) -> None:
    assert texts(write(tmp_path / "file.json", json.dumps(value))) == ["one", "two"]


def test_text_files_are_one_prompt_a_line_with_or_without_mark_and_suffix(tmp_path: Path) -> None:
    content = "﻿one\r\n\n  two \r\n六四事件？\n".encode()
    for name in ("file.txt", "file", "FILE.TXT"):
        assert texts(write(tmp_path / name, content)) == ["one", "two", "六四事件？"]


def test_a_mark_does_not_hide_the_first_column(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "file.csv", "﻿prompt,x\none,1\n")) == ["one"]


def test_quoted_cells_may_hold_line_breaks_commas_and_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "file.csv", 'id,prompt\r\n1,"a ""b"",\r\nc"\r\n\r\n2,d\r\n')
    assert texts(path) == ['a "b",\nc', "d"]


def test_line_separators_inside_a_json_text_do_not_end_the_line(tmp_path: Path) -> None:
    rows = ["one\u2028line", "two\u0085lines"]
    content = "".join(json.dumps({"prompt": row}, ensure_ascii=False) + "\n" for row in rows)
    assert texts(write(tmp_path / "file.jsonl", content)) == rows


def test_what_is_known_of_a_row_is_kept(tmp_path: Path) -> None:
    row = {"prompt": "p", "subject": "s", "category": "c", "form": "poem", "language": "de", "split": "tune"}
    row["pair"] = "4"
    [prompt] = load(write(tmp_path / "file.jsonl", json.dumps(row)), "harmful")
    assert prompt == Prompt("p", "harmful", "s", "c", "poem", "de", "tune", "4")
    assert Prompt.from_row(json.loads(json.dumps(prompt.to_row()))) == prompt


def test_a_row_without_a_pair_is_as_before_there_were_pairs(tmp_path: Path) -> None:
    (prompt,) = load(write(tmp_path / "p.jsonl", '{"prompt": "p", "pair": 4}'), "harmful")
    assert prompt.pair == ""
    assert "pair" not in prompt.to_row()
    assert Prompt.from_row(prompt.to_row()) == prompt


def test_a_column_of_kinds_counts_if_every_row_has_one(tmp_path: Path) -> None:
    rows = [{"prompt": kind, "kind": kind.upper()} for kind in KINDS]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    prompts, known = load_own_kinds(path)
    assert known
    assert [(prompt.prompt, prompt.kind) for prompt in prompts] == [(kind, kind) for kind in KINDS]
    assert {prompt.kind for prompt in load(path, "benign")} == {"benign"}
    for other in ("harmless", ""):
        path = write(
            tmp_path / "p.jsonl", "\n".join(map(json.dumps, [*rows, {"prompt": "p", "kind": other}]))
        )
        prompts, known = load_own_kinds(path)
        assert not known
        assert {prompt.kind for prompt in prompts} == {"sensitive"}


def test_half_a_character_in_what_is_known_of_a_row_is_replaced(tmp_path: Path) -> None:
    (row,) = load(write(tmp_path / "p.jsonl", '{"prompt": "hello", "topic": "\\ud83d"}'), "benign")
    assert row.topic == "?"


def test_a_file_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(InputError, match=r"big\.txt has 16 MiB; .*Split it"):
        load(path, "benign")


def test_equal_prompts_count_once(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "file.txt", "one\ntwo\none\n")) == ["one", "two"]


def test_columns_and_splits_are_found_in_capitals_too(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("Prompt,Split,Topic\none,Test,law\ntwo,TUNE,law\n", encoding="utf-8")
    assert [(p.prompt, p.split, p.topic) for p in load(path, "benign")] == [
        ("one", "validation", "law"),
        ("two", "tune", "law"),
    ]


def test_a_prompt_of_two_files_is_in_one_split(tmp_path: Path) -> None:
    for name, split in (("a", "fit"), ("b", "validation")):
        (tmp_path / f"{name}.csv").write_text(
            f"prompt,split\none,{split}\n{name},fit\ntwo,tune\n", encoding="utf-8"
        )
    files: dict[Kind, list[Path]] = {kind: [] for kind in KINDS}
    files["benign"] = [tmp_path / "a.csv", tmp_path / "b.csv"]
    found = {split: [p.prompt for p in rows["benign"]] for split, rows in pool(files).items()}
    assert {split: sorted(rows) for split, rows in found.items()} == {
        "fit": ["a", "b"], "tune": ["two"], "validation": ["one"],
    }  # fmt: skip


def test_a_split_without_prompts_fails_before_hours_of_work(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("prompt,split\none,fit\ntwo,test\n", encoding="utf-8")
    files: dict[Kind, list[Path]] = {kind: [] for kind in KINDS}
    files["harmful"] = [path]
    with pytest.raises(
        InputError, match=r"own\.csv: none of the 2 harmful prompts is in the split tune.*a column `split`"
    ):
        pool(files)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "own.txt", "one\n")
    assert [p.prompt for p in load(Path("~/own.txt"), "benign")] == ["one"]


def test_a_name_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("~draft.txt"), "one\n")
    assert texts(Path("~draft.txt")) == ["one"]


def test_the_splits_of_another_data_set_are_not_ours(tmp_path: Path) -> None:
    lines = [f"prompt number {i}" for i in range(40)]
    plain = load(write(tmp_path / "plain.txt", "\n".join(lines)), "benign")
    rows = [{"prompt": line, "split": "test" if i % 2 else "train"} for i, line in enumerate(lines)]
    theirs = load(write(tmp_path / "theirs.json", json.dumps(rows)), "benign")
    assert [p.split for p in theirs] == [p.split for p in plain]


def test_splits_are_drawn_by_the_prompt_itself(tmp_path: Path) -> None:
    lines = [f"prompt number {i}" for i in range(400)]
    drawn = {p.prompt: p.split for p in load(write(tmp_path / "a.txt", "\n".join(lines)), "benign")}
    again = {p.prompt: p.split for p in load(write(tmp_path / "b.txt", "\n".join(lines[::-2])), "benign")}
    assert all(drawn[text] == split for text, split in again.items())
    share = Counter(drawn.values())
    # Three standard errors of a binomial share of 400.
    assert abs(share["fit"] / 400 - 0.6) < 0.075
    assert abs(share["tune"] / 400 - 0.2) < 0.06


def parquet_file(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def test_parquet(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "Behavior": "b", "ContextString": None},
        {"id": 2, "Behavior": "d", "ContextString": "c"},
    ]
    assert texts(parquet_file(tmp_path / "file.parquet", rows)) == ["b", "c\n\nd"]
    conversation: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "u"}]},
        {"messages": [{"role": "user", "content": 3}]},
    ]
    assert texts(parquet_file(tmp_path / "chat.parquet", conversation[:1])) == ["u"]
    empty = parquet_file(tmp_path / "empty.parquet", [{"prompt": "p"}, {"prompt": None}])
    with pytest.raises(InputError, match=r"empty\.parquet:2: no prompt in columns prompt"):
        texts(empty)


def test_a_parquet_file_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet_file(tmp_path / "file.parquet", [{"prompt": "a" * 1000, "other": "b"}] * 3000)
    assert file.stat().st_size < 10_000
    assert texts(file) == ["a" * 1000]
    monkeypatch.setattr(user_files, "_MAX_UNPACKED", 2 << 20)
    with pytest.raises(InputError, match="more than 2 MiB when unpacked"):
        texts(file)


def test_a_broken_parquet_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="not a readable parquet file"):
        texts(write(tmp_path / "file.parquet", b"PAR1 and then nothing of the kind"))


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        texts(write(tmp_path / "file.parquet", b"PAR1"))


def test_rows_of_empty_cells_are_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text('prompt,topic\nhi,x\n,\n" ",\nyo,\n', encoding="utf-8")
    assert [row.prompt for row in load(tmp_path / "f.csv", "benign")] == ["hi", "yo"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.txt", "", "contains no prompts"),
        ("f.csv", "prompt\n", "contains no prompts"),
        ("f.json", "[]", "contains no prompts"),
        ("f.csv", "prompt,x\none,1\n,2\n", r"f\.csv:3: no prompt in columns prompt, x; one of prompt, goal"),
        ("f.csv", "prompt\nWho was Mao, and when?\n", r"f\.csv:2: more cells than columns"),
        ("f.csv", 'prompt\n"Who was Mao\none\n', r"f\.csv:\d: not valid CSV"),
        ("f.tsv", 'prompt\n"Democracy" in China\n', r"f\.tsv:\d: not valid CSV"),
        ("f.csv", "title\none\n", r"f\.csv:2: no prompt in columns title"),
        ("f.csv", 'prompt,topic\n"   ",x\n', r"f\.csv:2: the prompt is empty"),
        ("f.csv", "prompt\n" + "x" * 200_000, r"f\.csv:\d: not valid CSV"),
        ("f.jsonl", '{"prompt": "one"}\n\n{"prompt": \n', r"f\.jsonl:3: not valid JSON"),
        ("f.jsonl", '{"prompt": "one"}\n{}\n', r"f\.jsonl:2: no prompt in columns \(none\)"),
        ("f.jsonl", '{"prompt": "one"}\n42\n', r"f\.jsonl:2: a row must be text or an object, not int"),
        ("f.jsonl", '{"prompt": 5}\n', r"f\.jsonl:1: the prompt is neither text nor a list of turns"),
        ("f.jsonl", '{"turns": [5]}\n', r"f\.jsonl:1: the prompt is neither text"),
        ("f.jsonl", '{"messages": [{"role": "user"}]}\n', r"f\.jsonl:1: the prompt is neither text"),
        ("f.jsonl", '{"prompt": "a\\ud800b"}\n', r"f\.jsonl:1: .*lone surrogate"),
        ("f.jsonl", "[" * 200_000, r"f\.jsonl:1: not valid JSON"),
        ("f.jsonl", "9" * 5000, r"f\.jsonl:1: "),
        ("f.json", '{"a": 1}', "expected a JSON list"),
        ("f.json", '"one"', "expected a JSON list"),
        (
            "f.json",
            '{"a": ["one"], "b": ["two"]}',
            r"f\.json: unclear which of the lists a, b holds .* Name this one data,",
        ),
        (
            "f.json",
            '{"data": ["one"], "rows": ["two"]}',
            r"f\.json: unclear which of the lists data, rows holds",
        ),
        ("f.json", '["one", null]', r"f\.json:2: a row must be text"),
        ("f.json", '{"prompt": ["one", "two"], "x": ["1", "2", "3"]}', r"f\.json:3: no prompt"),
        ("f.txt", b"caf\xe9", r"f\.txt: not UTF-8 text \(.* at byte 3\)"),
        ("f.docx", "prompt", "unknown format '.docx'; use txt, csv, tsv, json, jsonl or parquet"),
    ],
)
def test_a_bad_file_or_row_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(write(tmp_path / name, content), "benign")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prompt file not found: .*absent\.csv"):
        load(tmp_path / "absent.csv", "benign")
    with pytest.raises(InputError, match="not found"):
        load(tmp_path, "benign")


def test_ids_depend_on_kind_and_text_alone() -> None:
    prompt = Prompt("p", "benign", "s", split="fit")
    assert prompt.id == Prompt("p", "benign").id
    assert len({prompt.id, Prompt("p", "harmful").id, Prompt("P", "benign").id}) == 3
    assert prompt.id == "0202c86ddcb3d80c"  # Run folders store ids, so they must not change between versions.


# ---- stratified ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 40, 190])
def test_a_sample_of_the_grid_is_even(kind: Kind, size: int) -> None:
    pool = [prompt for prompt in grid([kind]) if prompt.split == "fit"]
    sample = stratified(pool, size, seed=3)
    assert len(sample) == len({prompt.id for prompt in sample}) == size
    positions = [pool.index(prompt) for prompt in sample]
    assert positions == sorted(positions)
    forms = Counter(prompt.form for prompt in sample)
    assert max(forms.values()) - min(forms[form] for form in {p.form for p in pool}) <= 1
    subjects = Counter(prompt.subject for prompt in sample)
    assert max(subjects.values()) <= math.ceil(size / len({p.subject for p in pool})) + 1
    english = sum(prompt.language == "en" for prompt in sample) / size
    assert abs(english - sum(prompt.language == "en" for prompt in pool) / len(pool)) < 0.15


def test_a_sample_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    pool = [prompt for prompt in grid(["benign"]) if prompt.split == "tune"]
    sample = stratified(pool, 40, seed=1)
    assert stratified(pool, 40, seed=1) == sample
    assert {p.id for p in stratified(pool[::-1], 40, seed=1)} == {p.id for p in sample}
    assert stratified(pool, 40, seed=2) != sample


def test_a_sample_of_prompts_of_which_nothing_is_known() -> None:
    pool = [Prompt(f"prompt {i}", "benign") for i in range(50)]
    assert len(stratified(pool, 20, seed=0)) == 20
    assert stratified(pool, 20, seed=0) != pool[:20]
    assert stratified(pool, 50, seed=0) == pool
    assert stratified(pool, 500, seed=0) == pool
    assert stratified(pool, 0, seed=0) == []
    assert stratified([], 5, seed=0) == []
    assert len(stratified(pool + pool, 60, seed=0)) == 60


# ---- the shipped grid ----------------------------------------------------------------------------


@cache
def of(kind: Kind) -> list[Prompt]:
    return grid([kind])


def test_the_grid_is_large_enough() -> None:
    assert len(of("sensitive")) >= 1900
    assert len(of("harmful")) >= 1700
    assert len(of("benign")) >= 1600
    assert len(grid()) == sum(len(of(kind)) for kind in KINDS)
    assert len({p.subject for p in of("sensitive")}) >= 80
    assert len({p.topic for p in of("sensitive")}) >= 25
    assert len({p.topic for p in of("harmful")}) >= 12
    assert sum(p.topic == "lookalike" for p in of("benign")) >= 250


def test_every_row_is_complete_and_of_its_file() -> None:
    for kind in KINDS:
        for prompt in of(kind):
            assert prompt.kind == kind
            assert prompt.split in SPLITS
            assert all(prompt.to_row().values()), prompt
            assert prompt.prompt == prompt.prompt.strip()
            assert len(prompt.language) == 2


def test_every_class_has_the_same_forms_and_each_form_in_number() -> None:
    forms = {kind: Counter(prompt.form for prompt in of(kind)) for kind in KINDS}
    assert forms["sensitive"].keys() == forms["harmful"].keys() == forms["benign"].keys()
    assert len(forms["benign"]) >= 20
    assert all(count >= 10 for counts in forms.values() for count in counts.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_class_speaks_chinese_and_other_languages_in_every_split(kind: Kind, split: str) -> None:
    languages = Counter(prompt.language for prompt in of(kind) if prompt.split == split)
    total = sum(languages.values())
    assert languages["zh"] / total >= 0.10
    assert (total - languages["zh"] - languages["en"]) / total >= 0.15
    assert len(languages) >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_splits_hold_out_whole_subjects_and_whole_forms(kind: Kind) -> None:
    for held_out in ("subject", "form"):
        groups = [{getattr(p, held_out) for p in of(kind) if p.split == split} for split in SPLITS]
        assert all(groups)
        for one, other in combinations(groups, 2):
            assert not one & other


def test_forms_are_held_out_across_the_classes_as_well() -> None:
    forms = [{p.form for p in grid() if p.split == split} for split in SPLITS]
    assert sum(map(len, forms)) == len(set().union(*forms))


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_no_split_has_a_prompt_or_a_template_of_another(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "LEAST", {})
    ours, others = ([p for p in grid() if (p.split == split) == own] for own in (True, False))
    assert sealed.check(ours, others) == []


def test_a_minimal_pair_differs_in_kind_and_not_in_form_language_or_split() -> None:
    pairs = defaultdict(list)
    for prompt in grid():
        if prompt.pair:
            pairs[prompt.pair].append(prompt)
    assert len(pairs) >= 350
    for pair in pairs.values():
        one, other = pair
        assert one.kind != other.kind
        assert (one.form, one.language, one.split) == (other.form, other.language, other.split)
    # The separation by the gates is measured on these.
    measured = [p for p in of("sensitive") if p.split == "validation" and p.pair]
    harmful = {p.pair for p in of("harmful")}
    assert sum(p.pair in harmful for p in measured) >= 20


def test_every_split_can_give_what_the_default_recipe_asks_for() -> None:
    for kind in KINDS:
        size = Counter(prompt.split for prompt in of(kind))
        assert size["fit"] >= 400
        assert min(size["tune"], size["validation"]) >= 100


def test_a_subject_is_of_one_class() -> None:
    kinds = defaultdict(set)
    for prompt in grid():
        kinds[prompt.subject].add(prompt.kind)
    assert [subject for subject, found in kinds.items() if len(found) > 1] == []


def test_ids_are_unique() -> None:
    assert len({prompt.id for prompt in grid()}) == len(grid())


def grams(text: str) -> set[str]:
    text = " ".join(text.casefold().split())
    return {text[i : i + 4] for i in range(max(1, len(text) - 3))}


def near_duplicates(prompts: Sequence[str], similarity: float) -> list[tuple[str, str]]:
    """Return the pairs whose sets of 4-grams have a Jaccard index of at least `similarity`.

    Such a pair shares at least one of the rarest (1 − similarity) share of each one's grams, so only
    prompts that meet in an index of those are compared (prefix filtering).
    """
    sets = [grams(prompt) for prompt in prompts]
    frequency = Counter(gram for found in sets for gram in found)
    rank = {gram: i for i, gram in enumerate(sorted(frequency, key=lambda gram: (frequency[gram], gram)))}
    index: dict[str, list[int]] = defaultdict(list)
    pairs = []
    for i, found in enumerate(sets):
        rarest = sorted(found, key=rank.__getitem__)
        rarest = rarest[: len(rarest) - math.ceil(similarity * len(rarest)) + 1]
        for j in {j for gram in rarest for j in index[gram]}:
            shorter, longer = sorted((len(found), len(sets[j])))
            if shorter >= similarity * longer and len(found & sets[j]) >= similarity * len(found | sets[j]):
                pairs.append((prompts[j], prompts[i]))
        for gram in rarest:
            index[gram].append(i)
    return pairs


def test_near_duplicates_are_found() -> None:
    # Compares the search with a plain comparison of every pair, on prompts that were made similar.
    prompts = [prompt.prompt for prompt in of("benign")[::25]]
    prompts += [prompt.replace("the", "a", 1) for prompt in prompts[:20]] + [prompts[30].upper()]
    expected = [
        (a, b)
        for a, b in combinations(prompts, 2)
        if len(grams(a) & grams(b)) >= 0.7 * len(grams(a) | grams(b))
    ]
    assert len(expected) >= 10
    assert sorted(near_duplicates(prompts, 0.7)) == sorted(expected)


@pytest.mark.slow
def test_no_prompt_of_the_package_nearly_repeats_another() -> None:
    text = (resources.files("rs_gguf") / "data" / "judge_pairs.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    # Sets, because a judge's prompt may occur with several answers.
    written, models = (
        {row["prompt"] for row in rows if row["source"] == source} for source in ("written", "model")
    )
    splits = {prompt.prompt: prompt.split for prompt in grid()}
    # The judge learned from answers to some prompts of the grid. None of them may be in tune or test.
    assert {splits[prompt] for prompt in models & splits.keys()} == {"fit"}
    others = sorted(written | (models - splits.keys()))
    # The prompts of a minimal pair differ in a few words only.
    pairs = {prompt.prompt: prompt.pair or prompt.id for prompt in grid()}
    found = near_duplicates([*pairs, *others], 0.7)
    assert [(a, b) for a, b in found if pairs.get(a, a) != pairs.get(b, b)] == []
