"""The recipes for front ends: one source, filled in for each kind of file, and shown by card and page."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
import yaml
from fixtures.invented_run import make_run

from rs_gguf.report.front_ends import FrontEnd, front_ends
from rs_gguf.report.page import write_card, write_report

ADAPTER, VECTOR = "--lora a.gguf", "--control-vector v.gguf --control-vector-layer-range 8 15"
# What runs each recipe: `test_docs`, `real/test_binaries` and `cli/test_merge`.
TESTED = {
    "llama.cpp",
    "A scale for each request",
    "Two model names on one llama-server",
    "llama-cpp-python",
    "Merge, for programs that only load a model file",
}


def recipes(is_vector: bool, reasoning_off: bool = False) -> dict[str, FrontEnd]:
    file, options = ("v.gguf", VECTOR) if is_vector else ("a.gguf", ADAPTER)
    found = front_ends(file, options, is_vector=is_vector, model="m.gguf", reasoning_off=reasoning_off)
    assert len({one.name for one in found}) == len(found)
    return {one.name: one for one in found}


@pytest.mark.parametrize("is_vector", [False, True])
def test_each_recipe_is_marked_and_filled_in(is_vector: bool) -> None:
    for one in recipes(is_vector).values():
        assert one.mark.startswith("tested with ") == (one.name in TESTED)
        assert one.mark == "untested" or one.name in TESTED
        for text in (one.text, *(block.text for block in one.blocks)):
            assert "$" not in text.replace("${PORT}", "")
        assert len(one.words) % 2 == 1, "a code span that does not end"
        assert all(block.language and block.text == block.text.strip() for block in one.blocks)


def test_what_cannot_load_a_vector_is_not_in_its_list() -> None:
    assert recipes(False).keys() - recipes(True).keys() == {
        "A scale for each request", "KoboldCpp", "Merge, for programs that only load a model file", "Ollama",
        "LM Studio",
    }  # fmt: skip


def test_ollama_gets_a_merged_model_and_no_adapter() -> None:
    merge = recipes(False)["Merge, for programs that only load a model file"].blocks[0].text
    assert merge == "rs-export merge a.gguf --model m.gguf --output merged.gguf"
    file, *_ = recipes(False)["Ollama"].blocks
    assert file.text == "FROM ./merged.gguf"


@pytest.mark.parametrize("is_vector", [False, True])
def test_settings_files_are_read_as_what_they_mean(is_vector: bool) -> None:
    found = recipes(is_vector, reasoning_off=True)
    preset = configparser.ConfigParser()
    preset.read_string("[top]\n" + found["Two model names on one llama-server"].blocks[0].text)
    option, file = ("control-vector", "v.gguf") if is_vector else ("lora", "a.gguf")
    # Both names answer without thinking, so that they differ by the file only.
    assert dict(preset["unsteered"]) == {"model": "m.gguf", "reasoning": "off"}
    assert dict(preset["steered"]) == {"model": "m.gguf", option: file, "reasoning": "off"}
    models = yaml.safe_load(found["llama-swap"].blocks[0].text)["models"]
    options = VECTOR if is_vector else ADAPTER
    assert models["unsteered"]["cmd"] == "llama-server --port ${PORT} -m m.gguf --reasoning off"
    assert models["steered"]["cmd"] == f"llama-server --port ${{PORT}} -m m.gguf {options}"


def test_the_merged_file_stays_where_it_is() -> None:
    assert recipes(False)["LM Studio"].blocks[0].text == "lms import merged.gguf --copy"


def test_names_are_quoted_for_the_shell_and_for_python() -> None:
    found = {one.name: one for one in front_ends("it's 1.gguf", "", is_vector=False)}
    assert "--lora 'it'\"'\"'s 1.gguf' --loramult" in found["KoboldCpp"].blocks[0].text
    assert 'lora_path="it\'s 1.gguf"' in found["llama-cpp-python"].blocks[0].text


def test_card_and_page_show_every_recipe_with_its_mark(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    card, page = (write(folder).read_text(encoding="utf-8") for write in (write_card, write_report))
    for is_vector in (False, True):
        for one in recipes(is_vector).values():
            assert f"\n**{one.name}** ({one.mark})\n" in card
            assert f'<h4>{one.name} <span class="note">({one.mark})</span></h4>' in page
    for text in (card, page):
        assert "FROM ./merged.gguf" in text
        assert "llama-export-lora" not in text
        assert "lora = remove-adapter.gguf" in text
        assert "control-vector = remove.gguf" in text
