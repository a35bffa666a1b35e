"""The report in a real browser: nothing is loaded, nothing complains, controls work, anybody can read it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures import browser
from fixtures.invented_run import invented_rows, make_hostile_run, make_run, with_arrays, with_sweep
from playwright.sync_api import Browser, Page

from rs_gguf.evaluation.outcomes import class_of
from rs_gguf.report.page import write_report

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.chromium() as started:
        yield started


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages, each with every part that a page can have."""
    folder = tmp_path_factory.mktemp("runs")
    friendly = with_sweep(with_arrays(make_run(folder / "friendly", ROWS)))
    return {"friendly": write_report(friendly), "hostile": write_report(make_hostile_run(folder / "hostile"))}


ROWS = invented_rows(8)


@pytest.fixture
def look(chromium: Browser, reports: dict[str, Path]) -> Iterator[Callable[..., Page]]:
    """Opens a page in a window of its own; at the end nothing may have complained or been asked for."""
    faults: list[str] = []
    contexts = []

    def open_page(name: str, *, width: int = 1280, **options: Any) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        address = reports[name].as_uri()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: None if asked.url == address else faults.append(asked.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def shown(page: Page) -> int:
    return page.locator(".prompt:visible").count()


def outcome_class(row: dict[str, Any], side: str) -> str:
    return class_of(row[f"outcome_{side}"])


def test_filters_and_search_show_what_fits(look: Callable[..., Page]) -> None:
    page = look("friendly")
    assert shown(page) == len(ROWS)
    page.select_option("#filter-kind", "sensitive")
    sensitive = [row for row in ROWS if row["kind"] == "sensitive"]
    assert shown(page) == len(sensitive)
    page.select_option("#filter-mark", "changed-adapter")
    moved = [row for row in sensitive if outcome_class(row, "adapter") != outcome_class(row, "unsteered")]
    assert 0 < shown(page) == len(moved)
    assert page.text_content("#filter-count") == f"{len(moved)} of {len(ROWS)} shown"
    page.fill("#filter-search", "no such words anywhere")
    assert shown(page) == 0
    assert page.is_visible("#filter-none")
    page.click("#filters button[type=reset]")
    page.wait_for_function(f"document.querySelectorAll('.prompt:not([hidden])').length === {len(ROWS)}")
    page.fill("#filter-search", ROWS[4]["prompt"].upper())
    assert shown(page) == sum(ROWS[4]["prompt"] in row["prompt"] for row in ROWS)
    page.fill("#filter-search", "")
    for language, n in Counter(row["language"] for row in ROWS).items():
        page.select_option("#filter-language", language)
        assert shown(page) == n


def test_commands_can_be_copied_by_the_keyboard(look: Callable[..., Page]) -> None:
    page = look("friendly")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.evaluate("document.execCommand = () => { window.taken = String(getSelection()); return true; }")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the recommendation"
    page.keyboard.press("Enter")
    taken = []
    for button in page.locator("[data-copies]").all():
        button.focus()
        page.keyboard.press("Enter")
        taken.append(" ".join(page.evaluate("taken").split()))
        assert button.evaluate("button => button.previousElementSibling.textContent") == "Copied."
    assert taken == [" ".join(text.split()) for text in page.locator(".use code").all_text_contents()]
    assert len(taken) == 2


def test_every_control_and_table_is_reached_by_tab(look: Callable[..., Page]) -> None:
    page = look("friendly")
    wanted = page.locator(
        "a:visible, button:visible, summary:visible, select, input, [tabindex='0']:visible"
    ).count()
    reached = set()
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
    # Of the list of sections and the regions that scroll, none is left out; beyond the last the page's end.
    assert len(reached) >= wanted


@pytest.mark.parametrize(
    ("name", "scheme"), [("friendly", "light"), ("friendly", "dark"), ("hostile", "light")]
)
def test_axe_finds_no_fault(look: Callable[..., Page], name: str, scheme: str) -> None:
    page = look(name, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    page.evaluate(browser.axe())
    found = page.evaluate("axe.run()")
    assert [(one["id"], [node["html"] for node in one["nodes"][:3]]) for one in found["violations"]] == []
    assert len(found["passes"]) > 20, "it did look"


def test_hostile_text_runs_nothing(look: Callable[..., Page]) -> None:
    page = look("hostile")
    assert page.title().endswith("Refusal Steering report")
    assert page.locator("script").count() == 1
    assert shown(page) == 24
    assert page.locator("img, iframe, svg[onload]").count() == 0


@pytest.mark.parametrize("name", ["friendly", "hostile"])
def test_a_phone_shows_it_without_scrolling_sideways(look: Callable[..., Page], name: str) -> None:
    page = look(name, width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_without_scripts_all_is_there_but_the_controls(look: Callable[..., Page]) -> None:
    page = look("friendly", java_script_enabled=False)
    assert page.is_visible("#verdict-title")
    assert shown(page) == len(ROWS)
    assert page.locator("#filters:visible, [data-copies]:visible").count() == 0


def test_it_prints_with_all_tables_open_and_no_controls(look: Callable[..., Page]) -> None:
    page = look("friendly")
    page.emulate_media(media="print")
    assert page.locator("nav:visible, button:visible, #filters:visible").count() == 0
    closed = page.locator("details.printed:not([open]) table")
    assert closed.count() > 3
    assert all(table.is_visible() for table in closed.all())
    pages = len(re.findall(rb"/Type\s*/Page\b", page.pdf()))
    assert 3 <= pages <= 30
