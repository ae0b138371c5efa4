"""The prompt audit: sentences that are made, what moves, and models that ignore the image or the sentence."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import images, speaking_segmenter

from pvl_adapter.trust.audit import ALTERED_IMAGES, CONTRADICTIONS, audit, contradictions, rule_paraphrases

PROMPT = "one small round left tumor located in the top right of the image"
NAMES = ["left tumor", "right tumor", "right kidney", "liver", "tumor"]
IMAGE = np.zeros((40, 40), np.uint8)
IMAGE[4:16, 24:36] = 255


class Model:
    """Finds what is bright in the half that the sentence names, if it is asked for a tumor of the left side."""

    def __init__(self, *, blind: bool = False, deaf: bool = False, presence: bool = False) -> None:
        self.blind, self.deaf, self.presence = blind, deaf, presence
        self.calls: list[list[str]] = []

    def predict(self, image, text, **_):
        self.calls.append(text)
        many = image if isinstance(image, list) else [image] * len(text)
        found = torch.stack([self.answer(*pair) for pair in zip(many, text, strict=True)])
        presence = SimpleNamespace(p_present=found.mean(dim=(1, 2))) if self.presence else None
        review_score = 1.0 - found.amax(dim=(1, 2))
        return SimpleNamespace(probability=found, review_score=review_score, presence=presence, calibration=presence)

    def answer(self, image, sentence: str) -> torch.Tensor:
        bright = torch.from_numpy(np.array(IMAGE if self.blind else image.convert("L")) > 200).float()
        sentence = PROMPT if self.deaf else sentence.lower()
        bright[:, :20] *= 0.0 if "top right" in sentence else 1.0
        bright[:, 20:] *= 1.0 if "top right" in sentence else 0.0
        return 0.9 * bright * ("left tumor" in sentence and not sentence.startswith("no "))


def test_a_model_that_follows_both_is_told_from_those_that_ignore_one():
    good, blind, deaf = (audit(Model(**how), IMAGE, PROMPT) for how in ({}, {"blind": True}, {"deaf": True}))

    assert good.instability == 0.0
    assert good.sentence_score > 0.9
    assert good.picture_score > 0.9
    assert good.left_out == ()
    ignored = {kind: verdict for kind, verdict in good.verdicts.items() if verdict not in ("followed", "steady")}
    assert ignored == {"size": "ignored"}
    assert blind.picture_score == 0.0
    assert blind.verdicts["picture"] == "ignored"
    assert blind.verdicts["sentence"] == "followed"
    assert deaf.sentence_score == 0.0
    assert {deaf.verdicts[kind] for kind in (*CONTRADICTIONS, "sentence")} == {"ignored"}
    assert deaf.verdicts["picture"] == "followed"


def test_sentences_of_one_image_share_a_call():
    model = Model()
    found = audit(model, IMAGE, PROMPT)
    asked = [variant.prompt for variant in found.variants]

    assert model.calls == [[PROMPT, *asked[: -len(ALTERED_IMAGES)]], [PROMPT] * len(ALTERED_IMAGES)]


def test_paraphrases_that_move_the_answer_are_unsteady_and_make_verdicts_unclear():
    found = audit(Model(), IMAGE, PROMPT, ["nothing of the kind", PROMPT])

    assert [v.prompt for v in found.variants if v.kind == "paraphrase"] == ["nothing of the kind"]
    assert found.instability > 0.9
    assert found.verdicts["paraphrase"] == "unsteady"
    assert found.verdicts["side"] == "unclear"
    assert audit(Model(), IMAGE, PROMPT, []).instability is None


def test_distance_presence_and_doubt():
    (moved,) = (v for v in audit(Model(), IMAGE, PROMPT).variants if v.kind == "side")
    (calibrated,) = (v for v in audit(Model(presence=True), IMAGE, PROMPT).variants if v.kind == "side")

    assert moved.distance == pytest.approx(1.0, abs=0.01)
    assert moved.presence_change == pytest.approx(-0.9)
    assert moved.doubt_change == pytest.approx(0.9)
    assert calibrated.presence_change == pytest.approx(-0.9 * 144 / 1600)


def test_a_tiny_network_is_audited_and_told_as_json_and_text():
    found = audit(speaking_segmenter(), images()[0], "one tumor", num_samples=2)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))

    assert told["variants"][0].keys() == {"kind", "prompt", "distance", "presence_change", "doubt_change"}
    assert set(told["left_out"]) == {"side", "size", "place"}
    assert all(kind in str(found) for kind in ("paraphrase: a tumor", "negation: no tumor", "could not be made: side"))
    assert found == audit(speaking_segmenter(), images()[0], "one tumor", num_samples=2)


@pytest.mark.parametrize(
    ("sentence", "side", "size", "place", "negation"),
    [
        (
            PROMPT,
            "one small round right tumor located in the top right of the image",
            "one large round left tumor located in the top right of the image",
            "one small round left tumor located in the bottom left of the image",
            "no small round left tumor located in the top right of the image",
        ),
        (
            "One medium benign tumor at the center in the breast ultrasound image.\n",
            None,
            "One small benign tumor at the center in the breast ultrasound image.",
            "One medium benign tumor at the top left in the breast ultrasound image.",
            "No medium benign tumor at the center in the breast ultrasound image.",
        ),
        (
            "An image reveals a large polyp located in the left region of the colon, with vessels.",
            None,
            "An image reveals a small polyp located in the left region of the colon, with vessels.",
            "An image reveals a large polyp located in the right region of the colon, with vessels.",
            "An image reveals no large polyp located in the left region of the colon, with vessels.",
        ),
        ("one white polyp, located in  of the image", None, None, None, "no white polyp, located in of the image"),
        ("No tumor in the left lung.", "No tumor in the right lung.", None, None, "One tumor in the left lung."),
        ("Polyp visible.", None, None, None, "No polyp visible."),
        ("Normal breast.", None, None, None, "Abnormal breast."),
    ],
)  # fmt: skip
def test_contradictions_of_published_designs(sentence, side, size, place, negation):
    made = contradictions(sentence)
    expected = {"side": side, "size": size, "place": place, "negation": negation}

    assert {kind: made.get(kind, [None])[0] for kind in expected} == expected
    assert len(made["structure"]) == len(made["unrelated"]) == 3


def test_another_structure_is_no_other_side_of_the_same():
    made = contradictions(PROMPT, NAMES)

    assert sorted(made["structure"]) == sorted(PROMPT.replace("left tumor", name) for name in ("right kidney", "liver"))
    assert all("large" in sentence and "bottom left" in sentence for sentence in made["unrelated"])
    assert "structure" not in contradictions(PROMPT, NAMES[:2])
    assert contradictions("something else", ["liver"])["structure"] == ["one liver"]


def test_rule_paraphrases_keep_every_word_that_matters():
    made = rule_paraphrases(PROMPT)

    assert len(made) == len(set(made)) >= 5
    assert PROMPT not in made
    for sentence in made:
        assert {"small", "round", "left", "tumor", "top", "right"} <= set(sentence.replace(",", "").split())
    assert "one round small left tumor located in the top right of the image" in made
    assert "located in the top right of the image, one small round left tumor" in made


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"prompt": " "}, "prompt is ' ', expected one sentence"),
        ({"prompt": ["a tumor", "a polyp"]}, "audit several one by one"),
        ({"prompt": torch.ones(1, 4)}, "in words"),
        ({"image": [IMAGE, IMAGE]}, "number of images is 2, expected 1"),
        ({"paraphrases": "a tumor"}, "paraphrases is 'a tumor', expected a list of strings"),
        ({"paraphrases": ["a tumor", ""]}, "none empty"),
        ({"others": "liver"}, "others is 'liver'"),
    ],
)
def test_refusals(changed, told):
    with pytest.raises(ValueError, match=told):
        audit(Model(), **{"image": IMAGE, "prompt": PROMPT, **changed})


def test_importing_it_needs_no_extra():
    code = (
        "import sys, pvl_adapter; known = {*sys.modules}; import pvl_adapter.trust.audit; print({*sys.modules} - known)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not {"scipy", "monai", "mapie", "sklearn", "torchmetrics"} & ast.literal_eval(done.stdout)
