"""Hesitation with a promise: calibration on held-out subjects, an audit of prompts, and scores.

Calibrating and scoring need the extra `trust`; predictions of a calibrated model do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pvl_adapter.trust.calibration import Calibration, Presence

if TYPE_CHECKING:
    from pvl_adapter.trust.calibrate import calibrate

__all__ = ["Calibration", "Presence", "calibrate"]


def __getattr__(name: str) -> Any:
    if name == "calibrate":
        from pvl_adapter.trust.calibrate import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
