"""Bad input ends with one clear line and exit code 2; `--help` does not import PyTorch."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fixtures.children import rs_export
from fixtures.invented_run import invented_metrics

from rs_gguf.cli.main import main
from rs_gguf.pipeline import run as pipeline
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.records.artefacts import STAGES


def invoke(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(arguments), input=stdin)
    return result.exit_code, result.stdout, result.stderr


def test_help_lists_commands_before_stages() -> None:
    code, stdout, _ = invoke("--help")
    assert code == 0
    names = [line.split()[0] for line in stdout.split("Commands:")[1].splitlines() if line.strip()]
    assert names == [
        "run", "scan", "plan", "eval", "remeasure", "judge", "try", "check", "inspect", "convert", "combine",
        "merge", "push", "models", "Stages", *STAGES,
    ]  # fmt: skip
    assert list(STAGES)[:8] == ["answer", "score", "capture", "fit", "tune", "write", "measure", "report"]


def test_score_prints_the_outcomes_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["sensitive", "sensitive", "harmful", "benign"]
    confidences = [0.8, -0.7, 0.3, None]
    answer = {"tokens": [1], "answer": "text", "finished": True, "degenerate": False}
    answers = [{"id": str(i), "kind": kind, **answer} for i, kind in enumerate(kinds)]
    judgements = [{"id": str(i), "confidence": value} for i, value in enumerate(confidences)]
    for name, rows_of in (("answers", answers), ("judgements", judgements)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: {})
    code, stdout, _ = invoke("score", "--out", str(tmp_path))
    assert code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in stdout.splitlines() if "│" in line]
    assert rows == [
        ["sensitive", "1", "1", "0", "0"], ["harmful", "0", "1", "0", "0"], ["benign", "0", "0", "0", "1"],
    ]  # fmt: skip


def test_help_does_not_import_torch() -> None:
    code = "import sys, rs_gguf.cli; sys.exit('torch' in sys.modules or 'llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert invoke("--help")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.toml"], "recipe not found"),
        (["run", "n" * 300], f"{'n' * 300}: File name too long"),
        (["run", "--set", "tune.trails=3"], "tune.trails"),
        (["run", "--set", "model=./missing.gguf"], "missing.gguf"),
        (["run", "--set", "fit.estimators=['lda']"], "no estimator lda"),
        (["models", "pull", "gpt-9"], "no model 'gpt-9'"),
        (["eval", "--model", "m.gguf", "--prompts", "p.csv"], "prompt file not found"),
        (
            ["eval", "--model", "m.gguf", "--control-vector", "v.gguf:x", "--prompts", "p"],
            "PATH or PATH:SCALE",
        ),
        (["inspect", "missing.gguf"], "missing.gguf"),
        (["judge", "--input", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: list[str], message: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")] if arguments[0] == "run" else []
    code, _, stderr = invoke(*arguments, *out)
    assert code == 2
    assert message in stderr
    assert "Traceback" not in stderr
    assert stderr.count("Error:") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_that_cannot_be_written_exits_with_2() -> None:
    command = [sys.executable, "-m", "rs_gguf", "models", "list"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "Error: the output: No space left on device.\n"


def test_a_truncated_model_is_refused_with_llama_cpps_message(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    code, _, stderr = invoke(
        "run", "--out", str(tmp_path / "o"), "--set", f"model={tmp_path / 'broken.gguf'}"
    )
    assert code == 2
    assert "llama.cpp cannot load" in stderr


@pytest.mark.parametrize(
    ("arguments", "seed"),
    [(["report"], 7), (["fit", "--set", "seed=3"], 3), (["fit", "--fresh"], 7), (["run", "--json"], 7)],
)
def test_a_run_continues_with_the_recipe_of_its_folder(
    arguments: list[str], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.toml").write_text('effect = "induce"\nseed = 7\n', encoding="utf-8")
    recipes: list[Recipe] = []

    def run(recipe: Recipe, out: Path, **options: Any) -> dict[str, Any]:
        recipes.append(recipe)
        return invented_metrics(tmp_path / "invented", vector="passed")

    monkeypatch.setattr(pipeline, "run", run)
    code, _, stderr = invoke(*arguments, "--out", str(tmp_path))
    assert code == 0, stderr
    assert [(recipe.effect, recipe.seed) for recipe in recipes] == [("induce", seed)]


@pytest.mark.parametrize(
    ("vector", "adapter", "code"),
    [
        (True, None, 0),
        (False, None, 1),
        (True, False, 0),
        (False, True, 0),
        (True, True, 0),
        (False, False, 1),
    ],
)
def test_a_run_exits_with_1_if_no_file_passes(
    vector: bool, adapter: bool | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = {
        key: "passed" if passed else "failed"
        for key, passed in (("vector", vector), ("adapter", adapter))
        if passed is not None
    }
    metrics = invented_metrics(tmp_path / "invented", **verdicts)
    monkeypatch.setattr(pipeline, "run", lambda recipe, out, **options: metrics)
    exit_code, stdout, stderr = invoke("run", "--json", "--out", str(tmp_path))
    assert (exit_code, json.loads(stdout), stderr) == (code, metrics, "")


def test_a_fresh_start_is_refused_while_another_run_uses_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.mark_done("answer", "key", 1.0)
    with folder.locked():
        code, _, stderr = invoke("run", "--fresh", "--out", str(tmp_path))
    assert (code, folder.seconds()) == (2, {"answer": 1.0})
    assert "in use" in stderr


@pytest.mark.parametrize("command", ["run", "fit", "report"])
@pytest.mark.parametrize("fresh", [False, True])
def test_an_interrupted_run_explains_how_to_continue(
    command: str, fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    code, stdout, stderr = invoke(command, "--out", str(tmp_path), *(["--fresh"] if fresh else []))
    assert (code, stdout) == (130, "")
    assert stderr.startswith("Interrupted. To continue, give the command again")
    assert ("without --fresh" in stderr) == fresh
    assert stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="interrupts by a signal")
def test_an_interrupt_exits_with_130() -> None:
    with rs_export("judge", "--judge", "keywords") as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write('{"prompt": "p", "answer": "a"}\n')
        process.stdin.flush()
        assert process.stderr.readline() == "Judge: keywords\n"  # the command waits for more rows
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "Interrupted.\n"
        assert process.wait() == 130


def test_a_message_has_no_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[2Jp.gguf"
    code, _, stderr = invoke("inspect", str(path))
    assert code == 2
    assert "\x1b" not in stderr
    assert "\\x1b[2Jp.gguf" in stderr


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text on other systems")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_file_whose_name_is_not_utf_8(tmp_path: Path, more: list[str]) -> None:
    path = tmp_path / os.fsdecode(b"a\xff.gguf")
    path.write_bytes(b"not a gguf at all")
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in a locale other than C
    done = subprocess.run(
        [sys.executable, "-m", "rs_gguf", "check", path, *more], capture_output=True, env=strict, check=False
    )
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"a\\udcff.gguf" in done.stdout


def test_an_empty_prompt_file(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n\n")
    code, _, stderr = invoke("eval", "--model", "m.gguf", "--prompts", str(tmp_path / "none.txt"))
    assert code == 2
    assert "contains no prompts" in stderr


def test_check_lists_every_reason_and_exits_1(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a gguf at all")
    code, stdout, _ = invoke("check", str(tmp_path / "bad.gguf"), "--json")
    assert code == 1
    assert json.loads(stdout)["errors"]


def test_judge_on_a_pipe_keeps_order_and_columns() -> None:
    rows = [
        {"prompt": "a", "answer": "I'm sorry, but I can't assist with that.", "own": 1},
        {"prompt": "b", "answer": "Paris.", "own": 2},
    ]
    code, stdout, _ = invoke("judge", "--judge", "keywords", stdin="\n".join(map(json.dumps, rows)))
    assert code == 0
    judged = [json.loads(line) for line in stdout.splitlines()]
    assert [(row["own"], row["verdict"]) for row in judged] == [(1, "refusal"), (2, "answer")]


def test_a_bad_row_names_its_line() -> None:
    code, _, stderr = invoke(
        "judge", "--judge", "keywords", stdin='{"prompt": "a", "answer": "b"}\n{"prompt": 1}\n'
    )
    assert code == 2
    assert "-:2" in stderr


def test_the_rubric_has_twelve_categories_of_refusal() -> None:
    code, stdout, _ = invoke("judge", "--show-rubric")
    assert code == 0
    assert len(json.loads(stdout)["refusal"]) == 12
