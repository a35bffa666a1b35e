"""The commit of a checkout, which a sealed set's ledger records."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rs_gguf import version


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_commit_is_named_in_a_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init")
    installed = tmp_path / "venv" / "rs_gguf" / "version.py"  # in a repository that is not ours
    monkeypatch.setattr(version, "__file__", str(installed))
    assert version.commit() is None
    module = tmp_path / "rs_gguf" / "version.py"
    module.parent.mkdir()
    module.write_text("one")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    monkeypatch.setattr(version, "__file__", str(module))
    assert version.commit() == git(tmp_path, "rev-parse", "HEAD")
    module.write_text("two")
    assert version.commit() == git(tmp_path, "rev-parse", "HEAD") + "-dirty"


def test_a_checkout_without_git_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(version, "__file__", str(tmp_path / "rs_gguf" / "version.py"))
    monkeypatch.setenv("PATH", "")
    assert version.commit() is None
