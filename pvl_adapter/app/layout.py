"""Where things are on the page, and which event each of them sets off."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from pvl_adapter.app import views
from pvl_adapter.app.drawing import LN2, box
from pvl_adapter.app.events import ALL, AXES, EMPTY, Events
from pvl_adapter.app.examples import Example
from pvl_adapter.app.session import Session

HEADER = """<h1>Find what a sentence describes</h1>
<p>Drop an image or a scan, say what to find, and see where the model finds it and how sure it is.
<b>Not a medical device:</b> for research, not for diagnosis or treatment.</p>"""
CLICK = "() => document.querySelector('#pvl-file a, a#pvl-file, #pvl-file').click()"


def lay_out(events: Events, *, name: str) -> None:
    """The page that people see."""
    model = events.model
    limit = model.calibration.pixel_threshold if model.calibration else None
    session = gr.State(Session(), delete_callback=Session.close)
    gr.HTML(box(HEADER))
    with gr.Row(elem_id="pvl-main"):
        with gr.Column(elem_id="pvl-ask"):
            files = gr.File(label="Image, NIfTI, DICOM, or a zip of a series", file_count="multiple", height=160)
            which = gr.Dropdown(label="Input", visible=False)
            axis = gr.Radio([*AXES], value="axial", label="Slices", visible=False)
            number = gr.Slider(0, 1, step=1, label="Slice", visible=False)
            sentences = gr.Textbox(label="What to find, one sentence in each line", lines=2, max_lines=12)
            with gr.Row():
                find = gr.Button("Find", variant="primary")
                whole = gr.Button("Find in all slices", visible=False)
                cancel = gr.Button("Cancel", variant="stop", visible=False)
            status = gr.HTML(visible=False)
        with gr.Column(elem_id="pvl-view"):
            shown = gr.Radio([ALL], value=ALL, label="Show", visible=False)
            view, table = gr.HTML(EMPTY), gr.HTML()
        with gr.Column(elem_id="pvl-tune"):
            threshold = gr.Slider(0, 1, 0.5, step=0.01, label="A pixel is found if its probability is above")
            nats = round(limit or 0.7, 2)  # ln 2 is 0.693, so 0.7 leaves none
            abstain = gr.Slider(0, 0.7, nats, step=0.01, label="Leave a pixel to a human above (nats)")
            save = gr.Button("Download everything")
            file = gr.DownloadButton(visible="hidden", elem_id="pvl-file")
            samples = [[str(_thumbnail(each)), " · ".join(each.sentences.splitlines())] for each in events.examples]
            examples = gr.Dataset(
                label="Examples",
                components=[gr.Image(visible=False), gr.Textbox(visible=False)],
                headers=["image", "what to find"],
                samples=samples,
                type="index",
            )
    with gr.Accordion("About this model", open=False):
        gr.HTML(views.about(model, name=name))

    how = [threshold, abstain]
    opened = [session, which, axis, number, whole, shown, status, view, table]
    quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    slow: dict[str, Any] = {"api_visibility": "private", "show_progress_on": view}
    for event in (files.upload, files.clear, files.delete):
        event(events.receive, [session, files, axis, *how], opened, **slow)
    found = examples.click(events.click, [session, examples, axis, *how], [files, sentences, *opened], **slow)
    choices: list[Any] = [which, axis]
    for choice in choices:
        choice.input(events.choose, [session, which, axis, *how], opened, **slow)
    controls: list[Any] = [number, shown, *how]
    for control in controls:
        control.input(events.draw, [session, number, shown, *how], [view, table], trigger_mode="always_last", **quick)
    asked, answered = [session, sentences, number, shown, *how], [shown, view, table]
    gr.on([find.click, sentences.submit], events.find, asked, answered, **slow)
    found.then(events.find, asked, answered, **slow)
    ran = whole.click(
        events.find_all,
        [session, sentences, shown],
        [status, whole, cancel, shown],
        **{**slow, "show_progress": "hidden"},
    )
    ran.then(events.draw, [session, number, shown, *how], [view, table], **quick)
    cancel.click(events.cancel, session, None, **quick)
    kept = save.click(events.download, [session, number, *how], file, api_visibility="private")
    kept.success(None, js=CLICK)


def lay_out_api(events: Events) -> None:
    """What programs call by gradio_client; see docs/app.md."""
    with gr.Row(visible=False):
        files = gr.File(label="files", file_count="multiple")
        sentences, axis = gr.Textbox(label="sentences"), gr.Radio([*AXES], value="axial", label="axis")
        number = gr.Number(label="slice_number", value=None)
        threshold, abstain = gr.Number(0.5, label="threshold"), gr.Number(round(LN2, 4), label="abstain")
        inputs = [files, sentences, number, axis, threshold, abstain]
        gr.Button().click(events.segment, inputs, [gr.JSON(label="found"), gr.File(label="zip")], api_name="segment")
        gr.Button().click(lambda: views.facts_of(events.model), None, gr.JSON(label="model"), api_name="model")


def _thumbnail(example: Example) -> Path:
    """A small PNG; of a volume its middle slice."""
    session = Session()
    session.take(example.files)
    session.open()
    assert session.volume is not None
    made = Path(tempfile.mkdtemp(prefix="pvl-adapter-")) / "example.png"
    image = Image.fromarray(session.volume.read(session.keys[len(session.keys) // 2]))
    image.thumbnail((160, 160))
    image.convert("RGB").save(made)
    session.close()
    return made
