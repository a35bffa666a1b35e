"""What contributors read is true: hooks are the parts of `make lint`, and files are where pages say."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "docs/architecture.md")


def test_each_part_of_make_lint_is_a_hook() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (parts,) = re.findall(r"^LINTS := (.*)$", makefile, re.MULTILINE)
    assert "\nlint: $(LINTS)\n" in makefile
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    assert [hook["entry"] for hook in hooks] == [f"make {part}" for part in parts.split()]
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)


def test_workflows_and_forms_are_yaml_and_their_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    paths = sorted((ROOT / ".github").rglob("*.yml"))
    assert len(paths) == 6
    for path in paths:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        assert isinstance(content, dict), path
        assert set(re.findall(r"run: make ([\w-]+)", text)) <= targets, path
        for part in re.findall(r"uses: \./(\S+)", text):
            assert (ROOT / part).is_file(), f"{path}: {part}"


def test_make_keeps_the_sources_of_models_that_a_user_allows(tmp_path: Path) -> None:
    line = re.search(
        r"^export RS_GGUF_MODEL_SOURCES .*$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE
    )
    assert line is not None
    (tmp_path / "Makefile").write_text(f"{line[0]}\nshow:\n\t@echo $$RS_GGUF_MODEL_SOURCES\n")
    others = {key: value for key, value in os.environ.items() if not key.startswith(("RS_GGUF_", "MAKE"))}
    for given, expected in (({}, "hub,packages"), ({"RS_GGUF_MODEL_SOURCES": "hub"}, "hub")):
        command = ["make", "--silent", "show"]
        done = subprocess.run(
            command, cwd=tmp_path, env=others | given, capture_output=True, text=True, check=True
        )
        assert done.stdout == f"{expected}\n"


@pytest.mark.parametrize("page", PAGES)
def test_each_target_of_make_exists(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    made = set(re.findall(r"`make ([\w-]+)`", (ROOT / page).read_text(encoding="utf-8")))
    assert made <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_each_file_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    # Within rs_gguf, or from the top; a folder of a run is no folder of the project.
    named = set(re.findall(r"`((?:[\w.-]+/)+(?:[\w.-]+\.\w+)?)`", text)) - {"activations/"}
    assert len(named) > 10
    assert not [name for name in named if not ((ROOT / name).exists() or (ROOT / "rs_gguf" / name).exists())]


def test_each_package_and_module_has_its_floor() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    on_floors = [
        name for row in re.findall(r"^\| \d \| (.*?) \|", text, re.MULTILINE) for name in row.split(", ")
    ]
    parts = [path.name.removesuffix(".py") for path in (ROOT / "rs_gguf").iterdir()]
    here = [part for part in parts if re.fullmatch(r"[a-z]+(_[a-z]+)*|__init__", part) and part != "data"]
    assert sorted(on_floors) == sorted(f"`{part}`" for part in here)
