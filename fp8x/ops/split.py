"""A product over the devices of a mesh: where each operand has to lie, and what one device does with its part.

`docs/sharding.md` has the rules. Rows of x, columns of w and experts are split as they lie; a K that is split ends in a
sum in float32. A mesh axis splits one dim: where two operands claim it, `Split.moves` says which is gathered.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from fp8x import meshes
from fp8x.array import ScaledArray
from fp8x.meshes import Axes, parts, spec_of
from fp8x.numerics import rounded
from fp8x.ops.groups import take_rows
from fp8x.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class Part:
    """What a device holds of an array in blocks.

    Attributes:
        scheme: the array's; its blocks are cut where a boundary between devices cuts them.
        scale_dims: over which axes each dim of the scales is split; none where blocks are cut.
        cuts: for each cut dim, itself, into how many each block is cut, how many of them a device has, and its axes.
    """

    scheme: Scheme
    scale_dims: tuple[Axes, ...]
    cuts: tuple[tuple[int, int, int, Axes], ...]

    def scale(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """On a device: the scales of its part."""
        for dim, finer, count, axes in self.cuts:
            scale = jnp.repeat(scale, finer, axis=dim)
            scale = jax.lax.dynamic_slice_in_dim(scale, jax.lax.axis_index(axes) * count, count, dim)
        return scale


def part_of(scheme: Scheme, shape: tuple[int, ...], dims: tuple[Axes, ...], mesh: AbstractMesh | Mesh) -> Part:
    """The part of an array of `shape` whose dims are split over `dims`, which divide them."""
    block, lead, scale_dims, cuts = list(scheme.block), len(shape) - len(scheme.block), [], []
    for dim, (size, axes, extent) in enumerate(zip(shape, dims, scheme.block_of(shape))):
        own = size // parts(mesh, axes)
        is_whole = dim >= lead and scheme.block[dim - lead] is None
        if axes and not is_whole and own % extent:
            finer = math.gcd(own, extent)
            cuts.append((dim, extent // finer, own // finer, axes))
            block[dim - lead] = finer
            axes = ()
        scale_dims.append(() if is_whole else axes)
    return Part(dataclasses.replace(scheme, block=tuple(block)), tuple(scale_dims), tuple(cuts))


@dataclasses.dataclass(frozen=True)
class Split:
    """Over which axes of a mesh each dim of a product is split.

    Attributes:
        rows, experts, columns, depth: of M, E, N and K.
        scattered: axes of `experts` along which rows of the result lie, which x's are gathered for.
        x_dims: how x came, for its gradient.
        moves: what does not stay as it lies, with the reason.
    """

    mesh: AbstractMesh | Mesh
    rows: Axes
    experts: Axes
    columns: Axes
    depth: Axes
    scattered: Axes
    x_dims: tuple[Axes, ...]
    moves: tuple[str, ...]

    def __str__(self) -> str:
        dims = {"rows": self.rows, "experts": self.experts, "columns": self.columns, "K": self.depth}
        split = [f"{name} over {', '.join(axes)}" for name, axes in dims.items() if axes]
        return "; ".join([f"a device's part: {', '.join(split) or 'all'}", *self.moves])

    def local(self, call):
        """The `dispatch.Call` or `gated.GatedCall` of one device."""
        count = {name: parts(self.mesh, getattr(self, name)) for name in ("rows", "experts", "columns", "depth")}
        x = call.x
        if isinstance(x, Scheme):
            x = part_of(x, (call.m, call.k), (self.rows, self.depth), self.mesh).scheme
        w_shape, w_dims = self.weight(call)
        return dataclasses.replace(
            call,
            m=call.m // count["rows"],
            n=call.n // count["columns"],
            k=call.k // count["depth"],
            groups=call.groups // count["experts"],
            x=x,
            w=part_of(call.w, w_shape, w_dims, self.mesh).scheme,
            out_dtype=jnp.dtype(jnp.float32) if self.depth else call.out_dtype,
        )

    def unfused(self, call) -> str | None:
        """Why no device can quantize its part of a `gated_matmul` by itself; None if each can."""
        if self.depth or self.experts:
            return "quantizes a whole sum, of which a device has a part here"
        out = part_of(call.out, (call.m, call.n), (self.rows, self.columns), self.mesh)
        if out.cuts or (self.columns and call.out.block[-1] is None and not call.has_scale):
            return "finds a scale on one device; here it reaches over several"
        return None

    def weight(self, call) -> tuple[tuple[int, ...], tuple[Axes, ...]]:
        """The shape of w, and over which axes its dims are split."""
        shape, dims = (call.n, call.k), (self.columns, self.depth)
        if call.op == "gated_matmul":
            shape, dims = (2, *shape), ((), *dims)
        return (shape, dims) if call.op == "matmul" else ((call.groups, *shape), (self.experts, *dims))


def split_product(call, x_dims: tuple[Axes, ...], rows: Axes, w_dims: tuple[Axes, ...], mesh) -> Split:
    """How a product is split whose operands lie so.

    Arguments:
        call: the `dispatch.Call` or `gated.GatedCall` of the whole product.
        x_dims: the axes of each dim of x.
        rows: those of the product's rows: of x's, or of the indices that take them.
        w_dims: those of w's dims.
    """
    moves: list[str] = []

    def even(axes: Axes, size: int) -> Axes:
        return axes if axes and size and size % parts(mesh, axes) == 0 else ()

    def gather(axes: Axes, kept: Axes, why: str) -> Axes:
        if gone := [axis for axis in axes if axis not in kept]:
            moves.append(f"w is gathered over {', '.join(gone)}: {why}")
        return kept

    def apart(axes: Axes, *others: Axes) -> Axes:
        return tuple(axis for axis in axes if not any(axis in other for other in others))

    w_experts = () if call.op == "matmul" else w_dims[0]
    experts = gather(w_experts, even(w_experts, call.groups), "its experts are no multiple")
    block = (1, *call.x.block)[-2] if isinstance(call.x, Scheme) else 1
    if block not in (1, None):
        experts = gather(experts, (), f"rows of x, in blocks of {block}, can't go to their experts")
    rows = even(rows, call.m)
    shared = tuple(axis for axis in rows if axis in experts)
    scattered = shared if rows[len(rows) - len(shared) :] == shared else ()
    rows = apart(rows, experts)

    columns = even(w_dims[-2], call.n)
    columns = gather(w_dims[-2], apart(columns, rows, experts), "rows of x lie there, or it does not divide them")
    depth = even(w_dims[-1] or x_dims[-1], call.k)
    depth = apart(depth, rows, experts, columns)
    own = call.k // parts(mesh, depth)
    blocks = [scheme.block[-1] for scheme in (call.x, call.w) if isinstance(scheme, Scheme)]
    if cut := [block for block in blocks if block is not None and own % block]:
        depth, why = (), f"blocks of {cut[0]} would lie on two devices"
    else:
        why = "rows of x lie there, or it does not divide K"
    gather(w_dims[-1], tuple(axis for axis in w_dims[-1] if axis in depth), why)
    return Split(mesh, rows, experts, columns, depth, scattered, x_dims, tuple(moves))


def plan(call, x: Array | ScaledArray, rows: Array | None, w: ScaledArray) -> Split | None:
    """The split of a product on an Explicit mesh; None on others."""
    mesh = meshes.explicit_mesh((x, rows, w))
    if mesh is None:
        return None
    x_dims = meshes.explicit_dims(x.data if isinstance(x, ScaledArray) else x)
    of_rows = x_dims[0] if rows is None else meshes.explicit_dims(rows)[0]
    return split_product(call, x_dims, of_rows, meshes.explicit_dims(w.data), mesh)


def is_split(x: Array, dim: int) -> bool:
    """Whether a dim of an array lies on several devices of an Explicit mesh."""
    return bool(meshes.explicit_dims(x)[dim])


@dataclasses.dataclass(frozen=True)
class RowSplit:
    """Over which axes of a mesh the rows and K of what is quantized are split.

    Attributes:
        reaches: axes over which a scale reaches: no device can find it by itself.
    """

    mesh: AbstractMesh | Mesh
    rows: Axes
    depth: Axes
    reaches: Axes

    def local(self, call):
        """The `QuantizeCall` of one device."""
        scheme = part_of(call.scheme, (call.m, call.k), (self.rows, self.depth), self.mesh).scheme
        m, k = call.m // parts(self.mesh, self.rows), call.k // parts(self.mesh, self.depth)
        return dataclasses.replace(call, m=m, k=k, scheme=scheme)


def split_rows(call, dims: tuple[Axes, ...], mesh) -> RowSplit:
    """How what a `QuantizeCall` says is split, of an x that lies so."""
    rows, depth = dims[0], dims[-1]
    if call.m % parts(mesh, rows) or not ((1, *call.scheme.block)[-2] == 1 or call.has_scale):
        rows = ()
    block, own = call.scheme.block[-1], call.k / parts(mesh, depth)
    if not (own % block == 0 if block is not None else call.has_scale and own == int(own)):
        depth = ()
    return RowSplit(mesh, rows, depth, tuple(axis for axis in (*dims[0], *dims[-1]) if axis not in (*rows, *depth)))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The operands of a split product as arrays: how each lies, and what a device does with its own.

    Attributes:
        dims: of data and scale of x, data and scale of w, groups and bias; None where there is none.
        out_dims: of what comes out.
        device: takes a device's parts, as in `dims`.
    """

    dims: tuple[tuple[Axes, ...] | None, ...]
    out_dims: Any
    device: Callable


