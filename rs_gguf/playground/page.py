"""The page itself, in Gradio: controls, both answers, and the gate activations of the prompt.

A `Session` and prompts to offer go in; a server on the loopback interface comes out. Answers are shown as
plain text. Only `drawing` makes markup, and it escapes every text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from html import escape
from threading import Lock
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import; nothing may be sent anywhere

import gradio as gr
from fastapi.middleware import Middleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rs_gguf.errors import InputError
from rs_gguf.playground import drawing
from rs_gguf.playground.session import Answers, Session
from rs_gguf.records.conversation import Prompt

HOST = "127.0.0.1"
_SYSTEM_FONT = ["system-ui", "sans-serif"]  # Gradio's own themes load fonts from elsewhere
_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_NO_GATES = "<p>No gate activations: no file has gates, or a server has the model.</p>"
Shown = tuple[str, str, str, str]  # unsteered answer, steered answer, shaded prompt, bars


class _OwnContentOnly:
    """Middleware that lets the browser load nothing from elsewhere, and refuses what other sites send."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", _POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        headers = Headers(scope=scope) if scope["type"] in ("http", "websocket") else {}
        if headers.get("origin", own := f"http://{headers.get('host')}") != own:
            await PlainTextResponse("Another site asked.", 403)(scope, receive, send)
            return
        await self._app(scope, receive, send_with_policy)


def build(session: Session, prompts: Sequence[Prompt]) -> gr.Blocks:
    """Return the page. A model has one cache, so a new question ends the answers to the one before."""
    one_at_a_time = Lock()
    running: list[Answers] = []

    def end() -> None:
        while running:
            running.pop().close()

    def end_after_this_token() -> None:
        with one_at_a_time:
            end()

    def ask(prompt: str, factor: float) -> Iterator[Shown]:
        if not prompt.strip():
            raise gr.Error("Type a prompt, or choose one.", print_exception=False)
        try:
            with one_at_a_time:
                end()
                gates = session.gates(prompt, factor)
                answers = session.answers(prompt, factor)
                running.append(answers)
            tokens = drawing.shaded(gates.tokens) if gates else _NO_GATES
            layers = drawing.bars(gates.layers) if gates else ""
            unsteered = steered = ""
            while True:
                yield unsteered, steered, tokens, layers
                # Gradio may drop this generator at a yield: nothing is locked there.
                with one_at_a_time:
                    shown = next(answers, None)
                if shown is None:
                    return
                unsteered, steered = shown
        except InputError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error

    choices = [(f"{prompt.kind}: {prompt.prompt[:70]}", prompt.prompt) for prompt in prompts]
    with gr.Blocks(title="rs-export try", analytics_enabled=False) as page:
        gr.HTML(f"<h1>rs-export try</h1><p>{escape(session.name)}</p>")
        with gr.Row():
            with gr.Column(scale=3):
                chosen = gr.Dropdown(choices, value=None, label="Prompts")
                prompt = gr.Textbox(label="Prompt", lines=2, max_length=20_000)
            with gr.Column(scale=1):
                factor = gr.Slider(
                    0, 2, value=1, step=0.05, label="Scale", info="Multiplies the scale of every file."
                )
                with gr.Row():
                    start, stop = gr.Button("Answer", variant="primary"), gr.Button("Stop")
        with gr.Row():
            unsteered = gr.Textbox(label="Unsteered", lines=10, interactive=False)
            steered = gr.Textbox(label="Steered", lines=10, interactive=False)
        with gr.Row():
            with gr.Column():
                gr.HTML("<h3>Gate activation by token</h3><p>Darkest: 1, the mean sensitive prompt.</p>")
                tokens = gr.HTML()
            with gr.Column():
                gr.HTML("<h3>Gate activation by layer, at the last token</h3><p>Dashed: 1.</p>")
                layers = gr.HTML()
        chosen.input(None, chosen, prompt, js="text => text ?? ''")  # in the browser, so that it is instant
        # The answers under way end before the new ones begin, which their late text would overwrite.
        gr.on([start.click, prompt.submit], end_after_this_token, show_progress="hidden").then(
            ask, [prompt, factor], [unsteered, steered, tokens, layers],
            concurrency_limit=None, trigger_mode="always_last", show_progress="hidden",
        )  # fmt: skip
        stop.click(end_after_this_token, show_progress="hidden")
    return page


def launch(page: gr.Blocks, port: int | None) -> str:
    """Serve the page on the loopback interface, in threads of its own, and return its address.

    port: None takes the first free one from 7860 on.

    Raises:
        InputError: the port is taken.
    """
    # Gradio asks its own server whether it runs, which a proxy of the environment could not reach.
    direct = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    os.environ["no_proxy"] = ",".join(filter(None, [direct, HOST]))
    options: dict[str, Any] = {
        "middleware": [
            # A page elsewhere could otherwise reach this one under a host name of its own.
            Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
            Middleware(_OwnContentOnly),
        ]
    }
    try:
        _, address, _ = page.queue().launch(
            server_name=HOST, server_port=port, share=False, prevent_thread_lock=True, quiet=True,
            footer_links=[], ssr_mode=False, pwa=False, mcp_server=False, app_kwargs=options,
            theme=gr.themes.Default(font=_SYSTEM_FONT, font_mono=["monospace"]),
        )  # fmt: skip
    except OSError as error:
        raise InputError(
            f"cannot serve on port {port or 7860} ({error}). Give another one with --port."
        ) from error
    return str(address)
