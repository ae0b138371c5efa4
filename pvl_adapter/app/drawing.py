"""What the page shows of a slice: pictures, colour bars, legends and a table, as HTML that links to nothing.

Pictures are within the HTML, so that none is left on the disk, and so that a page shows only what its session found.

Shape alphabet: K sentences, H W pixels of the network, h w pixels of a picture on the page.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageFilter

LN2 = math.log(2.0)
OUTER, INNER, DOUBT = (76, 201, 240), (255, 214, 10), (199, 125, 255)
_SIDE = 512  # of a picture on the page, about
_TOPS = (0.02, 0.05, 0.1, 0.2, 0.4, LN2)  # of colour bars, in nats

Color = tuple[int, int, int]

CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def text(words: object) -> str:
    """Words that somebody typed, as HTML; braces too, which Gradio's templates would read."""
    return html.escape(str(words)).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;")


def box(inside: str, *, kind: str = "") -> str:
    return f'<div class="pvl"><div class="{kind and f"pvl-{kind}"}">{inside}</div></div>'


def panels(figures: Sequence[str], *, below: str = "") -> str:
    two = " two" if len(figures) == 2 else ""
    return f'<div class="pvl"><div class="pvl-panels{two}">{"".join(figures)}</div>{below}</div>'


def figure(title: str, picture: np.ndarray, *, bar: str = "") -> str:
    """A picture, uint8 [h, w, 3], with a title that is HTML; a click enlarges it."""
    packed = io.BytesIO()
    Image.fromarray(picture).save(packed, "PNG", compress_level=1)
    source = f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"
    return f'<figure tabindex="0"><figcaption>{title}</figcaption><img alt="{title}" src="{source}">{bar}</figure>'


def map_figure(title: str, values: np.ndarray, *, size: tuple[int, int], top: float | None = None) -> str:
    """A map [H, W] with its colour bar: a probability, or nats up to `top`; None takes the next of a few round tops."""
    nats = title != "Probability"
    if top is None:
        top = next((top for top in _TOPS if values.max() <= top), LN2) if nats else 1.0
    colors = colormaps["magma" if nats else "viridis"]
    shades = np.clip(resized(values, size) / top, 0.0, 1.0)
    steps = ", ".join(_css(colors(step, bytes=True)) for step in np.linspace(0.0, 1.0, 9))
    ends = [f"{end:.2g}" for end in (0.0, top / 2, top)]
    ticks = f"<span>{ends[0]}</span><span>{ends[1]}</span><span>{ends[2]}{' nats' if nats else ''}</span>"
    bar = f'<div class="pvl-bar" style="background: linear-gradient(to right, {steps})"></div>'
    return figure(title, colors(shades, bytes=True)[..., :3], bar=bar + f'<div class="pvl-ticks">{ticks}</div>')


def legend(entries: Iterable[tuple[Color, str, str]]) -> str:
    """Colours with their meaning, which is HTML; the style is "fill", "line" or "stripes"."""
    styles = {
        "fill": "background: {0}",
        "line": "border: 3px solid {0}",
        "stripes": "background: repeating-linear-gradient(45deg, {0} 0 3px, transparent 3px 6px)",
    }
    chips = (f'<i style="{styles[style].format(_css(color))}"></i>{meaning}' for color, style, meaning in entries)
    return f'<div class="pvl-legend">{"".join(f"<span>{chip}</span>" for chip in chips)}</div>'


def card(title: str, facts: Mapping[str, str], *, color: Color | None = None) -> str:
    """Facts under a title, all of it HTML; what is empty is left out."""
    chip = "" if color is None else f'<i style="background: {_css(color)}"></i> '
    said = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items() if value)
    return f'<div class="pvl-card">{chip}<b>{title}</b><dl>{said}</dl></div>'


def cards(made: Iterable[str], *, below: str = "") -> str:
    return f'<div class="pvl"><div class="pvl-cards">{"".join(made)}</div>{below}</div>'


def _css(color: Sequence[int]) -> str:
    return f"rgb({color[0]} {color[1]} {color[2]})"


def page_size(image: np.ndarray) -> tuple[int, int]:
    """Height and width of an image [h, w] or [h, w, 3] on the page."""
    height, width = image.shape[:2]
    factor = _SIDE / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map or mask, bilinearly: float32 [h, w]."""
    image = Image.fromarray(np.asarray(values, dtype=np.float32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))


def canvas(image: np.ndarray) -> np.ndarray:
    """The image as it is drawn upon: uint8 [h, w, 3]."""
    return np.array(Image.fromarray(image).convert("RGB").resize(page_size(image)[::-1], Image.Resampling.BICUBIC))


def fill(picture: np.ndarray, mask: np.ndarray, color: Color, *, opacity: float = 0.4) -> None:
    """Tint what is in a mask [h, w], in place."""
    picture[mask] = np.rint((1.0 - opacity) * picture[mask] + opacity * np.array(color)).astype(np.uint8)


def outline(picture: np.ndarray, mask: np.ndarray, color: Color) -> None:
    """Draw the border of a mask [h, w], in place; not along the edge of the picture."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    picture[np.asarray(grey.filter(ImageFilter.MaxFilter(3))) != np.asarray(grey.filter(ImageFilter.MinFilter(3)))] = (
        color
    )


def stripes(picture: np.ndarray, mask: np.ndarray, color: Color = DOUBT) -> None:
    """Hatch what is in a mask [h, w], in place."""
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    fill(picture, mask & ((rows + columns) // 4 % 3 == 0), color, opacity=0.9)
