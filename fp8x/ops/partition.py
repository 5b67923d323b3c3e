"""Kernels on a mesh with Auto axes, where XLA decides how arrays lie after everything is traced.

XLA can't look into a kernel: left alone, it gathers the operands whole on every device, and each computes everything.
So it is asked how they came to lie, and told what a device does with its parts (`jax.custom_partitioning`).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array

from fp8x import meshes
from fp8x.meshes import Axes, dims_of, spec_of

Dims = tuple[Axes, ...]


def is_left_to_xla(tree: Any) -> bool:
    """Whether XLA decides how the arrays of a pytree lie over several devices."""
    return bool(meshes.axes_of_type(meshes.mesh_of(tree), AxisType.Auto))


def whole_or_nothing(tree: Any) -> str | None:
    """Why XLA can't be asked how arrays lie; None if it can, or need not be."""
    mesh = meshes.mesh_of(tree)
    kinds = [kind for kind in AxisType if meshes.axes_of_type(mesh, kind)]
    if AxisType.Auto in kinds and len(kinds) > 1:
        return "can't be split over Auto axes where others of the mesh are Manual or Explicit"
    return None


def partitioned(run: Callable, layout_of: Callable, rule: str, operands: tuple[Array | None, ...]) -> Any:
    """`run(*operands)` on every device's own part.

    Arguments:
        layout_of: a `split.Layout` from the mesh, the axes of each operand's dims, None where there is none, and those
            that XLA wants the rows of the result split over.
        rule: how dims correspond, as `custom_partitioning` has it; of the operands that are not None.
    """
    present = [index for index, operand in enumerate(operands) if operand is not None]

    def spread(values) -> list:
        values = dict(zip(present, values))
        return [values.get(index) for index in range(len(operands))]

    def partition(mesh: Mesh, arguments, result):
        rows = _dims(jax.tree.leaves(result)[0])[0]
        layout = layout_of(mesh, spread(_dims(argument) for argument in arguments), rows)
        sharding = lambda dims: NamedSharding(mesh, spec_of(dims))  # noqa: E731
        return (
            mesh,
            lambda *arrays: layout.device(*spread(arrays)),
            jax.tree.map(sharding, layout.out_dims, is_leaf=lambda node: isinstance(node, tuple)),
            tuple(sharding(layout.dims[index]) for index in present),
        )

    function = custom_partitioning(lambda *arrays: run(*spread(arrays)))
    function.def_partition(partition, sharding_rule=rule)
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def _one_after_another(axis_size, in_batched, *arrays):
        def one(mine):
            mine = iter(mine)
            return mapped(*(next(mine) if batched else array for array, batched in zip(arrays, in_batched)))

        out = jax.lax.map(one, [array for array, batched in zip(arrays, in_batched) if batched])
        return out, jax.tree.map(lambda _: True, out)

    return mapped(*(operands[index] for index in present))


def _dims(argument: jax.ShapeDtypeStruct) -> Dims:
    if argument.sharding is None:
        return ((),) * len(argument.shape)
    return dims_of(argument.sharding.spec, len(argument.shape))


def rule_of(factors: dict[int, str], operands: tuple[Array | None, ...], result: str) -> str:
    """The rule for operands of which some have named dims; those of the others belong to nothing."""
    terms = []
    for index, operand in enumerate(operands):
        if operand is not None:
            own = " ".join(f"o{index}_{dim}" for dim in range(operand.ndim))
            terms.append(factors.get(index, own))
    return f"{', '.join(terms)} -> {result}"
