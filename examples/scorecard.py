"""The scorecard of a model's promises: each is put to the test, in domain and elsewhere; JSON, table and figures.

    python examples/make_brains.py --subjects 800
    python examples/train.py --data Colin27_subjects --recipe mni152 --epochs 45 --output runs/subjects
    python examples/scorecard.py runs/subjects/last --data data/Colin27_subjects \
        --elsewhere data/MNI152_subjects data/INIA19_subjects --output scorecard

Scores are learned once, on some of the validation subjects. The others are split into halves at random, again and
again: one half calibrates, the other judges. A plain threshold on the probability is beside it in the same splits.
Elsewhere rows are judged after calibration on all of those others; there a promise should hold, or be flagged.

Standard errors are over subjects ("se", of another draw of subjects), and over splits ("se of splits": splits are
independent draws of these subjects, and theory bounds their mean, so "holds" goes by it).

Writes to --output: trust.json, trust.md, trust.png, trust_masks.png, and cases.pickle, which is all that is kept of the
predictions: with it the same command takes 2 minutes. --overwrite predicts again.

Cost: with the small network of examples/train.py 8 minutes on one CPU core, for 3,200 rows. Expect every promise to
hold in domain. Elsewhere several break, and flags catch part of the rows: docs/trust.md has the figures.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scorecard_report import setting, study_orders, write_all

import pvl_adapter as pvl
from pvl_adapter.cli.options import add_options, check_options, hash_of, load_model, stop
from pvl_adapter.data import SegmentationDataset
from pvl_adapter.trust.calibrate import from_cases
from pvl_adapter.trust.calibration import UNLIKE, Calibration
from pvl_adapter.trust.cases import THRESHOLDS, Cases, compare
from pvl_adapter.trust.conformal import Ranks
from pvl_adapter.trust.learning import learn
from pvl_adapter.trust.scorer import Scorer
from pvl_adapter.trust.scores import PixelBins, calibration

LEVELS = THRESHOLDS.double().numpy()
Figures = dict[str, tuple[np.ndarray, Any, Any, float | None]]
"""By name: which cases count, numerator and denominator of each case, and what is promised (None: nothing, a size)."""


@dataclass(frozen=True)
class Kept:
    """What is kept of a dataset's predictions: cases, and those of a plain threshold on the probability."""

    cases: Cases
    plain: Cases
    extra: dict[str, np.ndarray]  # of each case: mean and largest probability, review score, words never calibrated on
    bins: tuple[PixelBins, PixelBins]  # of the probability, as it is and calibrated
    shown: tuple[pvl.Prediction, torch.Tensor, Sequence[str], Sequence[str]]  # a few, for a figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch="rows")
    add = parser.add_argument_group("promises").add_argument
    add("--data", type=Path, required=True, help="dataset of exchangeable subjects; its Val rows are used")
    add("--elsewhere", type=Path, nargs="*", default=[], help="other datasets, likewise")
    add("--rows", type=int, nargs=2, default=(6, 4), help="of each subject at most: in domain, elsewhere (6 4)")
    add("--learn-share", type=float, default=0.3, help="of the subjects, to learn scores on (%(default)s)")
    add("--splits", type=int, default=200, help="into a half that calibrates and one that judges (%(default)s)")
    add("--alpha", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="0.05 0.1 0.2; elsewhere the middle one")
    add("--loss-limit", type=float, default=0.25, help="mean 1 - Dice of pairs without abstention (%(default)s)")
    add("--pixel-limit", type=float, default=0.02, help="share of wrong pixels without abstention (%(default)s)")
    add("--note", default="", help="about the model, for JSON and table")
    add("--confidence", type=float, default=0.9, help="of these two limits (%(default)s)")
    args = parser.parse_args(argv)
    check_options(parser, args)
    return args


# ---- predictions -----------------------------------------------------------------------------------------------------


