"""How arrays lie on a mesh: what their types say, and what that means for an array in blocks.

On a mesh whose axes are Explicit (what `jax.make_mesh` makes) an array's type has its sharding, and operations that
could give several are refused. On Auto axes XLA decides, after everything is traced.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from fp8x.errors import MeshError
from fp8x.scheme import Scheme

Axes = tuple[str, ...]  # over which one dim of an array is split, the first the slowest


def mesh_of(tree: Any) -> AbstractMesh | None:
    """The mesh of the arrays in a pytree, if it has more than one device."""
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree))
    return next((mesh for mesh in meshes if mesh.size > 1), None)


def axes_of_type(mesh: AbstractMesh | None, kind: AxisType) -> Axes:
    """The axes of a kind that split something."""
    if mesh is None:
        return ()
    return tuple(name for name, its in zip(mesh.axis_names, mesh.axis_types) if its == kind and mesh.shape[name] > 1)


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh of the arrays in a pytree, if it has Explicit axes that split something."""
    mesh = mesh_of(tree)
    return mesh if axes_of_type(mesh, AxisType.Explicit) else None


def dims_of(spec: P, ndim: int) -> tuple[Axes, ...]:
    """The axes of each dim."""
    entries = [() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return (*entries, *[()] * (ndim - len(entries)))


def explicit_dims(x: Array) -> tuple[Axes, ...]:
    """The Explicit axes over which each dim of an array is split, by its type."""
    sharding = jax.typeof(x).sharding
    explicit = axes_of_type(sharding.mesh, AxisType.Explicit)
    return tuple(tuple(axis for axis in axes if axis in explicit) for axes in dims_of(sharding.spec, x.ndim))


def spec_of(dims: Sequence[Axes]) -> P:
    """The inverse of `dims_of`."""
    return P(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in dims))


def parts(mesh: AbstractMesh | Mesh, axes: Axes) -> int:
    """Into how many parts a dim is split."""
    return math.prod(mesh.shape[axis] for axis in axes)


def by_xla(function: Callable, dims: Callable[[], Any], *args: Any) -> Any:
    """`function(*args)`, where XLA decides how everything inside lies, also on an Explicit mesh.

    Arguments:
        function: returns an array, or a list of arrays.
        dims: the axes of each dim of that array, or a list of them; asked for on an Explicit mesh alone.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return function(*args)
    shardings = jax.tree.map(
        lambda dims: NamedSharding(mesh, spec_of(dims)), dims(), is_leaf=lambda node: isinstance(node, tuple)
    )
    return jax.sharding.auto_axes(function, axes=axes_of_type(mesh, AxisType.Explicit), out_sharding=shardings)(*args)


def replicated(x: Array) -> Array:
    """`x`, whole on every device where it lies on an Explicit mesh."""
    mesh = explicit_mesh(x)
    return x if mesh is None else jax.sharding.reshard(x, NamedSharding(mesh, P()))


def merge_rows(x: Float[Array, "... k"]) -> Float[Array, "m k"]:
    """`x` with its leading dims as one, on an Explicit mesh over the axes of all of them."""
    return merge_dims(x, (x.ndim - 1, 1))


def merge_dims(x: Array, counts: Sequence[int]) -> Array:
    """`x` with its dims merged, as many into each new one as `counts` says; on an Explicit mesh over all their axes."""
    ends = list(itertools.accumulate(counts))
    spans = [slice(end - count, end) for count, end in zip(counts, ends)]
    shape = tuple(math.prod(x.shape[span]) for span in spans)
    if shape == x.shape:
        return x

    def dims():
        each = explicit_dims(x)
        return tuple(tuple(itertools.chain.from_iterable(each[span])) for span in spans)

    return by_xla(lambda x: x.reshape(shape), dims, x)


def split_dims(x: Array, sizes: Sequence[Sequence[int]], like: Sequence[Axes] = ()) -> Array:
    """`x` with each dim split into several.

    On an Explicit mesh a dim's axes go to the first of its parts, as far as they divide it; `like` says how the
    first parts lie instead, where that is known.
    """
    shape = tuple(itertools.chain.from_iterable(sizes))
    if shape == x.shape:
        return x

    def dims():
        mesh, each = explicit_mesh(x), []
        for axes, parted in zip(explicit_dims(x), sizes):
            known = [tuple(axis for axis in of if axis in axes) for of in like[len(each) : len(each) + len(parted)]]
            first = axes if parted and parted[0] % parts(mesh, axes) == 0 else ()
            each += known if len(known) == len(parted) else [first, *[()] * (len(parted) - 1)][: len(parted)]
        return tuple(each)

    return by_xla(lambda x: x.reshape(shape), dims, x)


def scale_dims(dims: Sequence[Axes], scheme: Scheme, shape: Sequence[int], mesh: AbstractMesh) -> tuple[Axes, ...]:
    """How the scales lie of an array that lies so."""
    return dims_of(scale_spec(spec_of(dims), scheme, mesh, shape), len(shape))


def scale_spec(weight_spec: P, scheme: Scheme, mesh: Mesh, shape: Sequence[int]) -> P:
    """How the scales of a weight of `shape` (the whole of it) lie where the weight lies as `weight_spec` says.

    They go with their blocks. A dim is replicated where the weight's is, where it has one scale, and where a boundary
    between devices cuts a block (`fp8x.sharding.shard` pads weights so that none does).

    Raises:
        MeshError: a spec of more dims than the weight has, or with axes that the mesh has not.
        ShapeError: the scheme names more dims than the weight has.
    """
    if len(weight_spec) > len(shape):
        raise MeshError(
            f"weight_spec: {weight_spec} names {len(weight_spec)} dims; the weight {tuple(shape)} has fewer"
        )
    blocks, counts = scheme.block_of(shape, "weight"), scheme.scale_shape(shape)
    entries = []
    for entry, axes, size, block, count in zip(weight_spec, dims_of(weight_spec, len(shape)), shape, blocks, counts):
        if unknown := [axis for axis in axes if axis not in mesh.shape]:
            raise MeshError(f"weight_spec: {weight_spec} has axis {unknown[0]!r}; the mesh has {mesh.axis_names}")
        is_whole = count > 1 and size % (parts(mesh, axes) * block) == 0
        entries.append(entry if is_whole else None)
    return P(*entries)