def flat(x: Array | ScaledArray, w: ScaledArray, groups: Array | None, bias: Array | None) -> tuple[Array | None, ...]:
    """The arrays of `Layout.dims`."""
    data, scale = (x.data, x.scale) if isinstance(x, ScaledArray) else (x, None)
    return data, scale, w.data, w.scale, groups, bias


def layout(split: Split, call, run: Callable) -> Layout:
    """How a product `run(x, w, groups, bias, out_dtype)`, `matmul`, `grouped_matmul` or `expert_matmul`, is split."""
    w_shape, w_dims = split.weight(call)
    of_w = part_of(call.w, w_shape, w_dims, split.mesh)
    of_x = None
    if isinstance(call.x, Scheme):
        of_x = part_of(call.x, (call.m, call.k), (split.rows, split.depth), split.mesh)
    of_groups = {"matmul": None, "expert_matmul": (split.rows,)}.get(call.op, ((),))
    dims = (
        (split.rows, split.depth),
        None if of_x is None else of_x.scale_dims,
        w_dims,
        of_w.scale_dims,
        of_groups,
        w_dims[:-1] if call.bias else None,
    )
    own = split.local(call)

    def device(x, x_scale, w, w_scale, groups, bias):
        if of_x is not None:
            x = ScaledArray(x, of_x.scale(x_scale), of_x.scheme)
        w = ScaledArray(w, of_w.scale(w_scale), of_w.scheme)
        if bias is not None and split.depth:
            bias = jnp.where(jax.lax.axis_index(split.depth) == 0, bias, 0)
        if call.op == "matmul":
            y = run(x, w, bias, own.out_dtype)
        elif call.op == "expert_matmul":
            y = run(x, w, _own_experts(groups, own.groups, split), bias, own.out_dtype)
        else:
            y = _run_groups(run, x, w, groups, bias, own, split)
        if summed := (*split.depth, *(axis for axis in split.experts if axis not in split.scattered)):
            y = jax.lax.psum(y, summed)
        if split.scattered:
            y = jax.lax.psum_scatter(y, split.scattered, scatter_dimension=0, tiled=True)
        return rounded(y.astype(call.out_dtype))

    return Layout(dims, ((*split.rows, *split.scattered), split.columns), device)


