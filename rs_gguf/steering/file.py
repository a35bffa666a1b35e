"""How llama.cpp is told to load a steering file."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path


def llama_options(file: str, layers: Sequence[int] | None, *, reasoning_off: bool) -> str:
    """llama.cpp's options for a file, given as a word of the shell.

    layers: first and last block of a control vector; None for an adapter.
    reasoning_off: llama.cpp must be told not to think (`ChatFormat.thinks_in_server`).
    """
    thinking = " --reasoning off" if reasoning_off else ""
    if layers is None:
        return f"--lora {file}{thinking}"
    first, last = map(int, layers)
    # Not `-scaled`, which splits its argument at colons: a path on Windows has one.
    return f"--control-vector {file} --control-vector-layer-range {first} {last}{thinking}"


def server_command(model: Path, file: Path, layers: Sequence[int] | None, *, reasoning_off: bool) -> str:
    """Return the command by which llama-server loads a model with a file; `layers` as in `llama_options`."""
    options = llama_options(_file_word(file), layers, reasoning_off=reasoning_off)
    model_file = _path_word(model) if model.is_file() else "MODEL.gguf"  # of a folder there is none
    return f"llama-server -m {model_file} {options}"


def _file_word(path: Path) -> str:
    """A file as a word of the shell for an option of which llama.cpp takes the value as a row of CSV."""
    text = str(path)
    if "," in text or text.startswith('"'):
        return _word('"' + text.replace('"', '""') + '"')
    return _path_word(path)


def _path_word(path: Path) -> str:
    """A path as a word of the shell; below the home folder by `~`, so that it says nothing of whose it is."""
    with contextlib.suppress(RuntimeError):  # there is no home
        if os.name != "nt" and path.is_relative_to(Path.home()):  # no shell of Windows knows `~`
            return f"~/{shlex.quote(path.relative_to(Path.home()).as_posix())}"
    return _word(str(path))


def _word(text: str) -> str:
    return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)
