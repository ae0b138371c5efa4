"""What happens on the page: each method is an event of one visitor's session.

A method returns what its outputs show, in the order in which `layout.py` lists them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

import pvl_adapter as pvl
from pvl_adapter.app import views
from pvl_adapter.app.drawing import box, text
from pvl_adapter.app.examples import Example
from pvl_adapter.app.session import Session
from pvl_adapter.image_files import reason

AXES = {"axial": "z", "coronal": "y", "sagittal": "x"}
ALL = "all, as a label map"
EMPTY = box("What is found appears here. Drop an image, or click an example.", kind="empty")


class Events:
    """Of one model; holds nothing of any session."""

    def __init__(self, model: pvl.MedCLIPSeg, sampling: dict[str, Any], examples: Sequence[Example]) -> None:
        self.model, self.sampling, self.examples = model, sampling, examples

    # ---- input -------------------------------------------------------------------------------------------------------

    def receive(self, session: Session, files: Sequence[str] | None, axis: str, *how: float) -> list[Any]:
        """Dropped files; none empties the page."""
        session.close()
        return self._open(session, lambda: session.take(files), axis, *how) if files else _emptied(session, EMPTY)

    def choose(self, session: Session, which: int, axis: str, *how: float) -> list[Any]:
        """Another one of several inputs, or another axis."""
        return self._open(session, lambda: None, axis, *how, which=which)

    def click(self, session: Session, number: int, axis: str, *how: float) -> list[Any]:
        """An example: empties the files, sets the sentences."""
        example = self.examples[number]
        return [None, example.sentences, *self.receive(session, [str(file) for file in example.files], axis, *how)]

    def _open(self, session: Session, take: Callable[[], None], axis: str, *how: float, which: int = 0) -> list[Any]:
        try:
            take()
            session.open(which, axis=AXES[axis])
        except Exception as error:  # whatever a file causes, the page goes on
            said = text(session.relative(reason(error, most=1000)))
            session.close()
            gr.Warning(said, duration=6)
            return _emptied(session, box(said, kind="error"))
        count, source = len(session.keys), session.sources[which]
        names = [(each.name, at) for at, each in enumerate(session.sources)]
        return [
            session,
            gr.Dropdown(choices=names, value=which, visible=len(names) > 1),
            gr.Radio(visible=source.kind == "nifti" and not source.part),
            gr.Slider(maximum=max(count - 1, 1), value=count // 2, visible=count > 1),
            gr.Button(visible=count > 1),
            gr.Radio(visible=False),
            gr.HTML(visible=False),
            *self.draw(session, count // 2, ALL, *how),
        ]

    # ---- results -----------------------------------------------------------------------------------------------------

    def draw(self, session: Session, number: float, shown: str, threshold: float, abstain: float) -> list[str]:
        """View and table of a slice, without a pass of the network."""
        if session.volume is None:
            return [EMPTY, ""]
        names = [label.name for label in session.labels]
        picked = names.index(shown) if shown in names else 0 if len(names) == 1 else None
        key, how = session.keys[int(number)], {"threshold": threshold, "abstain": abstain}
        return [views.slice_view(session, key, shown=picked, **how), views.measures_view(session, key, **how)]

    def find(self, session: Session, sentences: str, number: float, shown: str, *how: float) -> list[Any]:
        """Predicts the shown slice."""
        try:
            session.ask(sentences)
            session.predict(self.model, [session.keys[int(number)]], **self.sampling)
        except Exception as error:
            gr.Warning(f"Nothing was predicted: {text(reason(error))}")
            return [gr.skip()] * 3
        return [_choice(session, shown), *self.draw(session, number, shown, *how)]

    def find_all(self, session: Session, sentences: str, shown: str) -> Iterator[list[Any]]:
        """Predicts all slices; yields after each few."""
        started = time.monotonic()
        try:
            session.ask(sentences)
            count, done = len(session.keys), 0
            for done in session.predict_all(self.model, **self.sampling):
                seconds = time.monotonic() - started
                left = f", about {seconds / done * (count - done):.0f} s left" if done else ""
                bar = f'<progress max="{count}" value="{done}"></progress>{done} of {count} slices{left}'
                yield [
                    gr.HTML(box(bar), visible=True),
                    gr.Button(visible=False),
                    gr.Button(visible=True),
                    _choice(session, shown),
                ]
            ended = "Predicted" if done == count else "Cancelled after"
            said = f"{ended} {done} of {count} slices in {time.monotonic() - started:.0f} s."
        except Exception as error:
            gr.Warning(f"Not all was predicted: {text(reason(error))}")
            said = ""
        yield [
            gr.HTML(box(said, kind="note"), visible=bool(said)),
            gr.Button(visible=True),
            gr.Button(visible=False),
            gr.skip(),
        ]

    def cancel(self, session: Session) -> None:
        """Ends `find_all` after the slices that it is at."""
        session.job = None

    def download(self, session: Session, number: float, threshold: float, abstain: float) -> str:
        """A zip file of all that was found."""
        try:
            if session.volume is None:
                raise ValueError("there is no image yet; drop one, or click an example")
            return str(session.save(session.keys[int(number)], threshold=threshold, abstain=abstain))
        except Exception as error:
            raise gr.Error(text(reason(error)), print_exception=False) from error

    # ---- for programs ------------------------------------------------------------------------------------------------

    def segment(
        self,
        files: list[str],
        sentences: str,
        slice_number: float | None = None,
        axis: str = "axial",
        threshold: float = 0.5,
        abstain: float = 0.6931,
    ) -> tuple[dict[str, Any], str]:
        """What the page does, in one call.

        Args:
            files: An image, a NIfTI volume, DICOM files, or a zip of those.
            sentences: One in each line.
            slice_number: From 0; None predicts all slices.
            axis: Of a NIfTI volume: axial, coronal or sagittal.
            threshold: Probability above which a pixel is found.
            abstain: Pixels with more uncertainty, in nats, are left to a human.

        Returns:
            The measures of each sentence, and a zip file with all masks and maps.
        """
        session = Session()
        try:
            session.take(files or [])
            session.open(axis=AXES[axis])
            session.ask(sentences)
            number = 0 if slice_number is None else int(slice_number)
            if slice_number is None and len(session.keys) > 1:
                for _ in session.predict_all(self.model, **self.sampling):
                    pass
            else:
                session.predict(self.model, [session.keys[number]], **self.sampling)
            measures = session.measures(session.keys[number], threshold=threshold, abstain=abstain)
            packed = session.save(session.keys[number], threshold=threshold, abstain=abstain)
            return {"found": measures}, save_file_to_cache(packed, cache_dir=get_upload_folder())
        except Exception as error:
            raise gr.Error(session.relative(reason(error, most=1000)), print_exception=False) from error
        finally:
            session.close()


def _emptied(session: Session, view: str) -> list[Any]:
    return [session, *(gr.update(visible=False) for _ in range(6)), view, ""]


def _choice(session: Session, shown: str) -> Any:
    names = [label.name for label in session.labels]
    return gr.Radio(choices=[ALL, *names], value=shown if shown in names else ALL, visible=len(names) > 1)
