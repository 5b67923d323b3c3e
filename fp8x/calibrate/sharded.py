"""Calibration over a mesh: every device observes rows of its own; they meet once, after the last batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fp8x.calibrate.statistics import all_reduce, observe
from fp8x.errors import MeshError

DATA, AXES = "data", ("data", "tensor", "expert")


class ShardedObserver:
    """Observes batches on the devices of a mesh, each with the whole model and its portion of the rows.

    A process runs its own devices on its own batches, of which others may have more or fewer; no step communicates.
    Rows are split over the axis `data`; devices along other axes see the same rows.

    Arguments:
        graphdef, statistics, rest: what `fp8x.calibrate.statistics.start` returns.
        mesh: axes among `data`, `tensor` and `expert`.

    Raises:
        MeshError: another axis, or none of the devices is this process's.
    """

    def __init__(self, graphdef: nnx.GraphDef, statistics: nnx.State, rest: nnx.State, mesh: Mesh):
        if not isinstance(mesh, Mesh):
            raise MeshError(f"mesh: {mesh!r:.40} is no Mesh; make one with jax.make_mesh((2,), ('data',))")
        if unknown := set(mesh.axis_names) - set(AXES):
            raise MeshError(f"mesh: axis {min(unknown)!r} is unknown; use {', '.join(AXES)}")
        if jax.process_index() not in {device.process_index for device in mesh.devices.flat}:
            raise MeshError(f"mesh: process {jax.process_index()} has none of its {mesh.size} devices")
        self.graphdef, self.mesh, self.local = graphdef, mesh, mesh.local_mesh
        self.portions = self.local.shape.get(DATA, 1)
        self.rows: int | None = None  # of a portion
        zeros = jax.tree.map(lambda s: np.zeros((self.local.size, *s.shape), s.dtype), statistics)
        self.rest = jax.device_put(rest, NamedSharding(self.local, P()))
        self.statistics = jax.device_put(zeros, NamedSharding(self.local, _each(self.local)))
        if jax.process_count() > 1:
            self.result()  # A process that is missing is found now; one that dies later breaks a connection.

    def add(self, batch: tuple[Any, ...]) -> None:
        """Observes a batch, or more than one step's worth of it, or less.

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
            self._step(batch, self.rows, start, min(whole, start + self.rows * self.portions))
        if whole < total:
            self._step(batch, total - whole, whole, total)

    def _step(self, batch: tuple[Any, ...], rows: int, start: int, stop: int) -> None:
        """Rows `start` to `stop` in portions of `rows`; a device for which none is left sees some again, in vain."""
        index = start + np.arange(rows * self.portions) % (stop - start)
        portions = jax.tree.map(lambda x: np.asarray(x)[index], batch)
        is_real = np.arange(self.portions) < (stop - start) // rows
        split = NamedSharding(self.local, _split(self.local))
        portions, is_real = jax.device_put((portions, is_real), split)
        # A user's own mesh may be in force, of other axis types or (with several processes) of other devices.
        with jax.set_mesh(self.local):
            self.statistics = _step(self.graphdef, self.local, self.statistics, self.rest, portions, is_real)

    def result(self) -> nnx.State:
        """The statistics of all devices of all processes, the same for each: the only communication."""
        sharding = NamedSharding(self.mesh, _each(self.mesh))

        def of_all_processes(local: jax.Array) -> jax.Array:
            parts = [shard.data for shard in local.addressable_shards]
            return jax.make_array_from_single_device_arrays((self.mesh.size, *local.shape[1:]), sharding, parts)

        with jax.set_mesh(self.mesh):
            reduced = _reduce(self.mesh, jax.tree.map(of_all_processes, self.statistics))
        return jax.tree.map(lambda value: jnp.asarray(np.asarray(value.addressable_data(0))), reduced)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(graphdef, mesh, statistics, rest, batch, is_real):
    def on_device(statistics, rest, batch, is_real):
        found = observe(graphdef, rest, jax.tree.map(lambda s: s[0], statistics), batch)
        return jax.tree.map(lambda new, old: jnp.where(is_real[0], new[None], old), found, statistics)

    each, split = _each(mesh), _split(mesh)
    # check_vma off: a model's own loops need not say along which axes their carries vary.
    return jax.shard_map(on_device, mesh=mesh, in_specs=(each, P(), split, split), out_specs=each, check_vma=False)(
        statistics, rest, batch, is_real
    )


@functools.partial(jax.jit, static_argnums=0)
def _reduce(mesh, statistics):
    data = [axis for axis in mesh.axis_names if axis == DATA]
    copies = [axis for axis in mesh.axis_names if axis != DATA]

    def on_device(statistics):
        return all_reduce(jax.tree.map(lambda s: s[0], statistics), data, copies)

    each = _each(mesh)
    return jax.shard_map(on_device, mesh=mesh, in_specs=each, out_specs=P(), check_vma=False)(statistics)


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
