"""`calibrate`: runs batches through a model and sets its static activation scales."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fp8x import numerics
from fp8x.errors import CalibrationError, DataError, some
from fp8x.nn.convert import named_layers
from fp8x.nn.quantized import Amax, QuantizedLayer, TokenCount

Statistic = nnx.Any(Amax, TokenCount)


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """What calibration found in one layer's input.

    Attributes:
        amax: the largest finite magnitude, per K-group, `[1, groups]`.
        scale: the static activation scale that it gives, float32 `[1, groups]`.
        tokens: rows seen: `[]`, or `[E]` for one matrix per expert.
    """

    amax: Float[np.ndarray, "1 groups"]
    scale: Float[np.ndarray, "1 groups"]
    tokens: Int[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did.

    Attributes:
        layers: the statistics of every static layer, by path.
        batches: how many batches ran.
    """

    layers: dict[str, LayerStatistics]
    batches: int

    def undersampled(self, min_tokens: int) -> list[str]:
        """The layers and experts that saw fewer than `min_tokens` tokens, by name: their scale rests on little."""
        names = []
        for path, layer in self.layers.items():
            if layer.tokens.ndim == 0:
                names += [path] if layer.tokens < min_tokens else []
            else:
                names += [f"{path} expert {e}" for e in np.flatnonzero(layer.tokens < min_tokens)]
        return names


def calibrate(model: nnx.Module, batches: Iterable, mesh=None) -> CalibrationReport:
    """Sets the static activation scales of a model from the largest magnitudes that its layers see.

    The model that infers is the one that calibrates: a layer in calibration gathers the running amax of its input
    and goes on with that input quantized by the scale which follows, so that later layers see what they will see.

    Arguments:
        model: a quantized model; every layer with a static activation scale is calibrated (anew).
        batches: what the model is called with, one after another; a tuple is several arguments. Batches of one shape
            compile once.
        mesh: reserved for sharded calibration; None is the only value yet.

    Raises:
        CalibrationError: the model has no static layer, or a layer saw nothing but zeros (named).
        DataError: no batches.
        NotImplementedError: a mesh was given.
    """
    if mesh is not None:
        raise NotImplementedError("mesh: calibration runs on one device; pass mesh=None")
    layers = {path: layer for path, layer in named_layers(model).items() if layer.recipe.is_static}
    if not layers:
        raise CalibrationError(
            "model: no layer has a static activation scale, so there is nothing to calibrate; "
            "quantize it with a recipe such as 'e4m3_e4m3_bf16'"
        )
    for layer in layers.values():
        layer.start_calibration()
    try:
        count = _observe(model, batches)
        idle = [path for path, layer in layers.items() if not np.asarray(layer.amax[...]).any()]
        if idle:
            raise CalibrationError(f"model: {some(idle)} fed no finite value but zeros; give more or other data")
        found = {path: _statistics(layer) for path, layer in layers.items()}
    except BaseException:
        for layer in layers.values():
            layer.abandon_calibration()
        raise
    for layer in layers.values():
        layer.finish_calibration()
    return CalibrationReport(found, count)


def _observe(model: nnx.Module, batches: Iterable) -> int:
    """Runs every batch; the statistics go through the compiled step as values, in and out."""
    graphdef, statistics, rest = nnx.split(model, Statistic, ...)
    count = 0
    for batch in batches:
        count += 1
        statistics = _step(graphdef, statistics, rest, batch if isinstance(batch, tuple) else (batch,))
    if count == 0:
        raise DataError("batches: there are none; calibration needs at least one")
    nnx.update(model, statistics)
    return count


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(graphdef: nnx.GraphDef, statistics: nnx.State, rest: nnx.State, batch: tuple[Array, ...]) -> nnx.State:
    model = nnx.merge(graphdef, statistics, rest)
    model(*batch)
    return nnx.state(model, Statistic)


def _statistics(layer: QuantizedLayer) -> LayerStatistics:
    scale = numerics.compute_scale(layer.amax[...], layer.recipe.activation)
    return LayerStatistics(np.asarray(layer.amax[...]), np.asarray(scale), np.asarray(layer.tokens[...]))
