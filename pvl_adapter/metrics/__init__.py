"""How good masks are, and how honest the maps beside them. Needs the extra `metrics`.

What is of all pixels of many pictures (`Calibration`, `UncertaintyHistogram`) is counted in bins and added up by `+`.
"""

from pvl_adapter.metrics.interval import bootstrap_interval
from pvl_adapter.metrics.overlap import dice, iou, released_surface_dice, surface_dice
from pvl_adapter.metrics.ranking import (
    RiskCoverage,
    UncertaintyHistogram,
    detection_auroc,
    risk_coverage,
    uncertainty_histogram,
)
from pvl_adapter.metrics.reliability import Calibration, calibration

__all__ = [
    "Calibration",
    "RiskCoverage",
    "UncertaintyHistogram",
    "bootstrap_interval",
    "calibration",
    "detection_auroc",
    "dice",
    "iou",
    "released_surface_dice",
    "risk_coverage",
    "surface_dice",
    "uncertainty_histogram",
]
