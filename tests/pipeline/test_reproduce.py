"""A published run is repeated only from a recipe that is safe to run here."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fixtures.hub import Hub
from fixtures.invented_run import invented_metrics

from rs_gguf.cli.main import main
from rs_gguf.errors import InputError
from rs_gguf.models import resolve as models
from rs_gguf.models import sources
from rs_gguf.pipeline import run as pipeline
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.reproduce import Reproduction, fetch

MODEL = b"the model"
PROMPTS = b'{"prompt": "Who won?", "split": "fit"}\n'


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def published(**changes: Any) -> dict[str, Any]:
    """Return a reproduce.json with prompts of its own."""
    value = {
        "schema_version": 1,
        "tool": "rs-gguf 0.1.0",
        "date": "2026-12-01",
        "seed": 3,
        "recipe": {
            "model": "owner/model/m.gguf",
            "seed": 3,
            "prompts": {"sensitive": ["prompts/sensitive.jsonl"]},
        },
        "to_set": [],
        "versions": {"python": "3.11"},
        "model_sha256": digest(MODEL),
        "files": {"remove.gguf": digest(b"file")},
        "prompts": {"prompts/sensitive.jsonl": digest(PROMPTS)},
    }
    return value | changes


Serve = Callable[[Any], None]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Put a reproduce.json on a hub that has the model and the prompts."""
    served = tmp_path / "hub"
    served.mkdir()
    (served / "sensitive.jsonl").write_bytes(PROMPTS)
    (served / "m.gguf").write_bytes(MODEL)

    def download(repository: str, file: str, folder: Path | None) -> Path:
        assert folder is None
        return served / file.rpartition("/")[2]

    monkeypatch.setattr(sources, "hub_download", download)
    monkeypatch.setattr(models, "resolve", lambda spec, progress=None: served / "m.gguf")

    def put(value: Any) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        (served / "reproduce.json").write_text(text, encoding="utf-8")

    return put


def test_a_published_run_becomes_a_folder_and_goes_on(serve: Serve, tmp_path: Path) -> None:
    serve(published())
    out = tmp_path / "out"
    found = fetch("owner/name", out)
    recipe = tomllib.loads((out / "recipe.toml").read_text())
    assert recipe["prompts"]["sensitive"] == [str(out / "prompts" / "sensitive.jsonl")]
    assert (out / "prompts" / "sensitive.jsonl").read_bytes() == PROMPTS
    (out / "recipe.toml").write_text("seed = 4\n")
    assert fetch("owner/name", out) == found
    assert (out / "recipe.toml").read_text() == "seed = 4\n", "a run that has begun goes on"
    (out / "remove.gguf").write_bytes(b"file")
    assert found.differences(out) == ["remove.gguf: as published."]
    (out / "remove.gguf").write_bytes(b"fill")
    assert found.differences(out) == ["remove.gguf: differs from the published file."]


def test_a_folder_of_another_run_is_not_touched(serve: Serve, tmp_path: Path) -> None:
    serve(published())
    (tmp_path / "recipe.toml").write_text("seed = 4\n")
    with pytest.raises(InputError, match="holds another run"):
        fetch("owner/name", tmp_path)


