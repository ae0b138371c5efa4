"""Hesitation with a promise: calibration on held-out subjects, an audit of prompts, and scores.

Calibrating and scoring need the extra `trust`; predictions of a calibrated model do not.
"""

from __future__ import annotations

from pvl_adapter.trust.audit import Audit, audit
from pvl_adapter.trust.calibrate import calibrate
from pvl_adapter.trust.calibration import Calibration, Presence
from pvl_adapter.trust.conformal import shift_p_value

__all__ = ["Audit", "Calibration", "Presence", "audit", "calibrate", "shift_p_value"]
