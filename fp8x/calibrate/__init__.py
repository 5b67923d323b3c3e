"""Static activation scales from data."""

from fp8x.calibrate.driver import CalibrationReport, LayerStatistics, calibrate
from fp8x.calibrate.sidecar import Dataset, Sidecar
from fp8x.calibrate.statistics import all_reduce, observe, start, static_layers

__all__ = [
    "CalibrationReport",
    "Dataset",
    "LayerStatistics",
    "Sidecar",
    "all_reduce",
    "calibrate",
    "observe",
    "start",
    "static_layers",
]
