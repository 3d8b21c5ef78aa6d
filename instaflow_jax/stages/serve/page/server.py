"""Opens the page of `serve`: how it looks, and the server that gradio brings."""

import contextlib
import logging
import os
from collections.abc import Iterator

import gradio

UPLOAD = "10mb"  # largest condition image
# Fonts of the visitor's own system; gradio's theme would load its fonts from the internet.
THEME = gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
# In the page's head, because gradio keeps what it is given as CSS from reaching its outermost elements.
STYLE = """<style>
.gradio-container { width: 100% !important; max-width: 1000px !important; margin: 0 auto !important; }
:is(button, input, textarea, a, [tabindex]):focus-visible {
  outline: 3px solid var(--primary-700) !important; outline-offset: 2px;
}
input[type="range"] { height: 28px !important; }
.waiting .progress-text { position: static !important; transform: none !important; }
.waiting .progress-level-inner { display: none !important; }
.columns h3 { margin: 0 !important; font-size: 1rem !important; }
.images .empty { min-height: 0 !important; aspect-ratio: 1; }
.columns > .column:only-child { max-width: 560px; margin: 0 auto; }
.images .grid-wrap { min-height: 0 !important; max-height: none !important; }
.images .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; }
.images .caption-label { inset: auto 0 0 0 !important; max-width: none !important; border-width: 0 !important; }
.images .caption-label { border-radius: 0 !important; padding: 1px 2px !important; text-align: center; }
.images.small img { image-rendering: pixelated; }
.images.stale { opacity: 0.3; }
.session .grid-wrap { padding-top: 36px !important; }
.session .grid-container { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important; }
@media (max-width: 600px) {
  .gradio-container .main { padding: 12px !important; }
  .columns h3 { min-height: 2lh; font-size: 0.85rem !important; }
  .images .preview { position: fixed !important; inset: 0 !important; width: auto !important; height: auto !important; }
  .images .preview { z-index: 100 !important; }
}
</style>"""
# Arrow keys move a slider without gradio's event for letting go of it.
SCRIPT = """<script>
addEventListener("keyup", event => {
  if (event.target.type === "range" && /^(Arrow|Page|Home|End)/.test(event.key))
    event.target.dispatchEvent(new PointerEvent("pointerup"));
});
</script>"""


def open_page(page: gradio.Blocks, *, host: str, port: int, queue: int, uploads: bool = False) -> str:
    """Serves the page from a thread and returns its address; requests run one at a time, and up to `queue` wait.

    Args:
      uploads: whether visitors may send files, of up to `UPLOAD`.

    Raises:
      OSError: the port is taken.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio calls its own page at the start
    page.queue(max_size=queue, api_open=False)  # an open API would let requests skip the queue
    off = ("share", "inbrowser", "ssr_mode", "pwa", "mcp_server", "enable_monitoring")
    with without_proxies():
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=UPLOAD if uploads else 1,
            footer_links=[],
            theme=THEME,
            head=STYLE + SCRIPT,
            **dict.fromkeys(off, False),
        )
    return url


@contextlib.contextmanager
def without_proxies() -> Iterator[None]:
    """Hides `http_proxy` and its kin: gradio calls its own page at the start, which no proxy reaches."""
    names = ("no_proxy", "NO_PROXY")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, "*"))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)
