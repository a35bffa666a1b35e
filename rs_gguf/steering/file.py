"""Either kind of file that llama.cpp loads: what both can do, and the one place that tells them apart.

In: the path of a control vector or a LoRA adapter in GGUF, or one of them in memory. Out: the other, what is
wrong with it, what it does to a model, or the option with which llama.cpp loads it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Protocol, Self

from rs_gguf.engines.engine import Engine, Steering
from rs_gguf.errors import InputError
from rs_gguf.steering import lora_file, vector_file
from rs_gguf.steering.container import metadata
from rs_gguf.steering.guard import MAX_ADAPTER_BYTES, StricterThanLlamaCpp, open_gguf
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.provenance import ProvenanceValue
from rs_gguf.steering.report import CheckReport, EffectCheck
from rs_gguf.steering.vector import SteeringVector
from rs_gguf.steering.vector import options as vector_options


class SteeringFile(Protocol):
    """What a file holds: `SteeringVector` and `LoraAdapter`, the two that llama.cpp knows.

    `kind`: what it is. `option`: llama.cpp's, which loads it. `part`: what it has one change of each for.
    `moves`: what is seen on a model when it has its effect.
    """

    kind: ClassVar[str]
    option: ClassVar[str]
    part: ClassVar[str]
    moves: ClassVar[str]

    @property
    def architecture(self) -> str: ...
    @property
    def provenance(self) -> Mapping[str, ProvenanceValue]: ...
    @property
    def layers(self) -> list[int]:
        """The blocks that it changes, ascending."""

    @property
    def norms(self) -> Mapping[int, float] | Mapping[str, float]:
        """Length of the change of each part."""

    @property
    def contents(self) -> Mapping[str, ProvenanceValue]:
        """The kind of file and what it changes, for people."""

    def with_facts(self, facts: Mapping[str, ProvenanceValue]) -> Self:
        """Return the same with `facts` added to the provenance."""

    @classmethod
    def combined(cls, parts: Sequence[tuple[Self, float]]) -> Self:
        """Return the sum of weight × file. `InputError` where the parts are of different models."""

    def cosines(self, other: Self) -> Mapping[int, float] | Mapping[str, float]:
        """Return the cosine of the changes of each part that both change."""

    def steering(self, path: Path, scale: float = 1.0) -> Steering:
        """Return what puts it, read from the file at `path`, on an engine at `scale`."""

    def options(self, path: str) -> str:
        """Return llama.cpp's options for the file at `path`, given as a word of the shell."""


def kind_of(path: str | Path) -> type[SteeringVector] | type[LoraAdapter]:
    """Return what a GGUF file says of itself to be. Raises `InputError` when the container is unsound."""
    says = metadata(open_gguf(path, MAX_ADAPTER_BYTES)).get("general.type")
    return LoraAdapter if says == "adapter" else SteeringVector


def read(path: str | Path) -> SteeringFile:
    """Read a file that llama.cpp accepts. Raises `InputError` with every reason when it is none."""
    return lora_file.read(path) if kind_of(path) is LoraAdapter else vector_file.read(path)


def read_alike(paths: Sequence[Path]) -> list[SteeringFile]:
    """Read files of one kind. Raises `InputError` as `read` does, and when they are of both."""
    kinds = {path: kind_of(path) for path in paths}
    if len(set(kinds.values())) > 1:
        vector, adapter = (
            next(path for path in paths if kinds[path] is kind) for kind in (SteeringVector, LoraAdapter)
        )
        raise InputError(
            f"{vector} is a control vector and {adapter} a LoRA adapter: one adds to a block's output, the "
            "other to a matrix, so they have no common sum or cosine. llama.cpp loads both side by side: "
            f"--control-vector {shlex.quote(str(vector))} --lora {shlex.quote(str(adapter))}."
        )
    return [read(path) for path in paths]


def write(found: SteeringFile, path: str | Path) -> None:
    """Write a file for llama.cpp, whole or not at all, read back and compared.

    Raises `InputError` when it would do nothing or the place cannot be written, `VerificationError` when what was
    read back differs.
    """
    if isinstance(found, LoraAdapter):
        lora_file.write(found, path)
    else:
        assert isinstance(found, SteeringVector)  # llama.cpp knows no third
        vector_file.write(found, path)


def check(path: str | Path, model: str | Path | None = None) -> CheckReport[SteeringFile]:
    """Judge a file by the rules of llama.cpp's loader and of common sense, collecting every reason.

    With `model`, a GGUF file, it is also run there and its effect checked. Never raises for a bad file; a bad
    model raises `InputError`, and so does a lack of room for drafts.
    """
    try:
        adapter = kind_of(path) is LoraAdapter
    except StricterThanLlamaCpp:
        adapter = True  # the check of the larger files says which rule of ours it breaks
    except InputError:
        adapter = False  # either check says what is wrong with the container
    return _on_model(lora_file.check(path) if adapter else vector_file.check(path), model)


def check_vector(path: str | Path, model: str | Path | None = None) -> CheckReport[SteeringFile]:
    """Judge a file as `check` does, as a control vector whatever it says of itself."""
    return _on_model(vector_file.check(path), model)


def _on_model(report: CheckReport[SteeringFile], model: str | Path | None) -> CheckReport[SteeringFile]:
    """Return the report with what running the file on `model` showed, unless the file itself has an error."""
    if model is None or report.found is None or not report.valid:
        return report
    from rs_gguf.engines.llama.model import LlamaModel
    from rs_gguf.steering.effect_check import other_model

    with LlamaModel(Path(model), n_parallel=4) as loaded:
        effect = _effect_on(report.found, Path(report.path), loaded)
    return replace(
        report,
        errors=effect.reasons,
        warnings=(*report.warnings, *other_model(report.found.provenance, model)),
        loader_says=report.loader_says or effect.loader_says.replace("%s", report.path),
        effect=effect,
    )


def check_effect(path: Path, model: Engine) -> EffectCheck:
    """Run what is in a file on a loaded model.

    Raises:
        InputError: the file holds no sound vector or adapter; the model cannot be run on the prompts, or its
            tensors cannot be read; or there is no room for one matrix of an adapter.
    """
    return _effect_on(read(path), path, model)


def _effect_on(found: SteeringFile, path: Path, model: Engine) -> EffectCheck:
    from rs_gguf.steering import effect_check

    if isinstance(found, LoraAdapter):
        return effect_check.check_adapter_effect(found, path, model)
    assert isinstance(found, SteeringVector)  # llama.cpp knows no third
    return effect_check.check_vector_effect(found, model)


def llama_options(file: str, layers: Sequence[int] | None, *, reasoning_off: bool) -> str:
    """llama.cpp's options for a file that a report tells of, given as a word of the shell.

    layers: first and last block of a control vector; None for an adapter.
    reasoning_off: add the option that switches thinking off (`ChatFormat.thinks_in_server`).
    """
    options = f"{LoraAdapter.option} {file}" if layers is None else vector_options(file, *map(int, layers))
    return options + _thinking(reasoning_off)


def server_command(model: Path, files: Mapping[Path, SteeringFile], *, reasoning_off: bool) -> str:
    """Return the command by which llama-server loads a model with files, given with what was read of each."""
    options = " ".join(found.options(_llama_path_argument(path)) for path, found in files.items())
    model_file = _path_word(model) if model.is_file() else "MODEL.gguf"  # of a folder there is none
    return f"llama-server -m {model_file} {options}{_thinking(reasoning_off)}"


def _thinking(reasoning_off: bool) -> str:
    return " --reasoning off" if reasoning_off else ""


def _llama_path_argument(path: Path) -> str:
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