def gated_layout(split: Split, call, run: Callable) -> Layout:
    """How `run(x, w, group_sizes, bias, out_dtype, gate, scheme, scale)` is split, a `gated_matmul` whose K and experts
    are not; of what `layout` is, and the scale of what comes out."""
    of_product = layout(split, call, run)
    of_x = part_of(call.x, (call.m, call.k), (split.rows, ()), split.mesh)  # 8 bits: fused kernels read no other
    of_w = part_of(call.w, *split.weight(call), split.mesh)
    out = part_of(call.out, (call.m, call.n), (split.rows, split.columns), split.mesh)
    own, given = split.local(call), None
    if call.has_scale:
        given = part_of(call.out, (1, call.n), ((), split.columns), split.mesh).scale_dims

    def device(x, x_scale, w, w_scale, groups, bias, out_scale):
        x = ScaledArray(x, of_x.scale(x_scale), of_x.scheme)
        w = ScaledArray(w, of_w.scale(w_scale), of_w.scheme)
        sizes = own_groups(groups, own.m, split)
        h = run(x, w, sizes, bias, call.out_dtype, call.gate, out.scheme, out_scale)
        return [h.data, h.scale]

    dims = [(split.rows, split.columns), given or out.scale_dims]
    return Layout((*of_product.dims, given), dims, device)


