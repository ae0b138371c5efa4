"""The page: images and sentences in the browser, with what the model finds and how sure it is.

    from pvl_adapter.app import build

    build(model).launch()

It asks nothing of the network: fonts are the system's, scripts its own, and a Content-Security-Policy forbids the rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import pvl_adapter as pvl
from pvl_adapter.app.drawing import CSS
from pvl_adapter.app.events import Events
from pvl_adapter.app.examples import Example, phantoms
from pvl_adapter.app.layout import lay_out, lay_out_api
from pvl_adapter.monte_carlo import NUM_SAMPLES, Auto

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'"
)


class Page(gr.Blocks):
    """Blocks that launch with the page's own look, and without any request to outside."""

    def launch(self, *args: Any, **how: Any) -> Any:
        ours: dict[str, Any] = {
            "theme": gr.themes.Default(
                primary_hue="teal",
                font=["system-ui", "sans-serif"],  # names, where Gradio's own would be files
                font_mono=["ui-monospace", "monospace"],
            ),
            "css": CSS,
            "app_kwargs": {"middleware": [Middleware(_Policy)]},
            "footer_links": ["api"],
            "run_history": False,  # which a browser would keep
            "share": False,
            "ssr_mode": False,
            "max_file_size": "4gb",
        }
        return super().launch(*args, **{**ours, **how})


class _Policy:
    """Adds the Content-Security-Policy to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def build(
    model: pvl.MedCLIPSeg,
    *,
    name: str = "",
    num_samples: int | Auto | str | None = None,
    examples: Sequence[Example] | None = None,
) -> Page:
    """The page of a model; `launch()` it.

    Args:
        model: Trained, and calibrated if it shall promise anything.
        name: What the model is called on the page.
        num_samples: As in `model.predict`; None takes those of the calibration, else the default.
        examples: To click; None means a made-up head, which the library draws.
    """
    if num_samples is None:
        of = model.calibration.sampling["num_samples"] if model.calibration else NUM_SAMPLES
        num_samples = int(of) if str(of).isdecimal() else of
    events = Events(model, {"num_samples": num_samples}, phantoms() if examples is None else list(examples))
    with Page(title="pvl-adapter", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        lay_out(events, name=name)
        lay_out_api(events)
    page.queue(default_concurrency_limit=4)
    return page
