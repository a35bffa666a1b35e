"""The hooks before a commit are the parts of `make lint`, and fetch nothing."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_each_part_of_make_lint_is_a_hook() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (parts,) = re.findall(r"^LINTS := (.*)$", makefile, re.MULTILINE)
    assert "\nlint: $(LINTS)\n" in makefile
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    assert [hook["entry"] for hook in hooks] == [f"make {part}" for part in parts.split()]
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)
