"""Static activation scales from data."""

from typing import TYPE_CHECKING

from fp8x.lazy import lazily

if TYPE_CHECKING:
    from fp8x.calibrate.driver import calibrate
    from fp8x.calibrate.report import CalibrationReport, LayerStatistics
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

__getattr__ = lazily(
    __name__,
    {
        "CalibrationReport": "fp8x.calibrate.report",
        "Dataset": "fp8x.calibrate.sidecar",
        "LayerStatistics": "fp8x.calibrate.report",
        "Sidecar": "fp8x.calibrate.sidecar",
        "all_reduce": "fp8x.calibrate.statistics",
        "calibrate": "fp8x.calibrate.driver",
        "observe": "fp8x.calibrate.statistics",
        "start": "fp8x.calibrate.statistics",
        "static_layers": "fp8x.calibrate.statistics",
    },
)
