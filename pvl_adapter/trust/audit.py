"""Prompt audit: how an answer moves when the sentence changes, and when the image does.

A segmenter that follows its sentence answers paraphrases alike and contradictions differently. One that falls back on
the average of its training data does not, though its Dice may be high. Plain rules on English words change a sentence,
so the result need not be good English.

Shape alphabet: K sentences, H W pixels.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from pvl_adapter.config import require
from pvl_adapter.images import Images, to_pil

if TYPE_CHECKING:
    from torch import Tensor

    from pvl_adapter.monte_carlo import Auto
    from pvl_adapter.prediction import Prediction
    from pvl_adapter.segmentation import MedCLIPSeg

CONTRADICTIONS = ("side", "size", "place", "negation", "structure", "unrelated")
ALTERED_IMAGES = ("mirrored", "shuffled", "blank")
UNRELATED = ("kidney", "tooth", "optic disc")  # where the caller names no other structures
MOVED = 0.25  # distance from which a map counts as moved: see benchmarks/prompt_audit.py
_MOST_OTHERS = 3  # structures that are asked for instead
_SMOOTHING = 1e-4  # of an image's pixels, so that two empty maps are alike

# ---- words ----------------------------------------------------------------------------------------------------------

_SIDES = {"left": "right", "right": "left"}
_HEIGHTS = {"top": "bottom", "bottom": "top", "upper": "lower", "lower": "upper"}
_PLACES = {**_SIDES, **_HEIGHTS, **dict.fromkeys(("center", "centre", "central", "middle"), "top left")}
_SIZES = {"small": "large", "little": "large", "tiny": "huge", "medium": "small", "moderate": "small"}
_SIZES |= {"large": "small", "big": "small", "huge": "tiny"}
_WHERE = f"(?:{'|'.join(_PLACES)})"
_RUN = rf"{_WHERE}(?:(?:\s*,\s*|[\s-]+)(?:and )?(?:the )?{_WHERE})*"  # "top left", "center, top right"
_AFTER = r"(?=\s*[.,;]|\s*$|\s+(?:of|in|region|part|side|area|portion|corner|half|quadrant|with|but|and|which)\b)"
_PLACE = rf"\b(?:in|at|on|near) (?:the )?{_RUN}\b{_AFTER}"  # not "in the left lung": that is a side
_TARGET = r"\b(?:tumou?rs?|polyps?|lesions?|(?:skin )?melanomas?|nodules?|mass(?:es)?|infections?|gliomas?)\b"

Rules = tuple[tuple[str, str], ...]  # the first that changes a sentence counts
_REWORDINGS: tuple[Rules, ...] = (
    ((rf"\blocated in (?:the )?(?={_WHERE}\b)", "at the "), (rf"(?<!seen )\bat the (?={_WHERE}\b)", "located in the ")),
    (("^one (?=[aeiou])", "an "), ("^one ", "a "), ("^(?:an?|the) ", "one ")),
    ((r"\bimage\b", "picture"), (r"\bpicture\b", "image"), (r"\bslice\b", "image"), (r"\bMRI\b", "MR image")),
    ((r"\bvisible\b", "seen"), (r"\bseen\b", "visible"), (r"\bdetected\b", "seen"), (r"\breveals\b", "shows")),
    (
        (
            rf"\b({'|'.join(_SIZES)})(,? )(?!and )([\w-]+)(?=,? (?!in|at|on|of|located|visible|seen|detected)\w)",
            r"\3\2\1",
        ),
    ),
    ((rf"^([^,]*?\w),? ((?:located )?{_PLACE}(?: (?:in|of) [\w -]+)?)\.?$", r"\2, \1"),),
    ((r"^(?!.*\b(?:reveals?|shows?|is|are|appears?|there)\b)", "there is "),),
)
_NEGATIONS: Rules = (
    (r"\bno\b", "one"),
    ("^normal ", "abnormal "),
    (r"\b(?:one|two|three|several|multiple) ", "no "),
    (r"\b(reveals?|shows?|with|is|are) an? ", r"\1 no "),
    ("^(?:(?:an?|the) )?", "no "),
)


def rule_paraphrases(prompt: str) -> list[str]:
    """The same in other words: other articles, synonyms and orders, as far as the rules reach."""
    changed = [_reword(prompt, rules) for rules in _REWORDINGS]
    return list(dict.fromkeys(sentence for sentence in changed if sentence is not None))


def contradictions(prompt: str, others: Sequence[str] = (), *, seed: int = 0) -> dict[str, list[str]]:
    """Sentences that ask for something else, by kind; a kind that cannot be made is missing. For arguments see `audit`.

    Kinds: the other side of the body; another size or place; a negation; another structure; and "unrelated", another
    structure of another side, size and place.
    """
    sentence = " ".join(prompt.split()).replace("{", "").replace("}", "")
    known = "|".join(map(re.escape, sorted(others, key=len, reverse=True)))  # the longest name counts
    targets = [rf"\b(?:{known})\b", _TARGET] if others else [_TARGET]
    found = next(filter(None, (re.search(target, sentence, re.IGNORECASE) for target in targets)), None)
    template = sentence[: found.start()] + "{}" + sentence[found.end() :] if found else "one {}"
    here = _without_side(found[0] if found else sentence)
    names = [name for name in others or UNRELATED if _without_side(name) not in here]
    names = random.Random(seed).sample(names, min(_MOST_OTHERS, len(names)))
    elsewhere = _swap(template, {**_PLACES, **_SIZES}, in_places=_PLACES)
    made = {
        "side": [_swap(sentence, _SIDES, in_places={})],
        "size": [_swap(sentence, _SIZES, in_places={})],
        "place": [_swap(sentence, _HEIGHTS, in_places=_PLACES)],
        "negation": [_reword(prompt, _NEGATIONS) or sentence],
        "structure": [template.format(name) for name in names],
        "unrelated": [elsewhere.format(name) for name in names],
    }
    return {kind: changed for kind, changed in made.items() if changed and changed[0] != sentence}


def _without_side(name: str) -> str:
    return re.sub(r"\b(?:left|right) ", "", name.lower())


def _reword(prompt: str, rules: Rules) -> str | None:
    sentence = " ".join(prompt.split())
    capital = sentence[:1].isupper() and not sentence[1:2].isupper()  # "MRI" stays as it is
    plain = sentence[0].lower() + sentence[1:] if capital else sentence
    for pattern, new in rules:
        changed = re.sub(pattern, new, plain, count=1, flags=re.IGNORECASE)
        if changed != plain:
            return changed[0].upper() + changed[1:] if capital else changed
    return None


def _swap(sentence: str, words: Mapping[str, str], *, in_places: Mapping[str, str]) -> str:
    """Exchange words by one table in phrases of place ("in the top left of ..."), and by another outside them."""

    def exchange(text: str, table: Mapping[str, str]) -> str:
        return re.sub("[A-Za-z]+", lambda word: table.get(word[0].lower(), word[0]), text)

    parts = re.split(f"({_PLACE})", sentence, flags=re.IGNORECASE)  # every other one is such a phrase
    return "".join(exchange(part, in_places if index % 2 else words) for index, part in enumerate(parts))


# ---- audit ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One changed sentence or image, and how far the answer moved.

    Attributes:
        kind: "paraphrase", one of `CONTRADICTIONS` or one of `ALTERED_IMAGES`.
        prompt: The sentence asked.
        distance: Bray-Curtis distance of the two probability maps, 0 to 1: of sure maps 1 - Dice.
        presence_change: Of `Presence.p_present` where the model is calibrated, else of the largest probability.
        doubt_change: Of `Prediction.review_score`.
    """

    kind: str
    prompt: str
    distance: float
    presence_change: float
    doubt_change: float


