"""What calibration found. Knows no JAX, like the files that hold it."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Method = Literal["max", "percentile", "mse"]


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """What calibration found in one layer's input, or in the keys or values of an attention.

    Attributes:
        activation: the scheme that the scale is for, as text.
        amax: the largest finite magnitude, per K-group, `[1, groups]`.
        scale: the static activation scale that it gives, float32 `[1, groups]`.
        tokens: rows seen: `[]`, or `[E]` for one matrix per expert.

    All have further leading axes for a stack of layers.
    """

    activation: str
    amax: Float[np.ndarray, "... 1 groups"]
    scale: Float[np.ndarray, "... 1 groups"]
    tokens: Int[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did.

    Attributes:
        layers: the statistics of every static layer, by path.
        batches: how many batches ran (in this process).
        method, percentile: how scales followed; percentile is None for other methods.
    """

    layers: dict[str, LayerStatistics]
    batches: int
    method: Method
    percentile: float | None

    def undersampled(self, min_tokens: int) -> list[str]:
        """The layers and experts that saw fewer than `min_tokens` tokens, by name: their scale rests on little."""
        names = []
        for path, layer in self.layers.items():
            stack = layer.amax.ndim - 2
            for index in np.argwhere(layer.tokens < min_tokens).tolist():
                of_stack = [f" layer {','.join(map(str, index[:stack]))}"] if stack else []
                names.append("".join([path, *of_stack, *(f" expert {e}" for e in index[stack:])]))
        return names
