"""Statistics as values: through a call of the model, in and out, and from many devices into one."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from fp8x.errors import CalibrationError
from fp8x.nn.convert import named_layers
from fp8x.nn.observer import Amax, Statistic
from fp8x.nn.quantized import QuantizedLayer


def start(model: nnx.Module, *, histogram: bool = False) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Puts a model's static layers into calibration, with or without histograms.

    They pass their inputs on in 16 bits, so that what a row gives depends on no other row, batch or device.

    Returns `graphdef, statistics, rest`: what `observe` takes. The statistics are empty.

    Raises:
        CalibrationError: the model has no static layer.
    """
    layers = static_layers(model)
    for layer in layers.values():
        layer.start_calibration(histogram=histogram, fake_quantize=False)
    return nnx.split(model, Statistic, ...)


def static_layers(model: nnx.Module) -> dict[str, QuantizedLayer]:
    """The layers that calibration is for, by path.

    Raises:
        CalibrationError: there are none.
    """
    layers = {path: layer for path, layer in named_layers(model).items() if layer.recipe.is_static}
    if not layers:
        raise CalibrationError(
            "model: no layer has a static activation scale, so there is nothing to calibrate; "
            "quantize it with a recipe such as 'e4m3_e4m3_bf16'"
        )
    return layers


def observe(graphdef: nnx.GraphDef, rest: nnx.State, statistics: nnx.State, batch: tuple[Any, ...]) -> nnx.State:
    """`statistics` joined by what the model's layers see in `batch`: pure, to be compiled.

    Arguments:
        graphdef, statistics, rest: what `start` returns, and what has been found since.
        batch: what the model is called with.
    """
    model = nnx.merge(graphdef, statistics, rest)
    model(*batch)
    return nnx.state(model, Statistic)


def all_reduce(statistics: nnx.State, axes: str | Sequence[str], copies: Sequence[str] = ()) -> nnx.State:
    """The statistics of all devices, inside `jax.shard_map` or `jax.pmap`: two collectives, whatever the model.

    Arguments:
        statistics: this device's.
        axes: mesh axes over which devices saw different rows.
        copies: mesh axes over which devices saw the same rows; they are counted once.
    """
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    variables, tree = jax.tree.flatten(statistics, is_leaf=_is_variable)
    values: list[Array | None] = [None] * len(variables)
    for is_amax in (True, False):
        picked = [i for i, variable in enumerate(variables) if isinstance(variable, Amax) == is_amax]
        parts = [variables[i][...] for i in picked]
        # One vector, so that one collective moves it.
        vector = jnp.concatenate([part.reshape(-1).astype(jnp.float32 if is_amax else jnp.uint32) for part in parts])
        vector = jax.lax.pmax(vector, (*axes, *copies)) if is_amax else jax.lax.psum(vector, axes)
        start = 0
        for i, part in zip(picked, parts):
            values[i] = vector[start : start + part.size].reshape(part.shape).astype(part.dtype)
            start += part.size
    return jax.tree.unflatten(tree, [variable.replace(value) for variable, value in zip(variables, values)])


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
