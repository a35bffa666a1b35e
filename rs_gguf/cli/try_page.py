"""Define the command `rs-export try`: a local page with unsteered and steered answers side by side.

In: a model, or the address of a llama-server, and steering files. Out: a page, until Ctrl-C.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rs_gguf.cli.engine_options import EngineOptions, engine_options
from rs_gguf.errors import InputError

if TYPE_CHECKING:
    from rs_gguf.engines.generation import Asking
    from rs_gguf.engines.settings import EngineSettings
    from rs_gguf.playground.session import Session


@click.command("try")
@click.argument("files", nargs=-1, required=True, metavar="FILE[:SCALE]...")
@click.option("--model", required=True, metavar="M",
              help="GGUF file, catalogue name, owner/name/file.gguf, or a llama-server: "
                   "http://host:port")  # fmt: skip
@click.option("--system-prompt", metavar="T", help="System prompt for both answers.")
@click.option("--tokens", default=256, show_default=True, type=click.IntRange(1),
              help="Maximum tokens of an answer.")  # fmt: skip
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0, 10),
              help="Sampling temperature; 0 is greedy decoding.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 2),
              help="Random seed for sampling.")  # fmt: skip
@click.option("--port", type=click.IntRange(1, 65535), help="Port; by default the first free one from 7860.")
@engine_options
def try_page(
    files: tuple[str, ...], model: str, system_prompt: str | None, tokens: int, temperature: float,
    seed: int, port: int | None, engine: EngineOptions,
) -> None:  # fmt: skip
    """Show unsteered and steered answers on a local page.

    The page has a slider for the scale, and shows gate activations by token and by layer. It offers the
    prompts of the run folder that holds FILE, or the project's own. Only this machine can open it. Needs the
    extra `try`.
    """
    from rs_gguf.engines.generation import Asking, Sampling
    from rs_gguf.playground.page import build, launch
    from rs_gguf.playground.session import examples
    from rs_gguf.steering.file import path_and_scale

    parts = [path_and_scale(file) for file in files]
    asking = Asking(system_prompt, tokens, Sampling(temperature=temperature, seed=seed))
    with _session(model, parts, asking, engine.settings()) as session:
        page = build(session, examples([path for path, _ in parts]))
        click.echo(f"Open {launch(page, port)} in a browser. Ctrl-C stops.")
        page.block_thread()


@contextlib.contextmanager
def _session(
    model: str, files: Sequence[tuple[Path, float]], asking: Asking, settings: EngineSettings
) -> Iterator[Session]:
    """Yield what answers. Raise `InputError` if the model or a file cannot be used."""
    if model.startswith(("http://", "https://")):
        from rs_gguf.engines.server.llama_server import LlamaServer
        from rs_gguf.playground.session import ServedModel
        from rs_gguf.steering.file import kind_of
        from rs_gguf.steering.lora import LoraAdapter

        for path, _ in files:
            if kind_of(path) is not LoraAdapter:
                raise InputError(
                    f"{path} is a control vector, and a running server keeps its own. Give the GGUF file as "
                    "--model, or an adapter."
                )
        yield ServedModel(LlamaServer(model, files), asking)
        return
    from rs_gguf.cli.terminal import TerminalProgress
    from rs_gguf.engines.llama.model import LlamaModel
    from rs_gguf.models.resolve import resolve_gguf
    from rs_gguf.playground.session import LoadedModel

    with contextlib.closing(TerminalProgress()) as progress:
        path = resolve_gguf(model, progress=progress.download)
    with (
        LlamaModel(path, n_parallel=1, settings=settings) as loaded,
        contextlib.closing(LoadedModel(loaded, files, asking)) as session,
    ):
        yield session