def with_recipe(**values: Any) -> dict[str, Any]:
    value = published()
    return value | {"recipe": value["recipe"] | values}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (with_recipe(model="/etc/passwd"), r"refused: model = '/etc/passwd'"),
        (with_recipe(model="../model.gguf"), r"refused: model"),
        (with_recipe(model="a/../../m.gguf"), r"refused: model"),
        (with_recipe(model="~/model.gguf"), r"refused: model"),
        (with_recipe(model=["x"]), r"refused: model"),
        (with_recipe(judge="http://example.invalid/v1#x"), r"refused: judge = 'http"),
        (with_recipe(judge="labels:/etc/passwd"), r"refused: judge"),
        (with_recipe(judge_second="votes:https:x"), r"refused: judge_second"),
        (with_recipe(answers={"servers": "http://example.invalid"}), r"refused: answers.servers"),
        (with_recipe(prompts={"sensitive": ["/etc/passwd"]}), r"refused: prompts.sensitive"),
        (with_recipe(prompts={"benign": "prompts/benign.jsonl"}), r"refused: prompts.benign"),
        (with_recipe(prompts={"benign": ["prompts/benign.jsonl"]}), r"refused: prompts.benign"),
        (published(prompts={"../../x": digest(b"")}), r"refused: prompts: '../../x'"),
        (published(prompts={"prompts/sensitive.jsonl": digest(b"")}), r"its SHA-256 differs"),
        (published(model_sha256=digest(b"other")), r"was made on"),
        (published(to_set=["model"]), r"does not have model.*--set model="),
        (with_recipe(run="rm"), r"refused: run = 'rm'"),
        # The validation of a recipe accepts such spellings of a key.
        (with_recipe(Judge="http://example.invalid/v1#x"), r"refused: Judge = 'http"),
        (with_recipe(MODEL="/etc/passwd"), r"refused: MODEL"),
        (with_recipe(Answers={"servers": "http://example.invalid"}), r"refused: Answers"),
        (with_recipe(Prompts={"sensitive": ["/etc/passwd"]}), r"refused: Prompts"),
        (with_recipe(prompts={"system": "\ud800"}), r"surrogates not allowed"),
        (with_recipe(seed=None), r"is not a recipe"),
        (with_recipe(tune={"logprob_trials": "many"}), r"tune.logprob_trials"),
        (published(command="rm"), r"command: Extra inputs"),
        (published(schema_version=2), r"schema_version"),
        (published(files={"remove.gguf": "x"}), r"files"),
        ("[" * 100_000, r"is not what `rs-export push` writes"),
        ("{", r"is not what `rs-export push` writes"),
        ("7", r"is not what `rs-export push` writes"),
        (" " * (1 << 21), r"more than 1 MiB"),
    ],
)
def test_what_is_not_safe_is_refused_and_leaves_nothing(
    serve: Serve, value: Any, message: str, tmp_path: Path
) -> None:
    serve(value)
    with pytest.raises(InputError, match=message):
        fetch("owner/name", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_user_may_set_what_the_recipe_may_not(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(with_recipe(judge="http://example.invalid/v1#x") | {"to_set": ["judge_second"]})
    out, overrides = tmp_path / "out", ["judge=keywords", "judge_second=labels:/m.gguf"]
    found = fetch("owner/name", out, overrides)
    # A later run in the folder, without --set, must not use the stranger's judge.
    assert "example.invalid" not in (out / "recipe.toml").read_text()
    assert fetch("owner/name", out, overrides) == found
    with pytest.raises(InputError, match="refused: judge_second"):
        fetch("owner/name", out)
    monkeypatch.setenv("JUDGE_SECOND", "labels:/m.gguf")  # not for this program
    with pytest.raises(InputError, match="refused: judge_second"):
        fetch("owner/name", out)
    monkeypatch.setenv("RS_GGUF_JUDGE_SECOND", "labels:/m.gguf")
    assert fetch("owner/name", out) == found


@pytest.mark.parametrize(
    "line",
    [
        'judge = "http://example.invalid/v1#x"',
        'judge = "keywords"\nJudge = "http://example.invalid/v1#x"',
        'answers.servers = "http://example.invalid"',
        'prompts.benign = ["/etc/passwd"]',
    ],
)
def test_the_recipe_in_a_copy_of_the_repository_is_not_trusted(
    serve: Serve, tmp_path: Path, line: str
) -> None:
    serve(published())
    (tmp_path / "reproduce.json").write_text(json.dumps(published()), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(line + "\n")
    with pytest.raises(InputError, match="refused: "):
        fetch("owner/name", tmp_path)


def test_a_copy_without_recipe_gets_the_published_one(serve: Serve, tmp_path: Path) -> None:
    serve(published())
    (tmp_path / "reproduce.json").write_text(json.dumps(published()), encoding="utf-8")
    fetch("owner/name", tmp_path)
    assert tomllib.loads((tmp_path / "recipe.toml").read_text())["seed"] == 3


def test_prompts_of_the_user_stay(serve: Serve, tmp_path: Path) -> None:
    serve(published())
    own = tmp_path / "prompts" / "sensitive.jsonl"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(InputError, match="is another file, which stays"):
        fetch("owner/name", tmp_path)
    assert own.read_text() == "mine"


def test_the_command_runs_the_recipe_and_compares_the_files(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(published())
    ran: list[Recipe] = []

    def run(recipe: Recipe, out: Path, **_: Any) -> dict[str, Any]:
        ran.append(recipe)
        return invented_metrics(tmp_path / "invented", vector="passed")

    monkeypatch.setattr(pipeline, "run", run)
    out = str(tmp_path / "out")
    done = CliRunner().invoke(
        main, ["run", "--from", "owner/name", "--out", out, "--json", "--set", "seed=5"]
    )
    assert done.exit_code == 0, done.stderr
    assert [recipe.seed for recipe in ran] == [5]
    assert ran[0].prompts.sensitive == [tmp_path / "out" / "prompts" / "sensitive.jsonl"]
    assert "remove.gguf: differs from the published file." in done.stderr
    done = CliRunner().invoke(main, ["run", "recipe.toml", "--from", "owner/name"])
    assert (done.exit_code, "either RECIPE or --from" in done.stderr) == (2, True)
    serve(published(to_set=["judge_second"]))
    options = ["--out", str(tmp_path / "second"), "--second-judge", "labels:/m.gguf"]
    done = CliRunner().invoke(main, ["run", "--from", "owner/name", *options])
    assert ran.pop().judge_second == "labels:/m.gguf", done.stderr


@pytest.mark.slow
def test_a_real_download_from_the_hub(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(MODEL)
    start = "/owner/name/resolve/main/"
    value = published(to_set=["model"])
    hub = Hub(
        {f"{start}reproduce.json": json.dumps(value).encode(), f"{start}prompts/sensitive.jsonl": PROMPTS}
    )
    code = (
        "import sys, pathlib\nfrom rs_gguf.pipeline.reproduce import fetch\n"
        "print(fetch('owner/name', pathlib.Path('out'), sys.argv[1:]).seed)"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, f"model={tmp_path / 'm.gguf'}"],
            cwd=tmp_path, env=hub.environment(tmp_path / "home"), capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
    finally:
        hub.stop()
    assert done.stdout == "3\n", done.stderr
    assert (tmp_path / "out" / "prompts" / "sensitive.jsonl").read_bytes() == PROMPTS


def test_the_schema_is_stable() -> None:
    assert Reproduction.model_validate(published()).model_dump(mode="json") == published()
