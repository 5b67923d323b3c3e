"""What benchmarks share: the device's facts and ceilings, its time, and results that outlive a killed run."""

from fp8x.benchmark.hardware import H200, Ceilings, Floor, copy_bandwidth, facts
from fp8x.benchmark.results import Results
from fp8x.benchmark.timing import Timing, time_calls, time_queue

__all__ = ["H200", "Ceilings", "Floor", "Results", "Timing", "copy_bandwidth", "facts", "time_calls", "time_queue"]
