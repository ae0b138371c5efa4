"""What the page says of a session: pictures of the shown slice, a table of all sentences, and what the model is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import pvl_adapter as pvl
from pvl_adapter.app import drawing
from pvl_adapter.app.drawing import figure, legend, map_figure, text
from pvl_adapter.app.session import MAPS, Session
from pvl_adapter.data.scans import Key
from pvl_adapter.hub.backbones import describe_backbone
from pvl_adapter.label_map import combine

_CASE: dict[Any, str] = {True: "leave it to a human", False: "need not be left to a human"}
_BEWARE = "image or sentence is unlike those of the calibration: promises may not hold"
_EXPLAINED = """<p class="pvl-note">Aleatoric: what the image leaves open, however often one asks. Epistemic: what the
model's samples disagree about. Both in nats; together at most 0.69. Click a picture to enlarge it.</p>"""


def slice_view(session: Session, key: Key, *, shown: int | None, threshold: float, abstain: float) -> str:
    """The slice with what one sentence finds in it, or with one label for every pixel if `shown` is None."""
    assert session.volume is not None
    image = session.volume.read(key)
    picture, size = drawing.canvas(image), drawing.page_size(image)
    name = {"x": "sagittal slice", "y": "coronal slice", "z": "axial slice"}.get(key[0], "slice") + f" {key[1]}"
    name = text(session.volume.source.name) + (f", {name}" if len(session.keys) > 1 else "")
    if (found := session.found.get(key)) is None:
        hint = "This slice was not predicted yet." if session.found else "Now say what is to be found, and press Find."
        return drawing.panels([figure(name, picture)], below=f'<p class="pvl-note">{hint}</p>')
    labels = session.labels
    if shown is None:
        names = [label.name for label in labels]
        probability, calibrated = found.maps["probability"], found.maps.get("calibrated_probability")
        large = np.stack([drawing.resized(values, size) for values in probability])  # [K, h, w]
        values = combine(large, threshold=threshold, names=names).labels.numpy()
        for label in labels:
            drawing.fill(picture, values == label.value, label.color)
            drawing.outline(picture, values == label.value, label.color)
        nats = combine(probability, threshold=threshold, calibrated=calibrated).entropy.numpy()
        entropy = map_figure("Entropy over labels", nats, size=size, top=math.log(len(names) + 1))
        entries = [(label.color, "fill", text(label.name)) for label in labels]
        return drawing.panels([figure(name, picture), entropy], below=legend(entries))
    maps, color = {of: values[shown] for of, values in found.maps.items()}, labels[shown].color
    mask = drawing.resized(maps["probability"], size) > threshold
    drawing.fill(picture, mask, color)
    drawing.outline(picture, mask, color)
    entries = [(color, "fill", f"mask: probability above {threshold:.2f}")]
    alpha = f"{100 * found.alpha:.4g}%"
    for outline, line_color, meaning in (
        ("outer_mask", drawing.OUTER, f"outer outline: misses at most {alpha} of it"),
        ("inner_mask", drawing.INNER, f"inner outline: at most {alpha} in it is something else"),
    ):
        if outline in maps:
            drawing.outline(picture, drawing.resized(maps[outline], size) > 0.5, line_color)
            entries.append((line_color, "line", meaning + ("" if maps[outline].any() else " (empty here)")))
    if (doubtful := found.doubtful(abstain)[shown]).any():
        drawing.stripes(picture, drawing.resized(doubtful, size) > 0.5)
        entries.append((drawing.DOUBT, "stripes", f"left to a human: more than {abstain:.2f} nats"))
    figures = [figure(name, picture), *(map_figure(of.capitalize(), maps[of], size=size) for of in MAPS)]
    return drawing.panels(figures, below=legend(entries) + _EXPLAINED)


def measures_view(session: Session, key: Key, *, threshold: float, abstain: float) -> str:
    """What each sentence finds, in figures, and what is to be known of the input and of promises."""
    if session.volume is None:
        return ""
    notes, made = [text(note) for note in session.volume.notes], []
    if (found := session.found.get(key)) is not None:
        rows = session.measures(key, threshold=threshold, abstain=abstain)
        for label, row in zip(session.labels, rows, strict=True):
            unit = "mm2" if "mm2" in row else "pixels"
            facts = {
                "presence": row.get("presence", ""),
                "area": _amount(row, unit, found.alpha) + (" in this slice" if len(session.keys) > 1 else ""),
                "volume": _amount(row, "ml", found.alpha),
                "left to a human": f"{row['left_to_a_human']:.1%} of the pixels",
                "case": _CASE.get(row.get("abstained", ""), ""),
                "beware": _BEWARE if row.get("flagged") else "",
            }
            made.append(drawing.card(text(label.name), facts, color=label.color))
        if found.no_promise:
            notes.append(f"No outlines, verdicts or intervals: {text(found.no_promise)}.")
    return drawing.cards(made, below="".join(f'<p class="pvl-note">{note}</p>' for note in notes))


def _amount(row: dict[str, Any], unit: str, alpha: float) -> str:
    """With its interval, if there is one."""
    if unit not in row:
        return ""
    digits = 0 if unit == "pixels" or row[unit] >= 100 else 1
    said = f"{row[unit]:,.{digits}f} {unit.replace('mm2', 'mm²')}"
    if (interval := row.get(f"{unit}_interval")) is None:
        return said
    return f"{said} ({1 - alpha:.0%}: {interval[0]:,.{digits}f} to {interval[1]:,.{digits}f})"


def facts_of(model: pvl.MedCLIPSeg) -> dict[str, str]:
    """What the model is; facts that nobody recorded are said to be missing."""
    provenance = model.provenance
    try:
        backbone = describe_backbone(model.clip)
    except ValueError:
        backbone = {}
    kept = ("repo", "file", "revision", "fine_tuned_from", "intended_use")
    pretrained = provenance.get("repo") or backbone.get("pretrained", backbone.get("name"))
    facts = {
        "CLIP": backbone.get("name") or type(model.clip).__name__,
        "pretrained": pretrained or "not that it is recorded: take the CLIP's weights for random",
        "trained on": provenance.get("training_data") or "not recorded: take adapters and head for untrained",
        **{name.replace("_", " "): str(provenance[name]) for name in kept if provenance.get(name)},
        "scores": ", ".join(f"{name} {value}" for name, value in (provenance.get("scores") or {}).items()),
        "network": "{} x {} pixels".format(*model.image_size) + f", on {model.device}",
        "calibrated": "no: it promises nothing, see docs/trust.md",
    }
    if (calibration := model.calibration) is not None:
        of = calibration.facts
        facts["calibrated"] = f"on {of['subjects']} subjects of {of['dataset']}, alpha {calibration.alpha:g}"
    return {name: value for name, value in facts.items() if value}


def about(model: pvl.MedCLIPSeg, *, name: str) -> str:
    """The facts as a table."""
    facts = {"model": name or type(model).__name__, **facts_of(model)}
    return drawing.cards([drawing.card("", {fact: text(value) for fact, value in facts.items()})])
