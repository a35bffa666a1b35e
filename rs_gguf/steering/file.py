"""Read, write and check steering files: control vectors and LoRA adapters, the two kinds llama.cpp loads.

In: the path of a GGUF file, or its content in memory. Out: the content or the file, every error in it, its
effect on a model, or llama.cpp's options for it. Only this module tells the two kinds apart.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Engine, Steering
from rs_gguf.errors import InputError
from rs_gguf.steering import lora_file, vector_file
from rs_gguf.steering.container import metadata
from rs_gguf.steering.formats.glp import is_projection
from rs_gguf.steering.formats.glp import read as read_projection
from rs_gguf.steering.guard import MAX_ADAPTER_BYTES, StricterThanLlamaCpp, open_gguf
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.provenance import ProvenanceValue
from rs_gguf.steering.report import CheckReport, EffectCheck
from rs_gguf.steering.vector import SteeringVector
from rs_gguf.steering.vector import options as vector_options

if TYPE_CHECKING:
    from rs_gguf.engines.settings import EngineSettings


class Displayed(Protocol):
    """What `inspect` shows of a file. `part`: the unit that it has one change for."""

    part: ClassVar[str]

    @property
    def provenance(self) -> Mapping[str, ProvenanceValue]: ...
    @property
    def norms(self) -> Mapping[int, float] | Mapping[str, float]:
        """The length of each part's change."""

    @property
    def contents(self) -> Mapping[str, ProvenanceValue]:
        """The kind of file and what it changes."""

    def cosines(self, other: Self) -> Mapping[int, float] | Mapping[str, float]:
        """Return the cosine between the two changes of each part that both files change."""


class SteeringFile(Displayed, Protocol):
    """The content of a steering file: a `SteeringVector` or a `LoraAdapter`.

    `kind`: its name. `option`: the llama.cpp option that loads it. `intended_effect`: the effect on a model
    that the effect check looks for.
    """

    kind: ClassVar[str]
    option: ClassVar[str]
    intended_effect: ClassVar[str]

    @property
    def architecture(self) -> str: ...
    @property
    def layers(self) -> list[int]:
        """The layers that it changes, ascending, 0-based."""

    def with_facts(self, facts: Mapping[str, ProvenanceValue], *, in_place_of: str = ...) -> Self:
        """Return a copy with `facts` added to its provenance, less the earlier keys with a prefix."""

    @classmethod
    def combined(cls, parts: Sequence[tuple[Self, float]]) -> Self:
        """Return the sum of weight × file. Raise `InputError` if the parts belong to different models."""

    @property
    def gates(self) -> Mapping[str, NDArray[np.float32]]:
        """Gate vectors [W] by matrix, with activation 1 at the mean sensitive prompt; empty without gates."""

    def steering(self, path: Path, scale: float = 1.0) -> Steering:
        """Return the steering that applies it, read from the file at `path`, at `scale`."""

    def options(self, path: str) -> str:
        """Return llama.cpp's options for the file at `path`, which must already be quoted for the shell."""


def kind_of(path: str | Path) -> type[SteeringVector] | type[LoraAdapter]:
    """Return the kind that a GGUF file declares. Raise `InputError` if the container is not sound."""
    declared = metadata(open_gguf(path, MAX_ADAPTER_BYTES)).get("general.type")
    return LoraAdapter if declared == "adapter" else SteeringVector


def read(path: str | Path) -> SteeringFile:
    """Read a file that llama.cpp accepts. Raise `InputError` with every reason if it does not."""
    return lora_file.read(path) if kind_of(path) is LoraAdapter else vector_file.read(path)


def read_alike(paths: Sequence[Path]) -> list[SteeringFile]:
    """Read files of one kind. Raise `InputError` as `read` does, and if the kinds differ."""
    kinds = {path: kind_of(path) for path in paths}
    if len(set(kinds.values())) > 1:
        vector, adapter = (
            next(path for path in paths if kinds[path] is kind) for kind in (SteeringVector, LoraAdapter)
        )
        raise InputError(
            f"{vector} is a control vector and {adapter} a LoRA adapter: one changes a layer's output, the "
            "other a matrix, so they have no common sum or cosine. llama.cpp loads both side by side: "
            f"--control-vector {shlex.quote(str(vector))} --lora {shlex.quote(str(adapter))}."
        )
    return [read(path) for path in paths]


def read_for_display(paths: Sequence[Path]) -> Sequence[Displayed]:
    """Read files of one kind, also GLP files, which llama.cpp would misapply. Raises as `read_alike` does."""
    if all(kind_of(path) is SteeringVector and is_projection(path) for path in paths):
        return [read_projection(path) for path in paths]
    return read_alike(paths)


def write(content: SteeringFile, path: str | Path) -> None:
    """Write a file for llama.cpp completely or not at all; read it back and compare.

    Raises:
        InputError: the file would have no effect, or `path` cannot be written.
        VerificationError: the content that was read back differs.
    """
    if isinstance(content, LoraAdapter):
        lora_file.write(content, path)
    else:
        assert isinstance(content, SteeringVector)  # llama.cpp has only these two kinds
        vector_file.write(content, path)


