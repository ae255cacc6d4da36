"""The page, by Gradio: one tab for each thing that the checkpoint can do.

Nothing is loaded from elsewhere: a content security policy keeps the browser to this server. Files
are served from a temporary folder of this process alone, never from the user's.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"  # before Gradio is imported

import gradio as gr
from markupsafe import Markup
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from torch import Tensor

from base.errors import UserError
from base.limits import UPLOAD_BYTES
from evaluation.demo import tabs
from evaluation.demo.abilities import Abilities, lacking
from evaluation.demo.index import Index

LOOPBACK = ("127.0.0.1", "localhost")
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "form-action 'self'; frame-ancestors 'self'"
)
CLEANED = (600, 3600)  # seconds: every so often files that are older than this are removed
WAITING = 64  # requests that may wait for the network
STYLE = Path(__file__).with_name("page.css")


def build(demo: tabs.Demo) -> gr.Blocks:
    """The page, not yet served."""
    abilities = demo.abilities
    with gr.Blocks(title="Quintet", analytics_enabled=False, delete_cache=CLEANED) as page:
        gr.HTML(header(abilities), elem_id="header")
        with gr.Tabs():
            for name, able, fill in (
                ("Search", demo.index is not None, tabs.search_tab),
                ("Classify", abilities.texts, tabs.classify_tab),
                ("Ground", abilities.word_maps, tabs.ground_tab),
                ("Answer", abilities.answer, tabs.answer_tab),
                ("Entail", abilities.entail, tabs.entail_tab),
                ("Recognise", abilities.recognise, tabs.recognise_tab),
            ):
                if able:
                    with gr.Tab(name):
                        fill(demo)
        gr.HTML(footer(abilities, demo.index is not None), elem_id="lacking")
    return page.queue(max_size=WAITING)


def header(abilities: Abilities) -> Markup:
    return Markup("<h1>Quintet</h1><p>{}</p>").format(abilities.title)


def footer(abilities: Abilities, folder: bool) -> Markup:
    """What this page does not show, in one line."""
    lines = lacking(abilities, folder)
    return Markup("<p>Not here: {}.</p>").format("; ".join(lines)) if lines else Markup()


def theme() -> gr.themes.Base:
    """Calm colours and the system's own fonts; dark where the browser asks for it. Quiet text keeps
    a contrast of 4.5 to its ground."""
    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "Roboto", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(body_text_color_subdued="*neutral_600")


class KeepToThisServer:
    """Adds headers to every answer: the browser asks nobody else, and guesses no types."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, receive, send_with_headers)


def middleware(host: str) -> list[Middleware]:
    """What every request goes through. On this machine alone its names are the only hosts: a page
    elsewhere whose name is pointed at 127.0.0.1 (DNS rebinding) would read the images by them."""
    found = [Middleware(KeepToThisServer)]
    if host in LOOPBACK:
        found.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK]))
    return found


def reach_without_proxy(host: str) -> None:
    """Gradio calls its own server once, which no proxy of the environment reaches."""
    for name in ("no_proxy", "NO_PROXY"):
        given = os.environ.get(name)
        os.environ[name] = ",".join(filter(None, [given, host, "127.0.0.1", "localhost"]))


@contextmanager
def serve(
    abilities: Abilities, index: Index | None, read: Callable[..., Tensor], host: str, port: int
) -> Iterator[str]:
    """Serve the page as long as the block runs; gives its address. Uploads and results lie in a
    temporary folder that goes with it. UserError: the port is taken."""
    with tempfile.TemporaryDirectory(prefix="quintet-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        reach_without_proxy(host)
        page = build(tabs.Demo(abilities, index, read))
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=UPLOAD_BYTES,
                allowed_paths=[],
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                theme=theme(),
                css_paths=STYLE,
                app_kwargs={"middleware": middleware(host), "docs_url": None},
                _frontend=False,  # no look at the page from here, which a busy machine fails
            )
        except OSError as error:
            raise UserError(f"{host}:{port}: cannot listen there ({error}); give --port") from None
        try:
            yield url
        finally:
            page.close(verbose=False)