def batches(model: pvl.MedCLIPSeg, data: SegmentationDataset, rows: list[int], args: argparse.Namespace) -> Iterator:
    """Predictions with truth, subjects and sentences, as `learn` and `compare` take them."""
    for first in range(0, len(rows), args.batch_size):
        some = [data[row] for row in rows[first : first + args.batch_size]]
        texts = [each["text"] for each in some]
        sampling = {name: getattr(args, name) for name in ("num_samples", "threshold", "seed")}
        prediction = model.predict([each["image"] for each in some], texts, **sampling)
        truth = torch.cat([pvl.prepare_masks(torch.as_tensor(each["mask"]), size=model.image_size) for each in some])
        yield prediction, truth, [each["subject"] for each in some], texts
        print(f"\r{data.name}: {first + len(some)} of {len(rows)} rows", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def rows_by_subject(data: SegmentationDataset, most: int, seed: int) -> dict[str, list[int]]:
    """Of each subject so many random rows at most; subjects in random order."""
    if not all(row.subject for row in data.rows):
        stop(f"{data.table} does not say whose each row is, expected a column Subject")
    random, rows = np.random.default_rng(seed), {}
    for index, row in enumerate(data.rows):
        rows.setdefault(row.subject, []).append(index)
    return {name: sorted(random.permutation(rows[name])[:most].tolist()) for name in random.permutation(sorted(rows))}


def token_ids(model: pvl.MedCLIPSeg, texts: Sequence[str]) -> torch.Tensor:
    tokens = model.tokenize(list(texts))
    return tokens if isinstance(tokens, torch.Tensor) else tokens["input_ids"]


def keep(scorer: Scorer, predicted: Iterator, model: pvl.MedCLIPSeg, known: torch.Tensor) -> Kept:
    cases, plain, bins, extra, shown = [], [], [], [], None
    threshold = replace(scorer, outer="probability", inner="probability")
    for prediction, truth, subjects, texts in predicted:
        probability = prediction.probability.float().cpu()
        cases.append(compare(scorer, prediction, truth, subjects, texts))
        plain.append(compare(threshold, prediction, truth, subjects, texts))
        flat, wanted = (each.flatten(0, 1) for each in (probability, truth))  # [B H, W]
        calibrated = scorer.calibrated(prediction.probability).float().cpu().flatten(0, 1)
        bins.append((calibration(flat, wanted), calibration(calibrated, wanted)))
        mean, largest = probability.mean(dim=(1, 2)), probability.amax(dim=(1, 2))
        unseen = ~torch.isin(token_ids(model, texts), known).all(dim=1)
        extra.append(torch.stack([mean, largest, prediction.review_score.cpu(), unseen], dim=1).numpy())  # [B, 4]
        shown = shown or (prediction, truth, subjects, texts)
    columns = zip(("mean", "largest", "review_score", "unseen"), np.concatenate(extra).T, strict=True)
    before, after = (sum(rest, first) for first, *rest in zip(*bins, strict=True))
    return Kept(Cases.join(cases), Cases.join(plain), dict(columns), (before, after), shown)


def predict_all(model: pvl.MedCLIPSeg, args: argparse.Namespace) -> tuple[Scorer, dict[str, Kept]]:
    """Learn the scores, and judge all other rows by them; the first dataset is the one in domain."""
    data = SegmentationDataset(args.data, "val")
    subjects = list(rows_by_subject(data, args.rows[0], args.seed).values())
    few = round(args.learn_share * len(subjects))
    most = few - few // 3  # of these learn, the others choose
    parts = [list(chain(*part)) for part in (subjects[:most], subjects[most:few], subjects[few:])]
    limits = {"loss_limit": args.loss_limit, "pixel_limit": args.pixel_limit}
    teaching = [list(batches(model, data, part, args)) for part in parts[:2]]
    scorer = learn(*teaching, alpha=sorted(args.alpha)[len(args.alpha) // 2], **limits)
    known = token_ids(model, [row.text for row in data.rows]).unique()
    kept = {data.name: keep(scorer, batches(model, data, parts[2], args), model, known)}
    for folder in args.elsewhere:
        other = SegmentationDataset(folder, "val")
        rows = list(chain(*rows_by_subject(other, args.rows[1], args.seed).values()))
        kept[other.name] = keep(scorer, batches(model, other, rows, args), model, known)
    return scorer, kept


# ---- figures of cases ------------------------------------------------------------------------------------------------


def level(threshold: float | None, otherwise: float) -> int:
    """Which of the thresholds that cases know everything about; `otherwise` where nothing can be promised."""
    return int(np.abs(LEVELS - (otherwise if threshold is None else threshold)).argmin())


def figures(promise: Calibration, cases: Cases, extra: dict[str, np.ndarray], constant: float) -> Figures:
    """All that is promised, and what that costs; `constant` is half the width of the interval to compare with."""
    outer, inner = level(promise.outer_threshold, -1.0), level(promise.inner_threshold, 1.0)
    pixel = level(None if promise.pixel_threshold is None else 1.0 - promise.pixel_threshold / np.log(2.0), 1.0)
    kept = cases.risk < (-1.0 if promise.loss_threshold is None else promise.loss_threshold)
    true, expected, error = cases.area.T
    half = error * (np.inf if promise.area_factor is None else promise.area_factor)
    ones, alpha, low = np.ones(len(cases)), promise.alpha, 0.05
    every, present, absent = ones > 0, cases.present, ~cases.present
    called_present = promise.absent.p_value(cases.presence) <= low if promise.absent else ~every
    called_absent = promise.present.p_value(-cases.presence) <= low if promise.present else ~every
    width, other = (
        (middle + size).clip(0, 1) - (middle - size).clip(0, 1)
        for middle, size in ((expected, half), (extra["mean"], constant))
    )
    wrong, certain = cases.pixel_errors[:, pixel], cases.pixels_kept[:, pixel]
    return {
        "outer: share missed": (present, cases.missed[:, outer], ones, alpha),
        "inner: share wrong": (every, cases.wrong[:, inner], ones, alpha),
        "area: outside the interval": (every, np.abs(true - expected) > half, ones, alpha),
        "absent, p_absent <= .05": (absent, called_present, ones, low),
        "present, p_present <= .05": (present, called_absent, ones, low),
        "pairs kept: loss": (every, cases.loss * kept, kept, promise.loss_limit),
        "pixels kept: share wrong": (every, wrong, certain, promise.pixel_limit),
        "familiarity <= .05": (every, promise.familiar.p_value(cases.distance) <= UNLIKE, ones, UNLIKE),
        "outer area / truth": (present, cases.outer_area[:, outer], true, None),
        "inner: share of truth found": (present, cases.found[:, inner], ones, None),
        "interval width / truth": (every, width, true, None),
        "constant interval: outside": (every, np.abs(true - extra["mean"]) > constant, ones, None),
        "constant interval: width / truth": (every, other, true, None),
        "share of pairs kept": (every, kept, ones, None),
        "share of pixels kept": (every, certain, ones, None),
        "present, p_absent <= .05": (present, called_present, ones, None),
        "absent, p_present <= .05": (absent, called_absent, ones, None),
    }


def by_subject(who: np.ndarray, chosen: np.ndarray, *values: np.ndarray) -> np.ndarray:
    """Means over each subject's chosen cases, [len(values), n]; NaN for subjects without any."""
    count = np.bincount(who[chosen], minlength=who.max() + 1)
    sums = [np.bincount(who[chosen], np.asarray(each, float)[chosen], minlength=len(count)) for each in values]
    return np.array(sums) / np.where(count > 0, count, np.nan)


def ratio(pairs: np.ndarray) -> tuple[float, float]:
    """Of subjects' numerators and denominators, [2, n]: the ratio of their means, and its standard error."""
    above, below = pairs[:, ~np.isnan(pairs[0])]
    if not below.sum():
        return float("nan"), float("nan")
    value = above.sum() / below.sum()
    return float(value), float((above - value * below).std(ddof=1) / len(below) ** 0.5 / below.mean())


# ---- the two studies -------------------------------------------------------------------------------------------------


def promise_of(scorer: Scorer, cases: Cases, alpha: float, args: argparse.Namespace) -> Calibration:
    limits = {name: getattr(args, name) for name in ("loss_limit", "pixel_limit", "confidence")}
    return from_cases(scorer, cases, alpha=alpha, **limits)


def constant_width(kept: Kept, chosen: np.ndarray, alpha: float) -> float:
    """Split conformal on the error of the mean probability as the area: a share of the image."""
    error = np.abs(kept.cases.area[:, 0] - kept.extra["mean"])
    return Ranks.of(error[chosen], kept.cases.subjects[chosen]).quantile(alpha)


def study_splits(scorer: Scorer, kept: Kept, args: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """By alpha, then by name: what the judging halves say."""
    random = np.random.default_rng(args.seed)
    names, who = np.unique(kept.cases.subjects, return_inverse=True)
    found: dict[float, dict[str, list[np.ndarray]]] = {alpha: {} for alpha in args.alpha}
    promised: dict[tuple[float, str], float | None] = {}
    for _ in range(args.splits):
        first = np.isin(who, random.permutation(len(names))[: len(names) // 2])
        for alpha in args.alpha:
            constant = constant_width(kept, first, alpha)
            for prefix, cases in (("", kept.cases), ("plain ", kept.plain)):
                promise = promise_of(scorer, cases[first], alpha, args)
                for name, figure in figures(promise, cases, kept.extra, constant).items():
                    if not prefix or name.startswith(("outer", "inner")):
                        judged = by_subject(who, figure[0] & ~first, *figure[1:3])
                        found[alpha].setdefault(prefix + name, []).append(judged)
                        promised[alpha, prefix + name] = figure[3]
    return {
        str(alpha): {name: over_splits(name, each, promised[alpha, name], args) for name, each in by_name.items()}
        for alpha, by_name in found.items()
    }


def over_splits(name: str, found: list[np.ndarray], limit: float | None, args: argparse.Namespace) -> dict[str, Any]:
    values = np.array([ratio(each)[0] for each in found])  # of splits
    table = np.array(found)  # [splits, 2, n]
    count = (~np.isnan(table)).sum(axis=0)
    value, se = ratio(np.nansum(table, axis=0) / np.where(count, count, np.nan))
    entry: dict[str, Any] = {"value": value, "se": se}
    if len(known := values[~np.isnan(values)]):
        entry["se_of_splits"] = float(known.std() / len(known) ** 0.5)
        entry["range_90"] = np.quantile(known, [0.05, 0.95]).tolist()
    if limit is None:
        return entry
    entry["promised"] = limit
    if "kept" in name:
        entry["share_of_splits"] = float((~(values > limit)).mean())  # also where nothing is kept
        entry["nothing_kept"] = float(np.isnan(values).mean())
        return {**entry, "holds": entry["share_of_splits"] >= args.confidence}
    entry["holds"] = value <= limit + 3 * entry.get("se_of_splits", 0.0)
    return entry


def study_elsewhere(home: Kept, other: Kept, promise: Calibration) -> dict[str, Any]:
    """Whether each promise holds on another dataset, or is flagged."""
    _, who = np.unique(other.cases.subjects, return_inverse=True)
    every, at_home = np.full(len(other.cases), True), np.full(len(home.cases), True)
    found = figures(promise, other.cases, other.extra, constant_width(home, at_home, promise.alpha))
    unlike, unseen = found["familiarity <= .05"][1], other.extra["unseen"] > 0
    flagged = unlike | unseen
    share, se = ratio(by_subject(who, every, flagged, every))
    whole = share > UNLIKE + 3 * se  # more than chance would flag
    judged = {}
    for name, figure in found.items():
        entry: dict[str, Any] = {}
        for part, rows in (("all", every), ("not flagged", ~flagged)):
            value, error = ratio(by_subject(who, figure[0] & rows, *figure[1:3]))
            entry[part] = {"value": value, "se": error, "rows": int((figure[0] & rows).sum())}
        if (limit := figure[3]) is not None and name != "familiarity <= .05":
            words = {part: outcome(each["value"], each["se"], limit) for part, each in entry.items()}
            part = words["not flagged"] and f"{words['not flagged']} where not flagged"
            fallen = "broken; of the dataset too many are flagged" if whole else "BROKEN, not flagged"
            entry |= {"promised": limit, "verdict": words["all"] or part or fallen}
        judged[name] = entry
    counts = {"rows": len(every), "unlike": int(unlike.sum()), "unseen words": int(unseen.sum())}
    return {**counts, "flagged": int(flagged.sum()), "share flagged": share, "se": se, "figures": judged}


def outcome(value: float, se: float, limit: float) -> str:
    """Empty if a promise is broken."""
    if np.isnan(value):
        return "nothing kept"
    return "holds" if value <= limit else "within 3 se" if value <= limit + 3 * se else ""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    model = load_model(args)
    options = ("data", "elsewhere", "rows", "learn_share", "loss_limit", "pixel_limit", "threshold", "seed")
    settings = {"model": str(args.model), "weights": hash_of(model), "num_samples": args.num_samples}
    settings |= {name: getattr(args, name) for name in options}
    cache, started = args.output / "cases.pickle", time.perf_counter()
    before = pickle.loads(cache.read_bytes()) if cache.is_file() and not args.overwrite else {}  # our own file
    if before.get("settings") != settings:
        scorer, kept = predict_all(model, args)
        before = {"settings": settings, "scorer": scorer, "kept": kept, "seconds": time.perf_counter() - started}
        cache.write_bytes(pickle.dumps(before))
    scorer, kept = before["scorer"], before["kept"]
    (home, *others), started = kept, time.perf_counter()
    cases = kept[home].cases
    promise = promise_of(scorer, cases, sorted(args.alpha)[len(args.alpha) // 2], args)
    content = {
        "setting": setting() | {"seconds predicting and learning": round(before["seconds"])},
        "settings": {
            **settings,
            "model": "/".join(Path(args.model).parts[-2:]),  # names, not where they are on this machine
            "data": home,
            "elsewhere": others,
            **{name: getattr(args, name) for name in ("note", "splits", "alpha", "confidence")},
        },
        "in domain": {
            "dataset": home,
            "subjects": len(set(cases.subjects)),
            "rows": len(cases),
            "present": int(cases.present.sum()),
            "scorer": {name: getattr(scorer, name) for name in ("outer", "inner", "temperature")},
            "splits": study_splits(scorer, kept[home], args),
            "orders": study_orders(kept[home], args),
        },
        "elsewhere": {name: study_elsewhere(kept[home], kept[name], promise) for name in others},
    }
    content["setting"]["seconds judging"] = round(time.perf_counter() - started)
    write_all(content, kept, promise, args.output)
    print(f"scorecard and figures are in {args.output}")


if __name__ == "__main__":
    main()