@dataclass(frozen=True)
class Audit:
    """What a prompt audit found. Where nothing is found, other empty answers are near, so low scores tell little.

    Attributes:
        prompt: The sentence.
        variants: All that was tried.
        instability: Mean distance of paraphrases, 0 to 1; None without any.
        sentence_score: Mean distance of unrelated sentences on this image: 0 if the sentence does not matter, 1 if it
            decides all. None without any.
        picture_score: Mean distance of the shuffled and the blank image with this sentence: 0 if the image does not
            matter. The mirrored one does not count: many a body looks the same.
        verdicts: Of each kind, of the "sentence" and of the "picture": "followed", "ignored" (a distance below `MOVED`)
            or "unclear" (no further than paraphrases move the map). Of paraphrases: "steady" or "unsteady".
        left_out: Kinds that could not be made of this sentence.
    """

    prompt: str
    variants: tuple[Variant, ...]
    instability: float | None
    sentence_score: float | None
    picture_score: float
    verdicts: dict[str, str]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        scores = {"instability": self.instability, "sentence": self.sentence_score, "picture": self.picture_score}
        lines = [self.prompt, "  ".join(f"{k} {'-' if v is None else f'{v:.2f}'}" for k, v in scores.items())]
        lines.append("distance presence  doubt")
        for tried in self.variants:
            numbers = f"{tried.distance:8.2f} {tried.presence_change:+8.2f} {tried.doubt_change:+6.2f}"
            lines.append(f"{numbers}  {tried.kind}: {tried.prompt}")
        lines.append(", ".join(f"{kind} {verdict}" for kind, verdict in self.verdicts.items()))
        return "\n".join(lines + [f"could not be made: {', '.join(self.left_out)}"] * bool(self.left_out))