def _own_experts(experts: Int[Array, " r"], count: int, split: Split) -> Int[Array, " r"]:
    """Each row's expert among those of a device; `count` for one that is elsewhere."""
    if not split.experts:
        return experts
    experts = experts - count * jax.lax.axis_index(split.experts)
    return jnp.where((experts >= 0) & (experts < count), experts, count)


def own_groups(group_sizes: Int[Array, " e"], m: int, split: Split) -> Int[Array, " e"]:
    """How many of each group's rows are among the `m` of a device."""
    if not split.rows:
        return group_sizes
    ends = jnp.cumsum(group_sizes) - m * jax.lax.axis_index(split.rows)
    return jnp.clip(ends, 0, m) - jnp.clip(ends - group_sizes, 0, m)


def _run_groups(run: Callable, x, w, group_sizes, bias, own, split: Split) -> Float[Array, "m n"]:
    """A grouped product of the rows and experts of a device, zero for rows of others."""
    group_sizes = own_groups(group_sizes, own.m, split)
    if not split.experts:
        return run(x, w, group_sizes, bias, own.out_dtype)
    # The rows of the first expert here come first, and those before it last, past the groups.
    first = own.groups * jax.lax.axis_index(split.experts)
    before = jnp.sum(jnp.where(jnp.arange(group_sizes.shape[0]) < first, group_sizes, 0))
    row = jnp.arange(own.m)
    x = take_rows(x, (row + before) % max(own.m, 1))
    y = run(x, w, jax.lax.dynamic_slice_in_dim(group_sizes, first, own.groups), bias, own.out_dtype)
    return jnp.take(y, (row - before) % max(own.m, 1), axis=0)


def rows_layout(split: RowSplit, call, run: Callable) -> Layout:
    """How `run(x, scheme, scale, used, gate)` is split, what quantizes; of x, scale and used."""
    scheme = part_of(call.scheme, (call.m, call.k), (split.rows, split.depth), split.mesh)
    m = call.m // parts(split.mesh, split.rows)
    given = part_of(call.scheme, (1, call.k), ((), split.depth), split.mesh).scale_dims if call.has_scale else None
    x_dims = (split.rows, split.depth) if call.gate is None else (split.rows, (), split.depth)

    def device(x, scale, used):
        if used is not None and split.rows:
            used = jnp.clip(used - m * jax.lax.axis_index(split.rows), 0, m)
        q = run(x, scheme.scheme, scale, used, call.gate)
        return [q.data, q.scale]

    out = [(split.rows, split.depth), given or scheme.scale_dims]
    return Layout((x_dims, given, ()), out, device)


def on_explicit_mesh(layout: Layout, mesh: AbstractMesh, operands: tuple[Array | None, ...]) -> Any:
    """Runs a split product, which is traced already, on the mesh whose axes its types name."""
    present = [index for index, operand in enumerate(operands) if operand is not None]
    specs = tuple(spec_of(layout.dims[index]) for index in present)
    arrays = [jax.sharding.reshard(operands[index], NamedSharding(mesh, spec)) for index, spec in zip(present, specs)]

    def device(*arrays):
        given = dict(zip(present, arrays))
        return layout.device(*(given.get(index) for index in range(len(operands))))

    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=specs,
        out_specs=jax.tree.map(spec_of, layout.out_dims, is_leaf=lambda node: isinstance(node, tuple)),
        axis_names=set(meshes.axes_of_type(mesh, AxisType.Explicit)),
        check_vma=False,  # kernels know of no mesh
    )(*arrays)
