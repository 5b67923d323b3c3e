"""`scale_spec`: a scale's PartitionSpec from its weight's."""

import math
from collections.abc import Sequence

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fp8x.errors import MeshError
from fp8x.scheme import Scheme


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
    for entry, size, block, count in zip(weight_spec, shape, blocks, counts):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        if unknown := [axis for axis in axes if axis not in mesh.shape]:
            raise MeshError(f"weight_spec: {weight_spec} has axis {unknown[0]!r}; the mesh has {mesh.axis_names}")
        parts = math.prod(mesh.shape[axis] for axis in axes)
        is_whole = count > 1 and size % (parts * block) == 0
        entries.append(entry if is_whole else None)
    return P(*entries)
