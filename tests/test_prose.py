"""The linter of prose finds what CONTRIBUTING.md rules out, and nothing in code, tables and headings."""

from __future__ import annotations

from pathlib import Path

import pytest
from prose import check, findings, html, main, markdown, python, read_baseline, sentences, template

LONG = "word " * 31


def problems(text: str) -> list[tuple[int, str]]:
    """Lines and problems of a Markdown text."""
    return [(finding.line, finding.problem) for passage in markdown(text) for finding in findings(passage)]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three? Four", 4),
        ("A value, e.g. 0.5, is written as it is (cf. Eq. 4, i.e. García et al. 2025). Two.", 2),
        ("Prompts, answers, etc. are rows. Two.", 2),
        ("Rows, etc. Then more.", 2),
        ("Version 1.0 of llama.cpp loads README.md. llama.cpp is fast.", 2),
        ("He says “yes.” (Really.) Two.", 3),
        ("A list: one; two\nand three …", 1),
    ],
)
def test_sentences_end_where_a_reader_sees_an_end(text: str, count: int) -> None:
    found = list(sentences(text))
    assert len(found) == count
    assert "".join(sentence for _, sentence in found) == text
    assert all(text.startswith(sentence, start) for start, sentence in found)


def test_a_sentence_has_at_most_30_words() -> None:
    assert problems("word " * 30 + "– . " + "word " * 30 + ".") == []
    assert problems(f"Short.\n{LONG}.") == [
        (2, "31 words, at most 30: split the sentence “word word word word word word …”")
    ]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("The reader is told of it.", "is told of"),
        ("It\nis  told\nof it.", "is told of"),
        ("It Reckons.", "Reckons"),
        ("A file that is no model.", "is no model"),
        ("The speed of the file and that of the model.", "that of"),
        ("All, but for one.", "but for"),
        ("The text falls apart.", "falls apart"),
        ("Harm's refusals stay.", "Harm's refusals"),
        ("It is *by\nitself*.", "by itself"),
        ("It passes the [safety gate](proof.md).", "safety gate"),
    ],
)
def test_banned_words_are_found_with_what_to_write_instead(text: str, word: str) -> None:
    (problem,) = [problem for _, problem in problems(text)]
    quoted, advice = problem.split(": ", 1)
    assert quoted == f"“{word}”"
    assert advice


@pytest.mark.parametrize(
    "text",
    [
        "There is no release yet. It is no longer here. There are no rows.",
        "He improves on it; the unclassified story; the proofreader; but forty.",
        'Run `rungs` and ``proof``, $so many$, see [it](proof.md "effect_check") <!-- proof -->.',
    ],
)
def test_other_words_are_not_banned(text: str) -> None:
    assert problems(text) == []


@pytest.mark.parametrize(
    "text",
    [
        f"# {LONG} proof",
        f"{LONG} proof\n====",
        f"| proof | b |\n| --- | --- |\n| {LONG} | proof |",
        f"```sh\n{LONG} proof $HOME\n```",
        f"~~~\n{LONG}\n~~~\n\n    {LONG} proof",
        f"$$\n{LONG} proof\n$$",
        f"One word: `{LONG}`.",
        f"::: rs_gguf.proof\n    {LONG}",
    ],
)
def test_headings_tables_code_and_formulas_are_not_prose(text: str) -> None:
    assert problems(text) == []


def test_lines_are_counted_through_formulas_and_lists() -> None:
    text = "$$\na\n$$\n\n- one\n- two, `code`\n  so many\n\n> but for"
    assert [line for line, _ in problems(text)] == [7, 9]


def test_a_list_item_and_a_paragraph_are_sentences_of_their_own() -> None:
    half = "word " * 20
    assert problems(f"{half}\n\n{half}\n\n- {half}\n- {half}") == []


def test_docstrings_and_help_texts_are_prose_and_other_strings_are_not() -> None:
    text = '''"""A module, but for one."""
import click


class Thing:
    """Is told of it.

        so many lines of code

    first: so many
    second: those of others
    """

    async def run(self):
        """So many."""
        return "so many"


@click.option("--many", help="So "
              "many.")
def command():
    """Do it.

    \\b
    so many columns
    """
    # so many
'''
    found = [(finding.line, finding.problem) for part in python(text) for finding in findings(part)]
    assert [f"{line}{problem.split(':')[0]}" for line, problem in sorted(found)] == [
        "1“but for”", "6“Is told of”", "10“so many”", "11“those of”", "15“So many”", "19“So many”",
    ]  # fmt: skip


