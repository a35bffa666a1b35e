"""`rs-export push` lists what it would upload, and uploads to a hub on the loopback interface."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from fixtures.hub import Hub
from fixtures.published_run import SECRET, publishable_run
from huggingface_hub import ModelCard

from rs_gguf.cli.main import main
from rs_gguf.models import upload

FILES = [
    "README.md", "metrics.json", "preset.ini", "recipe.toml", "remove-adapter.gguf", "remove.gguf",
    "report.html", "reproduce.json",
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return publishable_run(tmp_path / "run")


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.stop()


def push(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["push", *arguments])
    return result.exit_code, result.stdout, result.stderr


def child(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rs_gguf", *arguments]
    environment = hub.environment(home)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def forbidden(*arguments: object) -> str:
    raise AssertionError(f"nothing may be uploaded: {arguments}")


def test_a_dry_run_lists_files_and_card_and_uploads_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "upload", forbidden)
    code, stdout, stderr = push(str(run), "owner/name")
    assert code == 0
    listed, _, card = stdout.partition("\nREADME.md:\n")
    sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in listed.splitlines()}
    assert list(sizes) == FILES
    assert sizes["remove.gguf"] == (run / "remove.gguf").stat().st_size
    assert "base_model: " in card
    assert "Nothing was uploaded" in stderr


@pytest.mark.slow
def test_yes_uploads_all_files_in_one_commit(run: Path, hub: Hub, tmp_path: Path) -> None:
    done = child(hub, tmp_path / "home", "push", str(run), "owner/name", "--yes")
    assert done.returncode == 0, done.stderr
    assert hub.created == ["owner/name"]
    assert sum("/commit/" in asked for asked in hub.asked) == 1
    files = hub.committed("owner/name")
    assert sorted(files) == FILES
    assert files["remove.gguf"] == (run / "remove.gguf").read_bytes()
    front = ModelCard(files["README.md"].decode()).data  # as the hub reads it
    assert front.base_model == "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
    assert front["base_model_relation"] == "adapter"
    assert front.license == "apache-2.0"
    assert {"gguf", "llama.cpp", "control-vector", "lora"} <= set(front.tags or ())
    assert {one.metric_type for one in front.eval_results or ()} == {
        "explicit_refusals_unsteered", "explicit_refusals_steered", "retention",
    }  # fmt: skip
    assert all(0 <= one.metric_value <= 1 for one in front.eval_results or ())
    assert not [name for name, data in files.items() if SECRET.encode() in data]
    reproduction = json.loads(files["reproduce.json"])
    assert reproduction["recipe"]["prompts"]["fit"] == 190
    assert {"python", "rs-gguf"} <= reproduction["versions"].keys()
    again = ["run", "--from", "owner/name", "--out", str(tmp_path / "again")]
    done = child(hub, tmp_path / "home", *again, "--set", f"model={run / 'remove.gguf'}")
    assert f"owner/name was made on {reproduction['model_sha256']}" in done.stderr


@pytest.mark.slow
def test_a_token_that_cannot_write_is_one_clear_error(run: Path, hub: Hub, tmp_path: Path) -> None:
    hub.refused = True
    done = child(hub, tmp_path / "home", "push", str(run), "owner/name", "--yes")
    assert done.returncode == 2
    assert "cannot upload to owner/name" in done.stderr
    assert "Traceback" not in done.stderr
    assert "[token]" in done.stderr, "the hub repeats the token"
    assert "hf_" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["name"], "'name' is not a repository"),
        (["../name"], "'../name' is not a repository"),
        (["owner/name/file"], "is not a repository"),
    ],
)
def test_the_repository_is_owner_and_name(run: Path, arguments: list[str], message: str) -> None:
    code, _, stderr = push(str(run), *arguments)
    assert (code, message in stderr) == (2, True), stderr


def test_the_card_names_a_file_that_was_not_measured(run: Path) -> None:
    (run / "other.gguf").write_bytes((run / "remove.gguf").read_bytes()[:-1] + b"\1")
    code, stdout, stderr = push(str(run), "owner/name")
    assert code == 0
    assert "Not measured: other.gguf. The card says so." in stderr
    assert "> - **other.gguf\\: not measured" in stdout
