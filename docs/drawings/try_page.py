"""Picture the page of `rs-export try` with a prompt that is answered: `PYTHONPATH=tests python try_page.py
PICTURE MODEL FILE PROMPT`. Both answers have at most 100 tokens. The tests' browser is used.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path

from fixtures.browser import chromium
from playwright.sync_api import expect

from rs_gguf.engines.generation import Asking
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.models.resolve import resolve_gguf
from rs_gguf.playground.page import build, launch
from rs_gguf.playground.session import Answers, LoadedModel
from rs_gguf.records.conversation import Prompt
from rs_gguf.steering.file import path_and_scale


class Watched(LoadedModel):
    """Remembers the last answers, and says when they have ended."""

    last = ("", "")
    ended = threading.Event()

    def answers(self, prompt: str, factor: float) -> Answers:
        for self.last in super().answers(prompt, factor):
            yield self.last
        self.ended.set()


def main(picture: Path, model: str, file: str, prompt: str) -> None:
    with (
        LlamaModel(resolve_gguf(model), n_parallel=1) as loaded,
        contextlib.closing(Watched(loaded, [path_and_scale(file)], Asking(None, 100))) as session,
        chromium() as browser,
    ):
        address = launch(build(session, [Prompt(prompt, "sensitive")]), None)
        page = browser.new_page(viewport={"width": 1280, "height": 960})
        page.goto(address)
        page.get_by_label("Prompts").click()
        page.get_by_role("option").click()
        page.get_by_role("button", name="Answer").click()
        session.ended.wait()
        for label, text in zip(("Unsteered", "Steered"), session.last, strict=True):
            expect(page.get_by_label(label, exact=True)).to_have_value(text)
        page.locator("main").first.screenshot(path=picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
