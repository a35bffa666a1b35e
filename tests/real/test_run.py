"""The whole pipeline on the real model, killed in the middle of stages, and what its files promise."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
from safetensors.numpy import load_file

from rs_gguf.cli.main import main
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.records.artefacts import STAGES
from rs_gguf.steering import adapter_effect, effect_check
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering.file import check_effect

pytestmark = pytest.mark.real

SMALL = [
    "prompts.fit=14", "prompts.gate_only=12", "prompts.tune=6", "prompts.validation=4",
    "answers.fit_tokens=16", "answers.tokens=16",
    "answers.test_tokens=24", "tune.logprob_trials=2", "tune.finalists=1",
    "fit.estimators=['contrast-wrmd','wrmd']",
    "fit.ridges=[1.0]", "fit.gate_ridges=[1.0]", "tune.full_prompts=2", "measure.baselines=['rmd']",
]  # fmt: skip
N_TEST = 12  # prompts of the test split, which each side answers together


def command(out: Path, *more: str, stage: str = "run") -> list[str]:
    sets = [part for value in SMALL for part in ("--set", value)]
    return [sys.executable, "-m", "rs_gguf", stage, "--out", str(out), *sets, *more]


def environment(out: Path) -> dict[str, str]:
    """One where the user's models are at hand, and judgements are kept for this run alone."""
    cache, own = platformdirs.user_cache_path("rs-gguf"), out.parent / f"{out.name}-cache" / "rs-gguf"
    if not own.exists():
        own.mkdir(parents=True)
        for name in ("models", "q5_0_to_q8_0"):
            (cache / name).mkdir(exist_ok=True)
            (own / name).symlink_to(cache / name)
    return {**os.environ, "XDG_CACHE_HOME": str(own.parent)}


