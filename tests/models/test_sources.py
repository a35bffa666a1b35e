"""Errors of downloads and uploads: one line, without the user's token."""

from __future__ import annotations

import pytest

from rs_gguf.models.sources import first_line


@pytest.mark.parametrize(
    "message",
    [
        "Illegal header value b'Bearer secret\\x01'",
        "secret cannot write",
        "authorization: BEARER other-secret",
    ],
)
def test_a_message_never_has_the_token(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    line = first_line(ValueError(f"{message}\nmore"))
    assert line.startswith("ValueError: ")
    assert "[token]" in line
    assert "secret" not in line
    assert "more" not in line