def check(
    path: str | Path, model: str | Path | None = None, engine: EngineSettings | None = None
) -> CheckReport[SteeringFile]:
    """Check a file against the rules of llama.cpp's loader and for useless content; report every reason.

    With `model`, a GGUF file, also run the file there and check its effect. A bad file raises nothing.

    engine: how llama.cpp runs the model; None for the defaults.

    Raises:
        InputError: the model cannot be run, or the disk has no room for drafts.
    """
    try:
        adapter = kind_of(path) is LoraAdapter
    except StricterThanLlamaCpp:
        adapter = True  # the adapter check allows larger files and names the rule that this one breaks
    except InputError:
        adapter = False  # both checks report the same errors of the container
    return _on_model(lora_file.check(path) if adapter else vector_file.check(path), model, engine)


def check_vector(path: str | Path, model: str | Path | None = None) -> CheckReport[SteeringFile]:
    """Check a file as `check` does, but always as a control vector, whatever kind it declares."""
    return _on_model(vector_file.check(path), model)


def _on_model(
    report: CheckReport[SteeringFile], model: str | Path | None, engine: EngineSettings | None = None
) -> CheckReport[SteeringFile]:
    """Return the report with the effect on `model` added, unless the file itself has an error."""
    if model is None or report.content is None or not report.valid:
        return report
    from rs_gguf.engines.llama.model import LlamaModel
    from rs_gguf.engines.settings import DEFAULTS
    from rs_gguf.steering.effect_check import other_model

    with LlamaModel(Path(model), n_parallel=4, settings=engine or DEFAULTS) as loaded:
        effect = _effect_on(report.content, Path(report.path), loaded)
    return replace(
        report,
        errors=effect.reasons,
        warnings=(*report.warnings, *other_model(report.content.provenance, model)),
        loader_says=report.loader_says or effect.loader_says.replace("%s", report.path),
        effect=effect,
    )


def check_effect(path: Path, model: Engine) -> EffectCheck:
    """Run the file at `path` on a loaded model and return what was observed.

    Raises:
        InputError: the file holds no usable vector or adapter. Or the model cannot run the prompts, its
            tensors cannot be read, or the disk has no room for one matrix.
    """
    return _effect_on(read(path), path, model)


def _effect_on(content: SteeringFile, path: Path, model: Engine) -> EffectCheck:
    from rs_gguf.steering.adapter_effect import check_adapter_effect
    from rs_gguf.steering.effect_check import check_vector_effect

    if isinstance(content, LoraAdapter):
        return check_adapter_effect(content, path, model)
    assert isinstance(content, SteeringVector)  # llama.cpp has only these two kinds
    return check_vector_effect(content, model)


def path_and_scale(argument: str) -> tuple[Path, float]:
    """Split `PATH` or `PATH:SCALE`, as llama.cpp writes it; without `:SCALE`, or if it is a file, scale 1.0.

    Raises:
        InputError: the text after the last colon is not a number.
    """
    path, colon, scale = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return Path(argument), 1.0
    try:
        return Path(path), float(scale)
    except ValueError as error:
        raise InputError(
            f"{argument!r}: no such file, and {scale!r} is not a number. Give PATH or PATH:SCALE, with a "
            "number as SCALE."
        ) from error


def llama_options(file: str, layers: tuple[int, int], *, is_vector: bool, reasoning_off: bool) -> str:
    """Return llama.cpp's options for a file of a report, which must already be quoted for the shell.

    layers: first and last layer, which a control vector needs.
    reasoning_off: add the option that switches thinking off (`ChatFormat.thinks_in_server`).
    """
    options = vector_options(file, *layers) if is_vector else f"{LoraAdapter.option} {file}"
    return options + _thinking(reasoning_off)


def server_command(model: Path, path: Path, content: SteeringFile, *, reasoning_off: bool) -> str:
    """Return the command that starts llama-server with a model and the file at `path`."""
    options = content.options(_llama_path_argument(path))
    # A Hugging Face folder is not a file that llama-server can load; MODEL.gguf stands for one.
    model_file = shell_path(model) if model.is_file() else "MODEL.gguf"
    return f"llama-server -m {model_file} {options}{_thinking(reasoning_off)}"


def _thinking(reasoning_off: bool) -> str:
    return " --reasoning off" if reasoning_off else ""


def _llama_path_argument(path: Path) -> str:
    """Quote a path for a llama.cpp option.

    llama.cpp splits the value at commas, so CSV-quote a path that needs it, then shell-quote the result.
    """
    text = str(path)
    if "," in text or text.startswith('"'):
        return _shell_quote('"' + text.replace('"', '""') + '"')
    return shell_path(path)


def shell_path(path: Path) -> str:
    """Quote a path for the shell. Write the home folder as `~`, so that the user's name is not shown."""
    with contextlib.suppress(RuntimeError):  # the user has no home folder
        if os.name != "nt" and path.is_relative_to(Path.home()):  # shells of Windows do not expand `~`
            return f"~/{shlex.quote(path.relative_to(Path.home()).as_posix())}"
    return _shell_quote(str(path))


def _shell_quote(text: str) -> str:
    return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)
