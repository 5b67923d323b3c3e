"""Statistics as values: through a call of the model, in and out, and from many devices into one."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from fp8x.errors import CalibrationError
from fp8x.nn.calibrated import Calibrated
from fp8x.nn.observer import Amax, NonfiniteCount, Statistic
from fp8x.nn.training import check_finished
from fp8x.nn.walk import named_static
from fp8x.sharding.place import SPEC


def start(
    model: nnx.Module, *, histogram: bool = False, layers: Mapping[str, Calibrated] | None = None
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Puts a model's static layers, or some of them, into calibration, with or without histograms.

    They pass their inputs on in 16 bits, so that what a row gives depends on no other row, batch or device.

    Returns `graphdef, statistics, rest`: what `observe` takes. The statistics are empty.

    Raises:
        CalibrationError: the model has no static layer.
    """
    for layer in (static_layers(model) if layers is None else layers).values():
        layer.start_calibration(histogram=histogram, fake_quantize=False)
        # Statistics of a layer on a mesh lie as what they are of.
        layer.amax.set_metadata(SPEC, layer.input_scale.get_metadata(SPEC, P()))
        if layer.tokens.ndim:
            layer.tokens.set_metadata(SPEC, P(*layer.weight.get_metadata(SPEC, P())[: layer.tokens.ndim]))
    return nnx.split(model, Statistic, ...)


def static_layers(model: nnx.Module) -> dict[str, Calibrated]:
    """What calibration is for, by path: layers in 8 bits, and what stores keys and values in 8 bits.

    Raises:
        CalibrationError: there are none.
        RecipeError: the model is in training.
    """
    check_finished(model)
    layers = named_static(model)
    if not layers:
        raise CalibrationError(
            "model: no layer has a static activation scale, so there is nothing to calibrate; "
            "quantize it with a recipe such as 'e4m3_e4m3_bf16', or pass kv_cache=True"
        )
    return layers


def observe(graphdef: nnx.GraphDef, rest: nnx.State, statistics: nnx.State, batch: tuple[Any, ...]) -> nnx.State:
    """`statistics` joined by what the model's layers see in `batch`: pure, to be compiled.

    Arguments:
        graphdef, statistics, rest: what `start` returns, and what has been found since.
        batch: what the model is called with.
    """
    model = nnx.merge(graphdef, statistics, rest)
    if getattr(model, "placement", None) is not None:
        model.placement = None  # here it is one device's part
    model(*batch)
    return nnx.state(model, Statistic)


def all_reduce(statistics: nnx.State, axes: str | Sequence[str], copies: Sequence[str] = ()) -> nnx.State:
    """The statistics of all devices, inside `jax.shard_map` or `jax.pmap`.

    Two collectives, whatever the model: a maximum and a sum; one more for layers whose K is split.

    Arguments:
        statistics: this device's.
        axes: mesh axes over which devices saw different rows.
        copies: mesh axes over which devices saw the same rows; they are counted once.
    """
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    variables, tree = jax.tree.flatten(statistics, is_leaf=_is_variable)
    alike: dict[tuple, list[int]] = {}
    for index, variable in enumerate(variables):
        is_max = isinstance(variable, Amax | NonfiniteCount)
        over = (*axes, *copies) if is_max else axes
        split = jax.tree.leaves(tuple(variable.get_metadata(SPEC, P())))
        alike.setdefault((is_max, tuple(axis for axis in over if axis not in split)), []).append(index)
    for (is_max, over), indices in alike.items():
        parts = [variables[index][...] for index in indices]
        # One vector, so that one collective moves it.
        vector = jnp.concatenate([part.reshape(-1).astype(jnp.float32 if is_max else jnp.uint32) for part in parts])
        vector = jax.lax.pmax(vector, over) if is_max else jax.lax.psum(vector, over)
        ends = np.cumsum([part.size for part in parts])[:-1]
        for index, part, found in zip(indices, parts, jnp.split(vector, ends)):
            variables[index] = variables[index].replace(found.reshape(part.shape).astype(part.dtype))
    return jax.tree.unflatten(tree, variables)


def any_value(statistics: nnx.State) -> Shaped[Array, " 1"]:
    """Ready when all are; and can be waited for, where the statistics themselves were donated to the next step."""
    return jax.tree.leaves(statistics)[0].reshape(-1)[:1]


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
