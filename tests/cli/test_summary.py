"""What a run prints at its end, on a terminal of 80 columns."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fixtures.invented_run import SIDES, invented_rows, make_run, without_adapter
from rich.console import Console

from rs_gguf.cli.main import main
from rs_gguf.cli.summary import print_counts, print_results
from rs_gguf.records.conversation import KINDS, Answer, Prompt
from rs_gguf.records.rows import write_rows
from rs_gguf.report.page import write_report
from rs_gguf.report.text import interval


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run all of whose answers are judged."""
    rows = invented_rows()
    for row in rows:
        for side in SIDES:
            row[f"confidence_{side}"] = math.copysign(0.5, row[f"confidence_{side}"] or 1)
    return make_run(tmp_path / "run", rows)


def metrics_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return value


def printed(metrics: dict[str, Any], out: Path = Path("out/demo")) -> str:
    """What a terminal of 80 columns shows at the end of a run."""
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    print_results(console, metrics, out)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def cells(text: str, title: str) -> list[list[str]]:
    """The cells of the table with this title, line by line, without the head."""
    lines = text.split(f"{title}")[1].split("└")[0].splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def test_tables_go_from_explicit_refusals_to_outcomes_and_transitions(run_folder: Path) -> None:
    metrics = metrics_of(run_folder)
    vector, adapter = metrics["files"]["vector"]["sets"], metrics["files"]["adapter"]["sets"]
    text = printed(metrics)
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith("│"))
    titles = ("Explicit refusals", "Outcomes", "Transitions", "Judge:", "Use the gated adapter.")
    assert [text.index(title) for title in titles] == sorted(text.index(title) for title in titles)
    explicit = cells(text, "Explicit refusals (95% interval)")
    outcomes = cells(text, "Outcomes")
    transitions = cells(text, "Transitions of the same prompts (95% interval)")
    for k, kind in enumerate(KINDS):
        shares = [vector[kind]["explicit_unsteered"]]
        shares += [of[kind]["explicit_steered"] for of in (vector, adapter)]
        assert explicit[2 * k][:4] == [kind, *(f"{s['n']} of {s['of']}" for s in shares)]
        assert explicit[2 * k + 1][1:4] == [interval(s["ci95"]) for s in shares]
        sides = [vector[kind]["outcomes_unsteered"]] + [
            of[kind]["outcomes_steered"] for of in (vector, adapter)
        ]
        names = ("complies", "refuses", "fails", "unjudged")
        assert [row[2:] for row in outcomes[3 * k : 3 * k + 3]] == [
            ["40", *(str(of[name]) for name in names)] for of in sides
        ]
        for n, of in enumerate((vector, adapter)):
            row = transitions[4 * k + 2 * n]
            names = ("opened", "kept", "closed", "broken")
            assert row[2:] == [f"{of[kind][name]['n']} of {of[kind][name]['of']}" for name in names]


def test_commands_are_whole_and_the_recommended_file_is_first(run_folder: Path) -> None:
    metrics = metrics_of(run_folder)
    lines = printed(metrics).splitlines()
    commands = [line for line in lines if line.startswith("llama-server")]
    assert commands == [metrics["files"][key]["llama_cpp"]["command"] for key in ("adapter", "vector")]
    assert "Gated adapter, out/demo/remove-adapter.gguf (passed):" in lines


def test_a_file_that_fails_on_a_sealed_set_is_not_recommended(run_folder: Path) -> None:
    metrics = metrics_of(run_folder)
    sealed = metrics_of(run_folder) | {
        "sealed": {"set": "a.jsonl", "set_sha256": "0", "opened": "2026-12-02"}
    }
    sealed["files"]["adapter"]["acceptance"] = {"verdict": "failed", "reasons": ["11 answers fail"]}
    (run_folder / "sealed.json").write_text(json.dumps(sealed))
    text = printed(metrics, run_folder)
    assert "Use the gated adapter" not in text
    assert "gated adapter: on the sealed set: 11 answers fail" in text


