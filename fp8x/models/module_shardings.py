"""Where the arrays of a model are to lie, from where the variables that they replace lie, or say that they do."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from fp8x.errors import MeshError, some

Leaf = jax.Array | np.ndarray | jax.ShapeDtypeStruct


def abstract(model: nnx.Module, metadata: Mapping[tuple, Mapping[str, Any]] | None = None) -> nnx.Module:
    """The model with shapes and types in place of its arrays, without their shardings.

    Arguments:
        metadata: further metadata of variables, by path.
    """
    graphdef, state = nnx.split(model)

    def describe(leaf, path=()):
        if isinstance(leaf, nnx.Variable):
            return leaf.replace(jax.tree.map(describe, leaf.get_value()), **(metadata or {}).get(path, {}))
        # An extended type, as of random keys, is no numpy type.
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jax.numpy.result_type(leaf)
        return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True))

    return nnx.merge(
        graphdef, nnx.from_flat_state([(path, describe(leaf, path)) for path, leaf in nnx.to_flat_state(state)])
    )


def shardings_of(
    model: nnx.Module,
    kept: Mapping[str, Leaf],
    quantize: Callable[[nnx.Module], nnx.Module],
    mesh: Mesh | None,
) -> Callable[[str, Leaf], Sharding | None]:
    """The sharding of each array that a model is to have, by name; None where nothing asks for one.

    Layers hand partitioning metadata on to their weights and scales when they are quantized. So what is known of the
    model's variables is written into the metadata of an abstract copy, which is then quantized.

    Arguments:
        kept: the arrays that the model has and keeps.
        quantize: what the abstract copy goes through.
        mesh: takes the place of those that the variables lie on.

    Raises:
        MeshError: a sharding that a variable does not fit, or a mesh without devices where no other is known.
    """
    values = [_value(leaf) for _, leaf in nnx.to_flat_state(nnx.state(model))]
    placed = [_sharding_of(array) for array in jax.tree.leaves(values)]
    mesh = mesh or _common_mesh([sharding for sharding in placed if isinstance(sharding, NamedSharding)])

    metadata = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if not isinstance(variable, nnx.Variable):
            continue
        sharding, on = _sharding_of(variable.get_value()), mesh or variable.get_metadata("mesh", None)
        if isinstance(sharding, NamedSharding):
            spec, on = sharding.spec, on or sharding.mesh
        elif variable.get_metadata("out_sharding", None):
            spec = nnx.spmd.get_var_pspec(variable)
        else:
            continue
        if on is not None:
            _checked(_name(path), on, spec, variable.shape)
            metadata[path] = {"out_sharding": tuple(spec), "mesh": on, "sharding_rules": ()}

    target = quantize(abstract(model, metadata)) if metadata else nnx.Dict()
    described = {
        _name(path): (variable.get_metadata("mesh", None), variable.get_metadata("out_sharding"))
        for path, variable in nnx.to_flat_state(nnx.state(target))
        if isinstance(variable, nnx.Variable) and variable.get_metadata("out_sharding", None)
    }

    def sharding_of(name: str, leaf: Leaf) -> Sharding | None:
        on, names = described.get(name, (None, ()))
        own = _sharding_of(kept[name]) if name in kept else None
        if isinstance(own, NamedSharding):
            on, names = mesh or own.mesh, own.spec
        elif own is not None and mesh is None:
            return own
        return None if (on := on or mesh) is None else _checked(name, on, P(*names), leaf.shape)

    return sharding_of


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _value(leaf):
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _sharding_of(array: Any) -> Sharding | None:
    """How an array lies, if someone has said so: what JAX has put on its default device may go anywhere."""
    if isinstance(array, jax.Array):
        return array.sharding if array.committed else None
    return array.sharding if isinstance(array, jax.ShapeDtypeStruct) else None


def _common_mesh(shardings: list[NamedSharding]) -> Mesh | None:
    """The mesh that all lie on, or that `jax.set_mesh` has set; None if they lie on several, or there is none."""
    meshes = {sharding.mesh for sharding in shardings}
    concrete = {mesh for mesh in meshes if not isinstance(mesh, AbstractMesh)}
    if not concrete and not (current := jax.sharding.get_mesh()).empty:
        return current
    if len(concrete) < len(meshes) and len(concrete) != 1:
        axes = next(mesh for mesh in meshes if isinstance(mesh, AbstractMesh)).shape
        raise MeshError(
            f"mesh: the model's variables lie on a mesh {dict(axes)} without devices; pass mesh=, or load inside of "
            "jax.set_mesh"
        )
    return concrete.pop() if len(concrete) == 1 else None


def _checked(name: str, mesh: Mesh, spec: P, shape: tuple[int, ...]) -> NamedSharding:
    if unknown := [str(axis) for axis in jax.tree.leaves(tuple(spec)) if axis not in mesh.shape]:
        raise MeshError(f"{name}: {some(unknown)} no axis of the mesh {dict(mesh.shape)}")
    sharding = NamedSharding(mesh, spec)
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise MeshError(
            f"{name}: shape {list(shape)} does not fit {spec} on the mesh {dict(mesh.shape)}: {error}"
        ) from None
    return sharding