def test_messages_are_prose_and_short_texts_are_not() -> None:
    text = """def load(name):
    if name in ("so many", "but for"):
        raise ValueError(f"{name}: there are so many files, "
                         f"but for {name} none")
    return "this text has so many words"
"""
    found = sorted((one.line, one.problem.split(":")[0]) for part in python(text) for one in findings(part))
    assert found == [(3, "“but for”"), (3, "“so many”"), (5, "“so many”")]


def test_a_list_in_a_message_ends_the_sentence() -> None:
    half = "word " * 20
    parts = python(f'x = "{half}:\\n{half}"')
    assert [finding for part in parts for finding in findings(part)] == []


def test_parameters_of_a_docstring_are_sentences_of_their_own() -> None:
    half = "word " * 20
    parts = python(f'"""Do it.\n\none: {half}\n    more\ntwo: {half}\n"""')
    assert [finding for part in parts for finding in findings(part)] == []


def test_a_value_of_a_template_is_one_word_and_alternatives_are_apart() -> None:
    text = "{# so many #}It {% if a %}is{% else %}told{% endif %}\n{{ so | many }} {%- elif b -%} so\nmany."
    found = [finding for part in markdown(template(text)) for finding in findings(part)]
    assert [finding.line for finding in found] == [2]
    assert template("a {{ b |\n c }} d") == "a `x`\n d"


def test_of_a_page_paragraphs_are_prose_and_tables_are_not() -> None:
    text = """<style>so many</style><h1>so many</h1>
<table><tr><td>so many</td></tr></table><p class="so many">
  One <b>so</b> <i>many</i>
  <br>two</p>so<div>many</div>
but for"""
    found = [finding for part in html(text) for finding in findings(part)]
    assert [(finding.line, finding.problem[1:8]) for finding in found] == [(3, "so many"), (5, "but for")]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("So many, but for one.\n", encoding="utf-8")
    return tmp_path


def run(project: Path, *arguments: str) -> int:
    return main(arguments, project, project / "baseline")


def test_without_a_baseline_nothing_is_accepted(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(project) == 1
    assert capsys.readouterr().out.splitlines() == [
        "README.md:1: “So many”: give the number, or name the thing",
        "README.md:1: “but for”: use “except”",
        "README.md: 2 findings, at most 0 are accepted. Rewrite what you added.",
    ]


def test_the_baseline_only_shrinks(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, baseline = project / "README.md", project / "baseline"
    assert run(project, "--update") == 0
    assert read_baseline(baseline) == {"README.md": 2}
    assert capsys.readouterr().out == ""

    readme.write_text("So many.\n", encoding="utf-8")
    assert run(project) == 0
    assert "1 findings, down from 2. Run tests/prose.py --update." in capsys.readouterr().out
    assert run(project, "--update") == 0
    assert read_baseline(baseline) == {"README.md": 1}

    readme.write_text("So many, but for one.\n", encoding="utf-8")
    (project / "docs" / "new.md").write_text("So many.\n", encoding="utf-8")
    assert run(project, "--update") == 1
    assert read_baseline(baseline) == {"README.md": 1}
    assert "docs/new.md: 1 findings, at most 0" in capsys.readouterr().out


def test_a_file_that_is_moved_or_split_takes_its_number_along(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(project, "--update")
    (project / "README.md").unlink()
    for name, text in (("a", "So many.\n"), ("b", "But for one, and so many.\n")):
        (project / "docs" / f"{name}.md").write_text(text, encoding="utf-8")
    assert run(project) == 1
    assert "README.md: gone. Run tests/prose.py --update" in capsys.readouterr().out
    assert run(project, "--update") == 1  # three findings, where there were two
    assert read_baseline(project / "baseline") == {"docs/a.md": 1, "docs/b.md": 1}


def test_named_files_are_listed_whatever_the_baseline(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(project, "--update")
    assert run(project, str(project / "README.md")) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    (project / "card.md.jinja").write_text("Fine.", encoding="utf-8")
    assert check(project / "card.md.jinja") == []
    assert run(project, str(project / "card.md.jinja")) == 0