def test_a_folder_may_have_a_name_that_is_not_text(run_folder: Path) -> None:
    """Python keeps bytes that are not UTF-8 as halves of surrogate pairs."""
    data = io.BytesIO()
    console = Console(file=io.TextIOWrapper(data, encoding="utf-8"), width=80)
    print_results(console, metrics_of(run_folder), Path("out/\udcff"))
    console.file.flush()
    assert "out/\ufffd/remove-adapter.gguf" in data.getvalue().decode()


@pytest.mark.parametrize(
    ("verdict", "said"),
    [("failed", "Do not use either file as it is."), ("undecided", "Undecided: more prompts are needed.")],
)
def test_the_reasons_of_each_file_are_printed(run_folder: Path, verdict: str, said: str) -> None:
    metrics = metrics_of(run_folder)
    for key, reason in (("vector", "explicit refusals rose"), ("adapter", "[red]not markup[/] \x1b[31m")):
        metrics["files"][key]["acceptance"] = {"verdict": verdict, "reasons": [reason]}
    text = printed(metrics)
    assert said in text
    assert "  control vector: explicit refusals rose\n" in text
    assert "  gated adapter: [red]not markup[/] ␛[31m\n" in text
    assert text.count(f"({verdict}):") == 2


def test_a_run_without_an_adapter(run_folder: Path) -> None:
    text = printed(metrics_of(without_adapter(run_folder)))
    assert "Use the control vector." in text
    assert "adapter" not in text


def test_answers_to_harmful_prompts_are_an_option_of_the_report(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finished(*_: object, **__: object) -> dict[str, Any]:
        write_report(run_folder)
        return metrics_of(run_folder)

    monkeypatch.setattr("rs_gguf.cli.main._run", finished)
    page = run_folder / "report.html"
    for arguments, shown in (((), False), (("--harmful-answers",), True), ((), False)):
        result = CliRunner().invoke(main, ["report", "--out", str(run_folder), *arguments])
        assert result.exit_code == 0
        assert ("Show this answer to a harmful prompt" in page.read_text("utf-8")) == shown
    assert CliRunner().invoke(main, ["measure", "--harmful-answers"]).exit_code == 2


def test_schema_1_is_printed_without_what_it_did_not_measure() -> None:
    path = Path(__file__).parents[1] / "fixtures" / "metrics_1.json"
    text = printed(json.loads(path.read_text(encoding="utf-8")))
    assert "Explicit refusals" in text
    assert "Transitions" not in text
    assert "None" not in text


def test_counts_before_the_fit_are_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failure is not a refusal, and within the neutral band nothing is judged."""
    cases: list[tuple[float | None, str | None, bool]] = [
        (-0.9, None, False), (0.9, "direct", False), (0.9, "vagueness", False), (0.9, "nonsense", False),
        (0.9, "direct", True), (0.1, "direct", False), (None, None, False),
    ]  # fmt: skip
    prompts = [Prompt(str(i), "harmful") for i in range(len(cases))]
    answers = [
        {**prompt.to_row(), **Answer([1], "text", True, degenerate).to_row()}
        for prompt, (_, _, degenerate) in zip(prompts, cases, strict=True)
    ]
    judgements = [
        {"id": prompt.id, "confidence": confidence, "category": category}
        for prompt, (confidence, category, _) in zip(prompts, cases, strict=True)
    ]
    write_rows(tmp_path / "answers.jsonl", answers)
    write_rows(tmp_path / "judgements.jsonl", judgements)
    print_counts(tmp_path)
    (head, *rows) = capsys.readouterr().out.split("Prompts for fit and search")[1].splitlines()[2:]
    assert head.replace("┃", " ").split() == ["prompts", "complies", "refuses", "fails", "unjudged"]
    assert ["harmful", "1", "2", "2", "2"] in [row.replace("│", " ").split() for row in rows]
