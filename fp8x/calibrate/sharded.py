"""Calibration over a mesh: every device observes rows of its own; they meet once, after the last batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fp8x.calibrate.statistics import all_reduce, any_value, observe
from fp8x.errors import MeshError
from fp8x.sharding.place import SPEC
from fp8x.sharding.plan import DATA, check_mesh
from fp8x.sharding.run import state_specs


class ShardedObserver:
    """Observes batches on the devices of a mesh. Rows are split over the axis `data`; along others they are the same.

    A model that is not on the mesh is copied to every device. A process then runs its own devices on its own batches,
    of which others may have more or fewer, and no step communicates.

    A model that `fp8x.sharding` has laid out runs as it lies; each process gives the same batches.

    Arguments:
        graphdef, statistics, rest: what `fp8x.calibrate.statistics.start` returns.
        mesh: axes among `data`, `tensor` and `expert`.
        is_placed: whether the model is on the mesh.

    Raises:
        MeshError: another axis, or none of the devices is this process's.
    """

    def __init__(
        self, graphdef: nnx.GraphDef, statistics: nnx.State, rest: nnx.State, mesh: Mesh, is_placed: bool = False
    ):
        check_mesh(mesh)
        if jax.process_index() not in {device.process_index for device in mesh.devices.flat}:
            raise MeshError(f"mesh: process {jax.process_index()} has none of its {mesh.size} devices")
        self.graphdef = graphdef
        # Under shard_map all axes are manual: what they are outside of it makes no difference.
        self.mesh = Mesh(mesh.devices, mesh.axis_names)
        self.local = self.mesh if is_placed else self.mesh.local_mesh
        self.portions = self.local.shape.get(DATA, 1)
        self.rows: int | None = None  # of a portion
        each = NamedSharding(self.local, _each(self.local))

        def of_each_device(statistic: nnx.Variable) -> nnx.Variable:
            part = NamedSharding(self.local, statistic.get_metadata(SPEC, P())).shard_shape(statistic.shape)
            return statistic.replace(jnp.zeros((self.local.size, *part), statistic.dtype, device=each))

        self.statistics = jax.tree.map(of_each_device, statistics, is_leaf=lambda v: isinstance(v, nnx.Variable))
        self.rest = jax.device_put(rest, jax.tree.map(lambda spec: NamedSharding(self.local, spec), state_specs(rest)))
        if jax.process_count() > 1:
            self.result()  # A process that is missing is found now; one that dies later breaks a connection.

    def add(self, batch: tuple[Any, ...]) -> jax.Array:
        """Observes a batch, or more than one step's worth of it, or less; what it gives is ready when that is done.

        The first batch sets how many rows a device takes at a time, and so what is compiled. What does not fill every
        device leaves some idle for a step; only rows that do not fill one device compile again.

        Raises:
            MeshError: arrays without rows, or of different numbers of them, or a first batch that `data` does not
                divide.
        """
        total = _rows(batch)
        if self.rows is None:
            if total % self.portions:
                below = total - total % self.portions
                raise MeshError(
                    f"batches: the first has {total} rows, which {self.portions} devices along mesh axis {DATA!r} do "
                    f"not divide; give batches of {f'{below} or ' if below else ''}{below + self.portions} rows"
                )
            self.rows = total // self.portions
        whole = total - total % self.rows
        for start in range(0, whole, self.rows * self.portions):
            done = self._step(batch, self.rows, start, min(whole, start + self.rows * self.portions))
        if whole < total:
            done = self._step(batch, total - whole, whole, total)
        return done

    def _step(self, batch: tuple[Any, ...], rows: int, start: int, stop: int) -> jax.Array:
        """Rows `start` to `stop` in portions of `rows`; a device for which none is left sees some again, in vain."""
        index = start + np.arange(rows * self.portions) % (stop - start)
        portions = jax.tree.map(lambda x: np.asarray(x)[index], batch)
        is_real = np.arange(self.portions) < (stop - start) // rows
        split = NamedSharding(self.local, _split(self.local))
        portions, is_real = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, split, x.__getitem__), (portions, is_real)
        )
        # A user's own mesh may be in force, of other axis types or (with several processes) of other devices.
        with jax.set_mesh(self.local):
            self.statistics, done = _step(self.graphdef, self.local, self.statistics, self.rest, portions, is_real)
        return done

    def result(self) -> nnx.State:
        """The statistics of all devices of all processes, the same for each: the only communication."""
        sharding = NamedSharding(self.mesh, _each(self.mesh))

        def of_all_processes(local: jax.Array) -> jax.Array:
            parts = [shard.data for shard in local.addressable_shards]
            return jax.make_array_from_single_device_arrays((self.mesh.size, *local.shape[1:]), sharding, parts)

        with jax.set_mesh(self.mesh):
            reduced = _reduce(self.mesh, jax.tree.map(of_all_processes, self.statistics))
        whole = jax.device_put(reduced, NamedSharding(self.mesh, P()))
        return jax.tree.map(lambda value: jnp.asarray(np.asarray(value.addressable_data(0))), whole)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(graphdef, mesh, statistics, rest, batch, is_real):
    def on_device(statistics, rest, batch, is_real):
        found = observe(graphdef, rest, jax.tree.map(lambda s: s[0], statistics), batch)
        found = jax.tree.map(lambda new, old: jnp.where(is_real[0], new[None], old), found, statistics)
        return found, any_value(found)

    each, split = _each(mesh), _split(mesh)
    # check_vma off: a model's own loops need not say along which axes their carries vary.
    in_specs = (each, state_specs(rest), split, split)
    return jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=(each, each), check_vma=False)(
        statistics, rest, batch, is_real
    )


@functools.partial(jax.jit, static_argnums=0)
def _reduce(mesh, statistics):
    data = [axis for axis in mesh.axis_names if axis == DATA]
    copies = [axis for axis in mesh.axis_names if axis != DATA]

    def on_device(statistics):
        return all_reduce(jax.tree.map(lambda s: s[0], statistics), data, copies)

    each = _each(mesh)
    return jax.shard_map(on_device, mesh=mesh, in_specs=each, out_specs=state_specs(statistics), check_vma=False)(
        statistics
    )


def _each(mesh: Mesh) -> P:
    """A dim with an entry for each device. One axis is not written as a tuple: jit would take it for another type."""
    return P(mesh.axis_names if len(mesh.axis_names) > 1 else mesh.axis_names[0])


def _split(mesh: Mesh) -> P:
    return P(DATA) if DATA in mesh.axis_names else P()


def _rows(batch: tuple[Any, ...]) -> int:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if not shapes or any(not shape or shape[0] != shapes[0][0] or shape[0] == 0 for shape in shapes):
        raise MeshError(f"batches: shapes {shapes} do not fit a mesh; every array needs the same rows, one or more")
    return shapes[0][0]