def audit(
    model: MedCLIPSeg,
    image: Images,
    prompt: str,
    paraphrases: Sequence[str] | None = None,
    *,
    others: Sequence[str] = (),
    num_samples: int | Auto | Literal["distilled"] = 8,
    seed: int = 0,
) -> Audit:
    """Ask for the same in other words, for other things, and on altered images, and compare the answers.

    All sentences are one call of `model.predict`, with the same noise; the image mirrored, in shuffled tiles and blank
    is another.

    Args:
        model: A segmenter.
        image: A single one.
        prompt: The sentence.
        paraphrases: Sentences that mean the same; None makes some by `rule_paraphrases`.
        others: Names of structures to ask for instead; give all of the data's, this sentence's among them. A name found
            in the sentence is exchanged, and so is "tumor", "polyp" and the like; else others are asked for alone.
        num_samples: See `MedCLIPSeg.predict`.
        seed: Of samples and of the choice among `others`.

    Raises:
        ValueError: If there are several images or sentences, tokens instead of words, or an empty sentence.
    """
    is_sentence = isinstance(prompt, str) and bool(prompt.strip())
    require(is_sentence, "prompt", prompt, "one sentence, in words; audit several one by one")
    for name, given in {"paraphrases": () if paraphrases is None else paraphrases, "others": others}.items():
        is_list = isinstance(given, (list, tuple)) and all(isinstance(each, str) and each.strip() for each in given)
        require(is_list, name, given, "a list of strings, none empty")
    images = to_pil(image)
    require(len(images) == 1, "number of images", len(images), "1; audit several one by one")
    same = rule_paraphrases(prompt) if paraphrases is None else paraphrases
    pairs = [("paraphrase", sentence) for sentence in same if sentence != prompt]
    pairs += [(kind, new) for kind, made in contradictions(prompt, others, seed=seed).items() for new in made]
    altered = [(kind, prompt) for kind in ALTERED_IMAGES]

    on_image = model.predict(images[0], [prompt, *(words for _, words in pairs)], num_samples=num_samples, seed=seed)
    elsewhere = model.predict(_altered(images[0]), [prompt] * len(altered), num_samples=num_samples, seed=seed)
    numbers = _compare(on_image, on_image)[1:] + _compare(on_image, elsewhere)
    variants = [Variant(*pair, *moved) for pair, moved in zip([*pairs, *altered], numbers, strict=True)]

    kinds = dict.fromkeys(variant.kind for variant in variants)
    means = {kind: float(np.mean([v.distance for v in variants if v.kind == kind])) for kind in kinds}
    instability, sentence = means.get("paraphrase"), means.get("unrelated")
    picture = (means["shuffled"] + means["blank"]) / 2
    overall = {"picture": picture} if sentence is None else {"sentence": sentence, "picture": picture}
    return Audit(
        prompt=prompt,
        variants=tuple(variants),
        instability=instability,
        sentence_score=sentence,
        picture_score=picture,
        verdicts={kind: _verdict(kind, mean, instability or 0.0) for kind, mean in (means | overall).items()},
        left_out=tuple(kind for kind in ("paraphrase", *CONTRADICTIONS) if kind not in means),
    )


def _altered(image: Image.Image) -> list[Image.Image]:
    """In the order of `ALTERED_IMAGES`: left and right exchanged, 4 x 4 tiles in another order, the mean colour."""
    levels = np.asarray(image)  # [H, W, 3]
    rows, columns = (np.array_split(np.arange(size), 4) for size in levels.shape[:2])
    shuffled = levels[np.concatenate([rows[i] for i in (2, 0, 3, 1)])]
    shuffled = shuffled[:, np.concatenate([columns[i] for i in (1, 3, 0, 2)])]
    blank = np.broadcast_to(levels.mean(axis=(0, 1)).round().astype(np.uint8), levels.shape)
    return [Image.fromarray(np.ascontiguousarray(each)) for each in (levels[:, ::-1], shuffled, blank)]


def _compare(original: Prediction, others: Prediction) -> list[tuple[float, float, float]]:
    """Distance, change of presence and of doubt of each of K answers from the first of `original`."""
    p, q = original.probability[:1].float(), others.probability.float()
    apart = (p - q).abs().sum(dim=(1, 2)) / ((p + q).sum(dim=(1, 2)) + _SMOOTHING * p.numel())  # [K]
    here, there = (_presence(each) for each in (original, others))  # [K]
    doubt = others.review_score - original.review_score[0]
    return list(zip(apart.tolist(), (there - here[0]).tolist(), doubt.tolist(), strict=True))


def _presence(prediction: Prediction) -> Tensor:
    presence = None if prediction.calibration is None else prediction.presence
    return prediction.probability.amax(dim=(1, 2)) if presence is None else presence.p_present


def _verdict(kind: str, distance: float, instability: float) -> str:
    if kind == "paraphrase":
        return "steady" if distance < MOVED else "unsteady"
    return "ignored" if distance < MOVED else "followed" if distance > instability else "unclear"
