"""Preset files: one section for the unsteered model and one for each file, in llama.cpp's INI dialect."""

from __future__ import annotations

import configparser

import pytest

from rs_gguf.steering.preset import preset_ini

FILES = {"remove.gguf": "--control-vector", "remove-adapter.gguf": "--lora"}


def sections(text: str) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(text.replace("version = 1\n", ""))
    return {name: dict(parser[name]) for name in parser.sections()}


def test_a_model_of_the_hub_is_offered_with_and_without_each_file() -> None:
    source = {"hf-repo": "owner/name-GGUF", "hf-file": "name-q4.gguf"}
    text = preset_ini("name 0.5B [q4]\n", ("owner/name-GGUF", "name-q4.gguf"), FILES, reasoning_off=False)
    assert sections(text) == {
        "name-0.5B-q4": source,
        "name-0.5B-q4-remove": {**source, "control-vector": "remove.gguf"},
        "name-0.5B-q4-remove-adapter": {**source, "lora": "remove-adapter.gguf"},
    }


@pytest.mark.parametrize("source", [None, ("owner/safetensors", "")])
def test_a_model_without_a_public_gguf_file_has_a_place_for_its_path(source: tuple[str, str] | None) -> None:
    found = sections(preset_ini("?", source, FILES, reasoning_off=True))
    assert found["model-remove"] == {
        "model": "MODEL.gguf",
        "reasoning": "off",
        "control-vector": "remove.gguf",
    }
