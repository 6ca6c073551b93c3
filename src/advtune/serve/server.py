"""The server behind `advtune serve`: this machine alone by default, no telemetry, nothing fetched by the page."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.util import find_spec
from typing import Any

import torch

from advtune.errors import UserError
from advtune.serve import models
from advtune.serve.play import MEGABYTES

LOCAL = ("127.0.0.1", "localhost", "::1")
VISITORS = 100  # whose pictures are kept; of more, those who were there last
# A browser that obeys this fetches nothing from elsewhere, whatever Gradio's own pages would like.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; form-action 'self'; base-uri 'self'"
)
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}
Message = MutableMapping[str, Any]
Asgi = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


def serve(
    name: str | None = None, *, data: str | None = None, host: str = "127.0.0.1", port: int = 7860,
    browser: bool = True, device: str = "auto",
) -> None:  # fmt: skip
    """Show the page over a run, a folder of runs or a backbone until interrupted (see `models.open_shelf`).

    data: the set whose pictures and words it begins with. port 0: any that is free. Raises UserError when Gradio is
    missing, the port is taken, or the model or the set cannot be had.
    """
    if find_spec("gradio") is None:
        raise UserError("the web page needs Gradio: pip install 'advtune[serve]'")
    with listen(host, port) as listening, tempfile.TemporaryDirectory(prefix="advtune-serve-") as uploads:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # one picture at a time; threads would wait
        shelf = models.open_shelf(name, device)
        shelf.pair(next(iter(shelf.tuned), None))  # read now, so that what is wrong is said here
        task = models.open_task(shelf, data)
        address = f"http://{_shown(host)}:{listening.getsockname()[1]}"
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        if host not in LOCAL:
            print(f"advtune: {host}: whoever reaches this machine can use the page", file=sys.stderr)
        if browser:
            webbrowser.open(address)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the uploads go, however it ends
        try:
            _run(app(shelf, task), listening)
        except KeyboardInterrupt:
            print("advtune: the page is closed", file=sys.stderr)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError when the address cannot be had."""
    if not 0 <= port < 65536:
        raise UserError(f"--port {port} is not in 0 .. 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror}); choose another with --port") from None


def app(shelf: models.Shelf, task: Any) -> Any:
    """The application, for any ASGI server."""
    import fastapi
    import gradio as gr

    from advtune.serve import page

    shown = models.examples(task)
    blocks = page.build(shelf, task, shown, models.begin(shelf, task, shown))
    blocks.queue(default_concurrency_limit=1, max_size=16, api_open=False)
    blocks.has_launched = True  # else Gradio, mounted, lets a request name any file of this machine as its upload
    blocks.state_session_capacity = VISITORS
    outer = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    theme = gr.themes.Default(primary_hue="blue", font=page.FONTS, font_mono=["ui-monospace", "monospace"])
    mounted = gr.mount_gradio_app(
        outer, blocks, "/", show_error=False, max_file_size=f"{MEGABYTES}mb", ssr_mode=False, mcp_server=False,
        enable_monitoring=False, run_history=False, pwa=False, footer_links=[], theme=theme, css=page.CSS.read_text(),
    )  # fmt: skip
    return with_headers(mounted)


def with_headers(inner: Any) -> Asgi:
    """The application with HEADERS on every answer."""

    async def outer(scope: Message, receive: Any, send: Any) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        await inner(scope, receive, sending)

    return outer


def _run(application: Any, listening: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])


def _shown(host: str) -> str:
    """The host as a browser on this machine writes it."""
    if host in ("0.0.0.0", "::"):
        return "localhost"
    return f"[{host}]" if ":" in host else host
