"""The options of every command that runs a model: how llama.cpp loads it and decodes, named as there.

A command gets them as one `EngineOptions`. Without a recipe they become `EngineSettings`; with one they
override its keys.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rs_gguf.engines.settings import EngineSettings

# As in `EngineSettings`, without its imports.
_CACHE_TYPES = click.Choice(["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"])


class EngineOption(click.Option):
    """An option of every command that runs a model. The reference lists it once, and not for each command."""


@dataclass(frozen=True)
class EngineOptions:
    """The options that were given: values as text, by their key in `EngineSettings`."""

    given: Mapping[str, str]

    def settings(self) -> EngineSettings:
        """Return the settings. Raise `InputError` if values do not go together."""
        from rs_gguf.engines.settings import EngineSettings

        return EngineSettings.of(self.given)

    def overrides(self) -> tuple[str, ...]:
        """Return the options as overrides of a recipe."""
        return tuple(f"engine.{key}={json.dumps(value)}" for key, value in self.given.items())


_OPTIONS = (
    click.option("-ngl", "--gpu-layers", cls=EngineOption, metavar="N|auto|all",
                 help="Layers on the GPU.  [default: auto, which is all]"),
    click.option("-t", "--threads", cls=EngineOption, metavar="N", type=click.IntRange(-1, 512),
                 help="CPU threads; -1 for one on each usable core.  [default: -1]"),
    click.option("-c", "--ctx-size", cls=EngineOption, metavar="N", type=click.IntRange(1),
                 help="KV cells that all sequences share.  [default: 8192]"),
    click.option("-b", "--batch-size", cls=EngineOption, metavar="N", type=click.IntRange(1),
                 help="Maximum tokens of one decoding step.  [default: 512]"),
    click.option("-fa", "--flash-attn", cls=EngineOption, type=click.Choice(["on", "off", "auto"]),
                 help="Flash attention.  [default: auto]"),
    click.option("-ctk", "--cache-type-k", cls=EngineOption, metavar="TYPE", type=_CACHE_TYPES,
                 help=f"Type of the cached keys: {', '.join(_CACHE_TYPES.choices)}.  [default: f16]"),
    click.option("-ctv", "--cache-type-v", cls=EngineOption, metavar="TYPE", type=_CACHE_TYPES,
                 help="Type of the cached values; a quantised one needs flash attention.  [default: f16]"),
    click.option("-sm", "--split-mode", cls=EngineOption,
                 type=click.Choice(["none", "layer", "row", "tensor"]),
                 help="How several GPUs share the model.  [default: layer]"),
    click.option("-ts", "--tensor-split", cls=EngineOption, metavar="N,N,...",
                 help="Share of each GPU; by default, by their free memory."),
    click.option("-mg", "--main-gpu", cls=EngineOption, metavar="N", type=click.IntRange(0),
                 help="GPU for --split-mode none, or for intermediate results with row.  "
                      "[default: 0]"),
)  # fmt: skip


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which gets them as its argument `engine`."""

    @functools.wraps(command)
    def with_engine(**arguments: Any) -> Any:
        given = {key: arguments.pop(key) for key in _KEYS}
        texts = {key: str(value) for key, value in given.items() if value is not None}
        return command(engine=EngineOptions(texts), **arguments)

    wrapped: Callable[..., Any] = with_engine
    for option in reversed(_OPTIONS):  # the help lists them in reverse order
        wrapped = option(wrapped)
    return wrapped


_KEYS = (
    "gpu_layers", "threads", "ctx_size", "batch_size", "flash_attn", "cache_type_k", "cache_type_v",
    "split_mode", "tensor_split", "main_gpu",
)  # fmt: skip
