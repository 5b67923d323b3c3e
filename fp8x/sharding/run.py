"""A function of a model on every device of its mesh, under `jax.shard_map`."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from fp8x.errors import MeshError
from fp8x.sharding.plan import Placement


def specs(module: nnx.Module) -> nnx.State:
    """How the parameters of a module lie, as `jax.shard_map` takes it for `nnx.state(module)`."""
    return state_specs(nnx.state(module))


def state_specs(state: nnx.State) -> nnx.State:
    """`specs` of a state."""
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda variable: variable.get_metadata("spec", P()), state, is_leaf=is_variable)


def call(
    function: Callable, model: nnx.Module, *args: Any, in_specs: tuple, out_specs: Any, num_donated: int = 0
) -> Any:
    """`function(model, *args)`, compiled, where `model.placement` says.

    Inside, the model holds what one device does, and its `placement` is None.

    Arguments:
        function: takes the model and what a device has of `args`. One that does not change: jit compiles for it.
        args: whole; in several processes, the same in each.
        in_specs, out_specs: of `args` and of what the function returns.
        num_donated: how many of `args`, from the first, the results may take the place of.
    """
    placement = model.placement
    graphdef, state = nnx.split(model)
    args = to_mesh(placement, args, in_specs)
    split = args[:num_donated], args[num_donated:]
    return _call(function, placement, graphdef, in_specs, out_specs, state, *split)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=6)
def _call(function, placement, graphdef, in_specs, out_specs, state, donated, args):
    return on_devices(function, placement, graphdef, in_specs, out_specs)(state, *donated, *args)


def on_devices(
    function: Callable, placement: Placement, graphdef: nnx.GraphDef, in_specs: tuple, out_specs: Any
) -> Callable:
    """`call` for what is being compiled already: takes the model's state and the arguments."""

    def on_device(state: nnx.State, *args: Any) -> Any:
        model = nnx.merge(graphdef, state)
        model.placement = None
        return function(model, *args)

    def run(state: nnx.State, *args: Any) -> Any:
        # check_vma off: the ops and layers inside know of no mesh.
        return jax.shard_map(
            on_device,
            mesh=placement.mesh,
            in_specs=(state_specs(state), *in_specs),
            out_specs=out_specs,
            check_vma=False,
        )(state, *args)

    return run


def to_mesh(placement: Placement, args: Any, in_specs: Any) -> Any:
    """Arguments where `in_specs` say; what is there already stays."""
    return jax.tree.map(lambda spec, tree: jax.tree.map(lambda x: _to_mesh(placement, x, spec), tree), in_specs, args)


def _to_mesh(placement: Placement, x: Array | np.ndarray, spec: P) -> Array:
    sharding = NamedSharding(placement.mesh, spec)
    if isinstance(x, jax.core.Tracer):
        # Where sharding is part of a type, shard_map moves nothing by itself.
        is_explicit = AxisType.Explicit in placement.mesh.axis_types
        return jax.sharding.reshard(x, sharding) if is_explicit else x
    if isinstance(x, jax.Array) and (jax.process_count() == 1 or not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def check_batch(placement: Placement, rows: int, name: str) -> None:
    """Raises MeshError unless the devices along the batch's axes can have as many rows each."""
    if (filled := fill_batch(placement, rows)) != rows:
        size = placement.mesh.shape["data"]
        raise MeshError(
            f"{name}: the batch is {rows}, which the {size} devices along mesh axis 'data' do not divide; "
            f"give {filled} rows (fill up with copies), or a mesh with fewer devices along it"
        )


def fill_batch(placement: Placement, rows: int) -> int:
    """The next larger batch of which devices have as many rows each."""
    size = math.prod(placement.mesh.shape[axis] for axis in placement.batch)
    return -(-rows // size) * size


def batch_spec(placement: Placement) -> P:
    """Rows of a batch, in the first dim."""
    return P(*placement.batch)
