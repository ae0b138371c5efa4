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

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageFilter

LN2 = math.log(2.0)
OUTER, INNER, DOUBT = (76, 201, 240), (255, 214, 10), (199, 125, 255)
_SIDE = 512  # of a picture on the page, about
_TOPS = (0.02, 0.05, 0.1, 0.2, 0.4, LN2)  # of colour bars, in nats

Color = tuple[int, int, int]

CSS = """
.gradio-container {max-width: 1280px !important}
.gradio-container .html-container {padding: 0 !important}
#pvl-main {display: grid; gap: 16px; align-items: start;
  grid-template: "ask view" auto "tune view" 1fr / minmax(300px, 2fr) minmax(0, 3fr)}
#pvl-ask {grid-area: ask} #pvl-view {grid-area: view} #pvl-tune {grid-area: tune}
#pvl-main > * {min-width: 0 !important; width: auto}
.pvl h1 {font-size: 1.45rem; margin: 0; font-weight: 650}
.pvl p {margin: .2rem 0}
.pvl-note {color: var(--body-text-color-subdued); font-size: .88rem}
.pvl-error {border-left: 4px solid #dc2626; padding: .6rem .8rem; background: var(--block-background-fill);
  overflow-wrap: anywhere}
.pvl-empty {border: 1px dashed var(--border-color-primary); border-radius: 8px; padding: 1.5rem; min-height: 26rem;
  display: grid; place-items: center;
  text-align: center; color: var(--body-text-color-subdued)}
.pvl-panels {display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px}
.pvl-panels figure {margin: 0; outline: none; cursor: zoom-in}
.pvl-panels figure:focus, .pvl-panels figure:only-child {grid-column: 1 / -1; cursor: default}
.pvl-panels img {width: 100%; display: block; border-radius: 6px; background: #000}
.pvl-panels figcaption {font-weight: 600; font-size: .92rem; padding-bottom: 4px; overflow-wrap: anywhere}
.pvl-bar {height: 10px; border-radius: 3px; margin-top: 6px}
.pvl-ticks {display: flex; justify-content: space-between; font-size: .78rem; font-variant-numeric: tabular-nums;
  color: var(--body-text-color-subdued)}
.pvl-legend {display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .85rem; margin: 8px 0 2px}
.pvl-legend span {display: inline-flex; align-items: center; gap: 6px}
.pvl-legend i, .pvl-card i {width: 14px; height: 14px; border-radius: 3px; flex: none; display: inline-block}
.pvl-cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 10px}
.pvl-card {border: 1px solid var(--border-color-primary); background: var(--block-background-fill);
  border-radius: 8px; padding: 10px 12px; font-size: .88rem; overflow-wrap: anywhere}
.pvl-card dl {display: grid; grid-template-columns: auto 1fr; gap: 2px 12px; margin: 4px 0 0}
.pvl-card dt {color: var(--body-text-color-subdued)}
.pvl-card dd {margin: 0; font-variant-numeric: tabular-nums}
.pvl progress {width: 100%; height: 12px; accent-color: var(--color-accent)}
@media (max-width: 700px) {
  #pvl-main {grid-template: "ask" "view" "tune" / minmax(0, 1fr)}
  .pvl-empty {min-height: 9rem}
  .pvl-panels {grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 8px}
  .pvl-panels figure:first-child, .pvl-panels.two figure {grid-column: 1 / -1}
  .pvl-panels figcaption {font-size: .82rem}
  .pvl-panels:not(.two) figure:not(:focus) .pvl-ticks span:nth-child(2) {display: none}
  .pvl-ticks {font-size: .7rem}
}
"""


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