def ended(out: Path, *more: str, stage: str = "run") -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
    done = subprocess.run(
        command(out, *more, stage=stage), env=environment(out), capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done


def rows_of(path: Path) -> dict[str, Any]:
    """Rows by their ids; a log's header and a line that is not whole are left out."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = [row for row in map(json.loads, lines) if "id" in row]
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def state_of(out: Path) -> dict[str, Any]:
    """The stages that are done, each with its key and the seconds that it took."""
    found: dict[str, Any] = json.loads((out / "state.json").read_text())
    return found


def killed(out: Path, log: str, count: int) -> dict[str, Any]:
    """What a stage's log holds of a run that is killed (SIGKILL) as soon as it has so many rows."""
    with subprocess.Popen(
        command(out), env=environment(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and len(rows_of(out / f"{log}.part")) < count:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
        process.kill()
    kept = rows_of(out / f"{log}.part")
    assert len(kept) >= count
    assert not (out / log).exists(), "the stage had ended"
    return kept


@dataclass(frozen=True)
class Killed:
    """A run that went to its end after several kills, and what it had then."""

    out: Path
    rows: dict[str, dict[str, Any]]  # by the log that they were in
    states: list[dict[str, Any]]
    answered: Path  # its folder once all was answered


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, real_model: Path) -> Killed:
    """Killed in the middle of the answers, of the search and of the measurement."""
    out = tmp_path_factory.mktemp("run") / "out"
    rows, states = {"answers.jsonl": killed(out, "answers.jsonl", 8)}, []
    ended(out, stage="answer")
    shutil.copytree(out, out.with_name("answered"))
    for log, count in (("trials.jsonl", 1), ("measured.jsonl", N_TEST)):
        states.append(state_of(out))
        rows[log] = killed(out, log, count)
    states.append(state_of(out))
    ended(out)
    return Killed(out, rows, states, out.with_name("answered"))


def test_a_killed_run_goes_on_where_it_was(finished: Killed) -> None:
    for log, rows in finished.rows.items():
        assert rows.items() <= rows_of(finished.out / log).items()
    assert [list(done)[-1] for done in finished.states] == ["answer", "fit", "write"]
    for done in finished.states:  # with their seconds: no stage was done again
        assert done.items() <= state_of(finished.out).items()


def test_a_killed_run_finds_what_one_that_was_not_does(finished: Killed) -> None:
    """From the same answers: what is answered together decides how sums are rounded, and a word at times."""
    whole = finished.answered
    ended(whole, stage="tune")
    for name in ("judgements.jsonl", "directions.safetensors", "gated_adapter.safetensors"):
        assert (whole / name).read_bytes() == (finished.out / name).read_bytes(), name
    tuned = [json.loads((out / "tune.json").read_text()) for out in (whole, finished.out)]
    for found in tuned:
        for trial in found["trials"]:
            del trial["seconds"], trial["unsteered_seconds"]
    assert tuned[0] == tuned[1]


def test_two_processes_find_what_one_does(finished: Killed) -> None:
    """From the same answers, under torchrun: the directions, to rounding."""
    one, two = finished.answered, finished.out.with_name("two")
    shutil.copytree(one, two, ignore=lambda *_: {"activations"})
    (two / "state.json").write_text(json.dumps({"answer": state_of(one)["answer"]}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, *command(two, stage="fit")[1:]],
        env=environment(two), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("directions.safetensors", "gated_adapter.safetensors"):
        arrays = [load_file(out / name) for out in (one, two)]
        assert arrays[0].keys() == arrays[1].keys()
        for key, expected in arrays[0].items():
            tolerance = 1e-10 if expected.dtype == np.float64 else 1e-6 * np.abs(expected).max()
            np.testing.assert_allclose(arrays[1][key], expected, rtol=1e-9, atol=tolerance, err_msg=key)


def test_metrics_follow_the_contract(finished: Killed) -> None:
    out = finished.out
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["model"]) == {"name", "sha256", "architecture", "n_layer", "n_embd"}
    assert metrics["model"]["architecture"] == "qwen2"
    vector, adapter = metrics["files"]["vector"], metrics["files"]["adapter"]
    for kind in ("sensitive", "harmful", "benign"):
        found = vector["sets"][kind]
        assert found["n"] == 4
        explicit = found["explicit_steered"]
        low, high = explicit["ci95"]
        assert 0 <= low <= explicit["n"] / max(1, explicit["of"]) <= high <= 1
        assert sum(map(sum, found["transitions"])) <= found["n"]
    assert vector["effect_check"]["effect_observed"] is True
    assert "--control-vector " in vector["llama_cpp"]["command"]
    assert adapter["file"] == "remove-adapter.gguf"
    assert set(adapter["sets"]) == set(vector["sets"])
    assert adapter["effect_check"]["effect_observed"] is True
    assert {file["acceptance"]["verdict"] for file in (vector, adapter)} <= {"passed", "failed", "undecided"}
    assert "--lora" in adapter["llama_cpp"]["command"]
    for fitted in json.loads((out / "fit.json").read_text())["directions"]:
        # The first block sees the same token in every prompt's last place: no direction to compare.
        for name in ("score", "auroc", "harm_cosine", "contrast_cosine"):
            assert len(fitted[name]) == metrics["model"]["n_layer"]
        assert all(-1 <= cosine <= 1 for cosine in fitted["contrast_cosine"][1:])
    assert set(metrics["seconds"]) >= {"answer", "score", "capture", "fit", "tune", "write", "measure"}
    rows = [json.loads(line) for line in (out / "test_answers.jsonl").read_text().split("\n") if line]
    assert len(rows) == N_TEST
    assert (out / "report.html").stat().st_size < 3_000_000
    assert "scatter-title" in (out / "report.html").read_text(), "the activations are drawn"
    assert "2512.16602" in (out / "card.md").read_text()


def test_python_in_the_card_runs(finished: Killed, real_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = finished.out
    monkeypatch.chdir(out)
    blocks = re.findall(r"```python\n(.*?)```", (out / "card.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        names: dict[str, Any] = {}
        exec(compile(code.replace("MODEL.gguf", str(real_model)), "card.md", "exec"), names)
        assert names["llm"].create_completion("Hello", max_tokens=2)["choices"][0]["text"]
        names["llm"].close()


def test_running_again_does_nothing(finished: Killed) -> None:
    out = finished.out
    files = [out / "remove.gguf", out / "remove-adapter.gguf"]
    before = [file.read_bytes() for file in files]
    again = ended(out, "--json")
    assert again.stderr.count("done before") == len(STAGES) - 1, "the page alone is written again"
    assert json.loads(again.stdout)["files"]["vector"]["file"] == "remove.gguf"
    assert [file.read_bytes() for file in files] == before


def test_two_runs_give_the_same_answers_and_scores(real_model: Path, tmp_path: Path) -> None:
    less = [
        "--set",
        "prompts.fit=8",
        "--set",
        "prompts.tune=4",
        "--set",
        "answers.fit_tokens=10",
        "--set",
        "answers.tokens=10",
    ]
    runs = [tmp_path / "a", tmp_path / "b"]
    for out in runs:
        ended(out, *less, stage="score")
    for name in ("answers.jsonl", "judgements.jsonl"):
        one, other = ((out / name).read_bytes() for out in runs)
        assert one == other, name


def test_the_written_file_moves_the_model_by_its_directions(finished: Killed, real_model: Path) -> None:
    out = finished.out
    vector = control_vector.read(out / "remove.gguf")
    with LlamaModel(real_model, n_parallel=4) as model:
        shown = check_effect(out / "remove.gguf", model)
    assert shown.effect_observed
    assert shown.largest_relative_error < effect_check.TOLERANCE
    assert shown.kl_mean is not None
    assert shown.kl_mean > 0
    assert vector.provenance["measured"] is True


def test_the_written_adapter_moves_the_model_by_its_matrices(finished: Killed, real_model: Path) -> None:
    out = finished.out
    with LlamaModel(real_model, n_parallel=4, n_ctx=1024) as model:
        shown = check_effect(out / "remove-adapter.gguf", model)
    assert shown.effect_observed
    assert shown.largest_relative_error < adapter_effect.TOLERANCE
    assert shown.kl_mean is not None
    assert shown.kl_mean > 0
    assert lora.read(out / "remove-adapter.gguf").provenance["measured"] is True


def test_check_proves_the_effect_and_refuses_another_models_vector(
    finished: Killed, real_model: Path, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    out = finished.out
    runner = CliRunner()
    good = runner.invoke(main, ["check", str(out / "remove.gguf"), "--model", str(real_model), "--json"])
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)["effect_check"]["effect_observed"] is True
    vector = control_vector.read(out / "remove.gguf")
    narrow = {layer: row[:64] for layer, row in vector.directions.items()}
    control_vector.write(type(vector)(narrow), tmp_path / "narrow.gguf")
    bad = runner.invoke(main, ["check", str(tmp_path / "narrow.gguf"), "--model", str(real_model)])
    assert bad.exit_code == 1
    assert "has width 64" in bad.stdout


def test_eval_compares_both_sides(finished: Killed, real_model: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    out = finished.out
    prompts = tmp_path / "mine.csv"
    prompts.write_text("Goal\nName three rivers in Europe.\nWhat does a glazier do?\n")
    arguments = ["eval", "--model", str(real_model), "--control-vector", f"{out / 'remove.gguf'}:1.0"]
    arguments += ["--prompts", str(prompts), "--tokens", "12", "--json", str(tmp_path / "eval.json")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["sets"]["mine"]["n"] == 2
    assert all(row["answer_unsteered"] and row["answer_steered"] for row in found["rows"])
