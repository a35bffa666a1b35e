"""The whole pipeline on the real model, killed in every stage, and what its files promise."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rs_gguf import control_vector, lora, proof
from rs_gguf.cli import main
from rs_gguf.llama import LlamaModel

pytestmark = pytest.mark.real

SMALL = [
    "prompts.fit=14", "prompts.unanswered=12", "prompts.tune=10", "prompts.test=4", "answers.tokens=16",
    "answers.test_tokens=24", "tune.trials=2", "tune.finalists=1", "fit.estimators=['contrast-wrmd','wrmd']",
    "fit.ridges=[1.0]", "fit.gate_ridges=[1.0]", "tune.full=4",
]  # fmt: skip
LINES = (
    "Answering prompts", "Judging answers", "Reading activations", "Fitting directions",
    "Searching layers", "Writing and proving", "Measuring before and after", "Writing the report",
)  # fmt: skip


def command(out: Path, *more: str) -> list[str]:
    sets = [part for value in SMALL for part in ("--set", value)]
    return [sys.executable, "-m", "rs_gguf", "run", "--out", str(out), *sets, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, real_model: Path) -> tuple[Path, list[list[str]]]:
    """A run that was killed (SIGKILL) as soon as each stage but the last had ended, then went to its end."""
    out = tmp_path_factory.mktemp("run") / "out"
    told = []
    for stage in LINES[:-1]:
        process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if stage in line and "done before" not in line:
                process.kill()
                break
        process.stderr.close()
        process.wait()
        told.append(lines)
    done = subprocess.run(command(out), capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    told.append(done.stderr.splitlines())
    return out, told


def test_a_killed_run_goes_on_where_it_was(finished: tuple[Path, list[list[str]]]) -> None:
    _, told = finished
    for k, lines in enumerate(told):
        for stage in LINES[:k]:
            # A stage whose line was printed may have been killed before it was recorded: its rows are kept,
            # and it ends at once. It is never begun anew from nothing.
            (line,) = [line for line in lines if stage in line]
            assert "done before" in line or line.rstrip().endswith("s"), line


def test_metrics_follow_the_contract(finished: tuple[Path, list[list[str]]]) -> None:
    out, _ = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["model"]) == {"name", "sha256", "architecture", "n_layer", "n_embd"}
    assert metrics["model"]["architecture"] == "qwen2"
    for kind in ("sensitive", "harmful", "benign"):
        found = metrics["sets"][kind]
        assert found["n"] == 4
        low, high = found["ci95_steered"]
        assert 0 <= low <= found["refusal_steered"] <= high <= 1
    assert metrics["proof"]["effect_observed"] is True
    assert "--control-vector-scaled" in metrics["llama_cpp"]["command"]
    adapter = metrics["adapter"]
    assert adapter["file"] == "remove-adapter.gguf"
    assert set(adapter["sets"]) == set(metrics["sets"])
    assert adapter["proof"]["effect_observed"] is True
    assert "--lora" in adapter["llama_cpp"]["command"]
    for fitted in json.loads((out / "fit.json").read_text())["directions"]:
        # The first block sees the same token in every prompt's last place: no direction to compare.
        for name in ("score", "auroc", "harm_cosine", "contrast_cosine"):
            assert len(fitted[name]) == metrics["model"]["n_layer"]
        assert all(-1 <= cosine <= 1 for cosine in fitted["contrast_cosine"][1:])
    assert set(metrics["seconds"]) >= {"answer", "score", "capture", "fit", "tune", "write", "measure"}
    rows = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().split("\n") if line]
    assert len(rows) == 12
    assert (out / "report.html").stat().st_size < 3_000_000
    assert "scatter-title" in (out / "report.html").read_text(), "the activations are drawn"
    assert "2512.16602" in (out / "card.md").read_text()


def test_python_in_the_card_runs(
    finished: tuple[Path, list[list[str]]], real_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    monkeypatch.chdir(out)
    blocks = re.findall(r"```python\n(.*?)```", (out / "card.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        names: dict[str, Any] = {}
        exec(compile(code.replace("MODEL.gguf", str(real_model)), "card.md", "exec"), names)
        assert names["llm"].create_completion("Hello", max_tokens=2)["choices"][0]["text"]
        names["llm"].close()


def test_running_again_does_nothing(finished: tuple[Path, list[list[str]]]) -> None:
    out, _ = finished
    files = [out / "remove.gguf", out / "remove-adapter.gguf"]
    before = [file.read_bytes() for file in files]
    again = subprocess.run(command(out, "--json"), capture_output=True, text=True, check=False)
    assert again.returncode in (0, 1), again.stderr
    assert again.stderr.count("done before") == len(LINES) - 1, "the page alone is written again"
    assert json.loads(again.stdout)["vector"]["file"] == "remove.gguf"
    assert [file.read_bytes() for file in files] == before


def test_two_runs_make_the_same_files(real_model: Path, tmp_path: Path) -> None:
    less = ["prompts.unanswered=0", "prompts.tune=6", "answers.tokens=10", "tune.trials=1", "tune.full=0"]
    runs = [tmp_path / "a", tmp_path / "b"]
    for out in runs:
        words = command(out, *(part for value in less for part in ("--set", value)))
        words[words.index("run")] = "write"
        subprocess.run(words, capture_output=True, check=True)
    for name in ("answers.jsonl", "scores.jsonl", "remove.gguf", "remove-adapter.gguf"):
        one, other = ((out / name).read_bytes() for out in runs)
        assert one == other, name


def test_the_written_file_moves_the_model_by_its_directions(
    finished: tuple[Path, list[list[str]]], real_model: Path
) -> None:
    out, _ = finished
    vector = control_vector.read(out / "remove.gguf")
    shown = proof.prove_vector(vector, real_model)
    assert shown.effect_observed
    assert shown.largest_relative_error < proof.TOLERANCE
    assert shown.kl_mean > 0
    assert vector.provenance["measured"] is True


def test_the_written_adapter_moves_the_model_by_its_matrices(
    finished: tuple[Path, list[list[str]]], real_model: Path
) -> None:
    out, _ = finished
    with LlamaModel(real_model, n_parallel=4, n_ctx=1024) as model:
        shown = proof.prove(out / "remove-adapter.gguf", model)
    assert shown.effect_observed
    assert shown.largest_relative_error < proof.ADAPTER_TOLERANCE
    assert shown.kl_mean > 0
    assert lora.read(out / "remove-adapter.gguf").provenance["measured"] is True


def test_check_proves_the_effect_and_refuses_another_models_vector(
    finished: tuple[Path, list[list[str]]], real_model: Path, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    out, _ = finished
    runner = CliRunner()
    good = runner.invoke(main, ["check", str(out / "remove.gguf"), "--model", str(real_model), "--json"])
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)["proof"]["effect_observed"] is True
    vector = control_vector.read(out / "remove.gguf")
    narrow = {layer: row[:64] for layer, row in vector.directions.items()}
    control_vector.write(type(vector)(narrow), tmp_path / "narrow.gguf")
    bad = runner.invoke(main, ["check", str(tmp_path / "narrow.gguf"), "--model", str(real_model)])
    assert bad.exit_code == 1
    assert "64 wide" in bad.stdout


def test_eval_compares_both_sides(
    finished: tuple[Path, list[list[str]]], real_model: Path, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    out, _ = finished
    prompts = tmp_path / "mine.csv"
    prompts.write_text("Goal\nName three rivers in Europe.\nWhat does a glazier do?\n")
    arguments = ["eval", "--model", str(real_model), "--control-vector", f"{out / 'remove.gguf'}:1.0"]
    arguments += ["--prompts", str(prompts), "--tokens", "12", "--json", str(tmp_path / "eval.json")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["sets"]["mine"]["n"] == 2
    assert all(row["answer_baseline"] and row["answer_steered"] for row in found["rows"])
