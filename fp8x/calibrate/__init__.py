"""Static activation scales from data."""

from fp8x.calibrate.driver import CalibrationReport, LayerStatistics, calibrate

__all__ = ["CalibrationReport", "LayerStatistics", "calibrate"]
