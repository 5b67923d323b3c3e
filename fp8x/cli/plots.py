"""Drawings of what `fp8x inspect` finds."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from fp8x.checkpoint.inspect import TensorRow
from fp8x.errors import DataError

Series = dict[str, dict[int, list[TensorRow]]]

MARKERS = "osD^vP*X"
MIN_DECIBELS = 2.0  # that the SNR axis spans


def draw(rows: Sequence[TensorRow], title: str, path: Path) -> None:
    """Writes a picture of the SNR (where known) and the amax of every matrix in a layer.

    There is a line for each kind of matrix (q_proj, w1 …) over the layers; over experts it is their mean, in a band
    from the least to the largest. What is exact has no place on an axis of SNRs.

    Raises:
        DataError: no matrix to draw, or a file name whose ending matplotlib does not know.
    """
    series = _series([row for row in rows if len(row.shape) == 2 and row.amax is not None])
    if not series:
        raise DataError("--plot: the checkpoint has no matrix in a layer to draw")
    layers = sorted({layer for kind in series.values() for layer in kind})
    snrs = [row.snr for row in rows if row.snr is not None]
    label = "SNR (dB), without what is exact" if math.inf in snrs else "SNR (dB)"
    panels = {"snr": label} if any(map(math.isfinite, snrs)) else {}
    panels["amax"] = "amax"
    figure, axes = plt.subplots(
        len(panels), sharex=True, squeeze=False, figsize=(9, 1 + 3.2 * len(panels)), layout="constrained"
    )
    for (attribute, label), axis in zip(panels.items(), axes[:, 0]):
        _draw_lines(axis, series, attribute)
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    top, bottom = axes[0, 0], axes[-1, 0]
    top.set_title(title, loc="left")
    if top is not bottom:
        low, high = top.get_ylim()
        # Differences of a tenth of a dB are no news.
        missing = max(0.0, MIN_DECIBELS - (high - low)) / 2
        top.set_ylim(low - missing, high + missing)
    bottom.set_yscale("log", base=2)
    low, high = bottom.get_ylim()
    missing = max(1.0, (4 * low / high) ** 0.5)
    bottom.set_ylim(low / missing, high * missing)
    bottom.yaxis.set_major_formatter("{x:g}")
    bottom.set_xlabel("layer")
    bottom.set_xticks(layers[:: -(-len(layers) // 16)])
    figure.align_ylabels()
    has_band = any(len(rows) > 1 for kind in series.values() for rows in kind.values())
    legend = {"title": "band: experts"} if has_band else {}
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside right upper", frameon=False, **legend)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise DataError(f"--plot {path}: {error}") from None
    finally:
        plt.close(figure)


def _series(rows: Sequence[TensorRow]) -> Series:
    """Kind of matrix -> layer -> its rows: one, or one an expert."""
    series: Series = {}
    for row in rows:
        if match := re.search(r"\blayers\.(\d+)\.(.*)\.weight$", row.name):
            kind = re.sub(r"experts\.\d+\.", "experts.", match[2])
            kind = re.sub(r"^(self_attn|block_sparse_moe|mlp)\.", "", kind)
            series.setdefault(kind, {}).setdefault(int(match[1]), []).append(row)
    return series


def _draw_lines(axis: Axes, series: Series, attribute: str) -> None:
    colors = plt.colormaps["tab10" if len(series) <= 10 else "tab20"].colors
    for index, (kind, layers) in enumerate(series.items()):
        values = {layer: [getattr(row, attribute) for row in rows] for layer, rows in sorted(layers.items())}
        values = {layer: [x for x in found if x is not None and math.isfinite(x)] for layer, found in values.items()}
        values = {layer: found for layer, found in values.items() if found}
        low, mean, high = ([reduce(found) for found in values.values()] for reduce in (np.min, np.mean, np.max))
        # Colors and markers by index, so that a kind looks alike in both panels.
        color = colors[index % len(colors)]
        axis.plot(values.keys(), mean, color=color, marker=MARKERS[index % len(MARKERS)], ms=5, lw=1.4, label=kind)
        axis.fill_between(values.keys(), low, high, color=color, alpha=0.15, lw=0)
