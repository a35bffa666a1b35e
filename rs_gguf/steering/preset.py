"""Write `preset.ini`: one llama-server that offers the unsteered model and each steered one by name.

The model and the steering files go in; the text of the INI file comes out. llama.cpp reads it with
`--models-preset`. A key is an option without its dashes. An option with two values is not accepted there. So
the layer range of a control vector is left out, which changes nothing: the file holds no other layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_HEAD = """\
; One llama-server, and one model name for each way to answer. llama.cpp reads this file since PR 17859.
; Paths start where llama-server starts. So download all files of this repository, go there, and run
;   llama-server --models-preset preset.ini
; A request then chooses by its field "model". Each name in use loads the model once more.
; `llama-server -hf` with this repository does not work: it would download this file only.
; Tested on 2026-12-01 with a local model and the llama.cpp of llama-cpp-python 0.3.36.
; Untested: the download of the model (hf-repo, hf-file).
version = 1
"""


def preset_ini(
    name: str, source: tuple[str, str] | None, files: Mapping[str, str], *, reasoning_off: bool
) -> str:
    """Return the text of a preset file.

    name: of the model; other characters than letters, digits, dots and dashes become dashes.
    source: hub repository and GGUF file of the model. None, or no file: the reader has to give a path.
    files: llama.cpp's option by file, such as `--lora`. A file is named by letters, digits, dots and dashes.
    reasoning_off: thinking is switched off, as where the files were measured.
    """
    model = "; Put the path of your model here.\nmodel = MODEL.gguf\n"
    if source and source[1]:
        model = f"hf-repo = {source[0]}\nhf-file = {source[1]}\n"
    if reasoning_off:
        model += "reasoning = off\n"
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-") or "model"
    sections = [f"\n[{name}]\n{model}"]
    for file, option in files.items():
        setting = f"{option.removeprefix('--')} = {file}\n"
        sections.append(f"\n[{name}-{file.removesuffix('.gguf')}]\n{model}{setting}")
    return _HEAD + "".join(sections)
