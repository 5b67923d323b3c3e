"""Parameters onto the devices of a mesh: each device gets its own part, zeros included; nothing else is read."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.scheme import Scheme
from fp8x.sharding.split import Split

Read = Callable[[tuple[slice, ...]], np.ndarray]
Dims = tuple[Split | None, ...]

SPEC = "spec"  # the metadata of a variable that says how it lies on the mesh


def spec_of(dims: Dims) -> P:
    return P(*(None if split is None else split.entry for split in dims))


def padded(shape: tuple[int, ...], dims: Dims) -> tuple[int, ...]:
    """The shape of an array that lies as `dims` say."""
    return tuple(size if split is None else split.padded for size, split in zip(shape, dims, strict=True))


def values_of(variable: nnx.Variable) -> Read | None:
    """What `place` reads of a variable that is in memory whole; None where it is abstract."""
    value = variable.get_value()
    return None if isinstance(value, jax.ShapeDtypeStruct) else np.asarray(value).__getitem__


def place(
    read: Read | None, shape: tuple[int, ...], dtype: np.dtype, dims: Dims, mesh: Mesh, fill: float = 0
) -> Array | jax.ShapeDtypeStruct:
    """An array on the mesh.

    Arguments:
        read: gives ranges of the whole array; called for what this process's devices hold, once for each part. None
            gives the array's description.
        shape: of the whole array.
        fill: what lies behind the rows of a part, where its split has more room.
    """
    sizes, parts, sharding = padded(shape, dims), {}, NamedSharding(mesh, spec_of(dims))
    if read is None:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(range(size)[where] for where, size in zip(index, sizes))
        if bounds not in parts:
            pieces = [
                [(slice(0, len(rows)), slice(rows.start, rows.stop))]
                if split is None
                else list(split.pieces(rows.start, rows.stop))
                for rows, split in zip(bounds, dims)
            ]
            out = np.zeros([len(rows) for rows in bounds], dtype)
            if fill:
                out[...] = fill
            for chosen in itertools.product(*pieces):
                to, source = zip(*chosen) if chosen else ((), ())
                out[to] = read(source)
            parts[bounds] = out
        return parts[bounds]

    return jax.make_array_from_callback(sizes, sharding, part)


def whole_shape(shape: tuple[int, ...], dims: Dims) -> tuple[int, ...]:
    """The inverse of `padded`."""
    return tuple(size if split is None else split.size for size, split in zip(shape, dims, strict=True))


def whole(array: Array, dims: Dims) -> np.ndarray:
    """The inverse of `place`: the array as one process sees it, without what was filled in."""
    found = np.asarray(array)
    for axis, split in enumerate(dims):
        if split is not None:
            pieces = [np.take(found, range(source.start, source.stop), axis) for _, source in split.inverse()]
            found = np.concatenate(pieces, axis)
    return found


def put(variable: nnx.Variable, array: Array) -> None:
    """Sets a variable to an array on the mesh; its spec goes with it."""
    variable.set_value(array)
    variable.set_metadata(SPEC, array.sharding.spec)


def scale_dims(scheme: Scheme, shape: tuple[int, ...], dims: Dims) -> tuple[Scheme, Dims]:
    """How the scales of a weight lie. The scheme's blocks are cut finer where a boundary between devices cuts them."""
    blocks = list(scheme.block_of(shape))
    named, found = [None if b is None else 0 for b in ((0,) * (len(shape) - len(scheme.block)) + scheme.block)], []
    for axis, (split, block) in enumerate(zip(dims, blocks)):
        if split is None or named[axis] is None:
            found.append(None)
            continue
        found.append(split.of_scales(block))
        blocks[axis] = split.finer(block)
    block = tuple(None if name is None else b for name, b in zip(named, blocks))[-len(scheme.block) :]
    return dataclasses.replace(scheme, block=block), tuple(found)


def quantize_placed(
    weight: Array, scheme: Scheme, shape: tuple[int, ...], dims: Dims, mesh: Mesh, source: Scheme | None = None
) -> ScaledArray:
    """What quantizing the whole weight gives, bit for bit, from a weight that `place` has laid out: every device
    quantizes its part, and only magnitudes move.

    Arguments:
        weight: in 16 or 32 bits, padded.
        shape: of the whole weight.
        source: of a weight that comes from 8 bits, whose blocks may choose their scales (`numerics.requantize`).
    """
    finer, of_scales = scale_dims(scheme, shape, dims)
    # jit may write an equal spec in another way; it is a part of what later steps compile for.
    shardings = [NamedSharding(mesh, spec_of(lie)) for lie in (dims, of_scales)]
    chooses_scales = source is not None and scheme.chooses_scales(source)
    data, scale = jax.device_put(_quantize(weight, scheme, shape, dims, mesh, chooses_scales), tuple(shardings))
    return ScaledArray(data, scale, finer)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _quantize(
    weight: Array, scheme: Scheme, shape: tuple[int, ...], dims: Dims, mesh: Mesh, chooses_scales: bool
) -> tuple[Array, Array]:
    (finer, of_scales), spec = scale_dims(scheme, shape, dims), spec_of(dims)

    def of_whole_blocks(found: Array) -> Array:
        """The largest of a whole block, from those of its parts on any device."""
        blocks = zip(scheme.block_of(shape), finer.block_of(shape))
        for axis, (split, scales, (block, cut)) in enumerate(zip(dims, of_scales, blocks)):
            if split is not None and scales is None:
                found = jax.lax.pmax(found, split.axes)
            elif split is not None and cut != block:
                found = _of_whole_blocks(found, scales, axis)
        return found

    def on_device(part: Array) -> tuple[Array, Array]:
        amax = of_whole_blocks(numerics.block_amax(part, finer))
        if chooses_scales:
            scales = numerics.candidate_scales(amax, finer)
            errors = [of_whole_blocks(numerics.largest_error(part, scale, finer)) for scale in scales]
            scale = numerics.better_scale(scales, errors)
        else:
            scale = numerics.compute_scale(amax, finer)
        quantized = numerics.quantize_with_scale(part, scale, finer)
        return quantized.data, quantized.scale

    out_specs = (spec, spec_of(of_scales))
    # check_vma off: the numerics know of no mesh.
    return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=out_specs, check_vma=False)(weight)


def _of_whole_blocks(amax: Array, scales: Split, axis: int) -> Array:
    """Of every block of the whole dim from the magnitudes of its cuts, on whichever device, back to each cut."""
    source = np.full(scales.padded, scales.size)  # what is filled in is no block's
    for to, block in scales.pieces(0, scales.padded):
        source[to] = np.arange(block.start, block.stop)
    every = jnp.moveaxis(jax.lax.all_gather(amax, scales.axes, axis=axis, tiled=True), axis, 0)
    found = jnp.zeros((scales.size + 1, *every.shape[1:]), every.dtype).at[source].max(every)
    mine = jnp.asarray(source).reshape(-1, scales.part)[jax.lax.axis_index(scales.axes)]
    return jnp.moveaxis(found[mine], 0, axis)
