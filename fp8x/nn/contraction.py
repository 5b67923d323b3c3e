"""`LinearGeneral` and `Einsum` in 8 bits: any axes of an input by those of a kernel, as one product of matrices."""

import dataclasses
import math
import re
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Self

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fp8x import meshes, numerics, ops
from fp8x.array import ScaledArray
from fp8x.errors import ShapeError
from fp8x.nn.quantized import QuantizedLayer, initial_weight, names_layer, place, weight_scheme
from fp8x.recipe import Recipe, as_recipe

Labels = Sequence[Hashable]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What each dim of a kernel is to the product, and its size. The weight is `[N, K]`, or `[B, N, K]` with a batch.

    Attributes:
        shape: of one layer's kernel.
        batch: dims that input and output have, too: a matrix for each (heads, experts).
        contracted: dims that the input has: together K.
        features: dims that the output has: together N.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    contracted: tuple[int, ...]
    features: tuple[int, ...]

    def sizes(self, dims: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.shape[dim] for dim in dims)

    @property
    def matrix(self) -> tuple[int, ...]:
        """The weight's shape."""
        batch, n, k = (math.prod(self.sizes(dims)) for dims in (self.batch, self.features, self.contracted))
        return (batch, n, k) if self.batch else (n, k)

    @property
    def roles(self) -> tuple[tuple[int, ...], ...]:
        """Batch, features and contracted dims."""
        return self.batch, self.features, self.contracted

    @property
    def merged(self) -> tuple[tuple[int, ...], ...]:
        """The dims of the kernel that each dim of the weight was merged from."""
        return self.roles if self.batch else self.roles[1:]

    def check(self, kernel: nnx.Variable, recipe: Recipe, name: str) -> None:
        """Raises a ShapeError for a kernel of another shape, or of one that the recipe's blocks don't fit."""
        if kernel.shape[kernel.ndim - len(self.shape) :] != self.shape:
            raise ShapeError(
                f"{name}: shape is {kernel.shape}; use {self.shape}, or a stack of these along leading axes"
            )
        weight_scheme(recipe, len(self.matrix)).check_shape(self.matrix, name)

    def to_weight(self, kernel: Float[Array, "..."]) -> Float[Array, "..."]:
        """A kernel, or a stack of them, K-major."""
        lead = kernel.ndim - len(self.shape)
        order = [*range(lead), *(lead + dim for dims in self.merged for dim in dims)]
        return kernel.transpose(order).reshape(*kernel.shape[:lead], *self.matrix)

    def from_weight(self, weight: Float[Array, "..."]) -> Float[Array, "..."]:
        """What `to_weight` was given."""
        lead, order = weight.ndim - len(self.matrix), [dim for dims in self.merged for dim in dims]
        split = weight.reshape(*weight.shape[:lead], *self.sizes(order))
        return split.transpose(*range(lead), *(lead + order.index(dim) for dim in range(len(order))))


def multiply(
    x: Float[Array, "... k"], weight: ScaledArray, group_sizes: Int[np.ndarray, " b"] | None, **options
) -> Float[Array, "... n"]:
    """The product by a weight `[N, K]`, or by `[B, N, K]` where there are group sizes."""
    if group_sizes is None:
        return ops.matmul(x, weight, **options)
    return ops.grouped_matmul(x, weight, group_sizes, **options)


def contract(
    x: Float[Array, "..."],
    kernel: Kernel,
    labels: tuple[Labels, Labels, Labels],
    multiply: Callable[[Array, np.ndarray | None], Array],
    described: str,
) -> Float[Array, "..."]:
    """A contraction as one product of matrices.

    Arguments:
        x: the input.
        kernel: what the weight was.
        labels: of each dim of the input, the kernel and the output.
        multiply: of rows `[..., K]` the product by the weight; where the kernel has a batch, of rows `[M, K]` sorted
            by it, and how many each of its matrices has.
        described: the layer, for errors.

    Raises:
        ShapeError: `x` does not fit the kernel.
    """
    of_x, of_kernel, of_y = labels
    sizes = dict(zip(of_x, x.shape))
    batch, features, contracted = ([of_kernel[dim] for dim in dims] for dims in kernel.roles)
    if any(sizes[label] != kernel.shape[dim] for dim, label in enumerate(of_kernel) if label in sizes):
        raise ShapeError(f"x: shape {x.shape} does not fit the kernel {kernel.shape} of {described}")
    rows = [label for label in of_x if label not in of_kernel]
    x = x.transpose([list(of_x).index(label) for label in (*batch, *rows, *contracted)])
    above = len(batch) + len(rows)
    like = meshes.explicit_dims(x)[:above]
    lead = x.shape[:above]
    if batch:
        x = meshes.merge_dims(x, (above, len(contracted)))
        y = multiply(x, np.full(kernel.matrix[0], x.shape[0] // kernel.matrix[0], np.int32))
        y = meshes.split_dims(y, [lead, kernel.sizes(kernel.features)], like)
    else:
        y = multiply(meshes.merge_dims(x, (*[1] * above, len(contracted))), None)
        y = meshes.split_dims(y, [*((size,) for size in lead), kernel.sizes(kernel.features)], like)
    of_product = [*batch, *rows, *features]
    return y.transpose([of_product.index(label) for label in of_y])


class Contraction(QuantizedLayer):
    """What `LinearGeneral` and `Einsum` share: a weight that was a kernel of any rank.

    Attributes:
        kernel: what its dims were.
        bias: `[N]`, or `[B, N]`.
    """

    kernel: Kernel

    def _begin(self, kernel: Kernel, recipe: Recipe, use_bias: bool, rngs: nnx.Rngs) -> None:
        self.kernel, self.rank = kernel, len(kernel.matrix)
        bias = jnp.zeros(kernel.matrix[:-1], recipe.out_dtype) if use_bias else None
        self.hold(initial_weight(rngs, kernel.matrix, weight_scheme(recipe, self.rank)), recipe, bias)

    def _quantize(
        self, source: nnx.Module, bias: Array | None, recipe: Recipe, name: str, allow_nonfinite: bool
    ) -> None:
        scheme = weight_scheme(recipe, self.rank)
        weight = numerics.quantize_weight(
            source.kernel[...], scheme, name=name, allow_nonfinite=allow_nonfinite, to_weight=self.kernel.to_weight
        )
        self.hold(weight, recipe, bias)

    def _keep_sharding(
        self, kernel: nnx.Variable, bias: nnx.Variable | None, bias_dims: Sequence[Sequence[int]]
    ) -> None:
        lead = kernel.ndim - len(self.kernel.shape)
        first = [[dim] for dim in range(lead)]
        dims, bias_dims = (
            [*first, *([lead + dim for dim in merged] for merged in each)] for each in (self.kernel.merged, bias_dims)
        )
        self.keep_sharding(kernel, bias, dims, bias_dims)

    def source_matrix(self) -> Float[Array, "..."]:
        return self.kernel.from_weight(super().source_matrix())

    def _multiply(self, x: Float[Array, "... k"], group_sizes: Int[np.ndarray, " b"] | None) -> Float[Array, "... n"]:
        bias = None if self.bias is None else self.bias[...]
        options = dict(bias=bias, out_dtype=self.recipe.out_dtype, **self._activation(x, group_sizes))
        return multiply(x, self.quantized_weight, group_sizes, **options)

    @property
    def described(self) -> str:
        """The layer, for errors."""
        raise NotImplementedError


class LinearGeneral(Contraction):
    """`nnx.LinearGeneral` in 8 bits: several axes of the input against several features.

    Arguments:
        in_features, out_features: sizes; a tuple for several axes.
        axis: the input's axes that are contracted, as many as `in_features`.
        batch_axis: leading axes that input, kernel and output share, and their sizes: a matrix for each index.
        recipe: a `Recipe` or its code; its blocks lie over the matrix `[N, K]` that the kernel makes, N and K the
            products of `out_features` and `in_features`.
        use_bias: whether a bias is added, of the recipe's output type.
        rngs: the stream `params` initializes the weight.

    Raises:
        ShapeError: sizes that the recipe's blocks do not fit (MX: K a multiple of 32).
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        axis: int | Sequence[int] = -1,
        batch_axis: Mapping[int, int] = types.MappingProxyType({}),
        recipe: Recipe | str,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        # Flax's own constructor checks the arguments, and says what it makes of them.
        source = nnx.eval_shape(
            lambda: nnx.LinearGeneral(in_features, out_features, axis=axis, batch_axis=batch_axis, rngs=nnx.Rngs(0))
        )
        self.axis, self.batch_axis = source.axis, tuple(source.batch_axis)
        self._begin(_general_kernel(source), as_recipe(recipe), use_bias, rngs)

    @classmethod
    def from_linear_general(
        cls, source: nnx.LinearGeneral, recipe: Recipe | str, *, name: str = "kernel", allow_nonfinite: bool = False
    ) -> Self:
        """Quantizes an `nnx.LinearGeneral`, or a stack of them. `name` stands in errors.

        Raises:
            ShapeError: sizes that the recipe's blocks do not fit, or NaN or Inf in the kernel.
        """
        recipe = as_recipe(recipe)
        check_linear_general(source, recipe, name)
        options = dict(axis=source.axis, batch_axis=source.batch_axis, use_bias=False, recipe=recipe)
        layer = nnx.eval_shape(lambda: cls(source.in_features, source.out_features, **options, rngs=nnx.Rngs(0)))
        bias = None if source.bias is None else source.bias[...]
        if bias is not None:
            lead = source.bias.ndim - len(source.batch_axis) - len(source.out_features)
            bias = bias.reshape(*bias.shape[:lead], *layer.kernel.matrix[:-1])
        layer._quantize(source, bias, recipe, name, allow_nonfinite)
        batch, features = len(source.batch_axis), len(source.out_features)
        of_bias = ([range(batch)] if batch else []) + [range(batch, batch + features)]
        layer._keep_sharding(source.kernel, source.bias, of_bias)
        return layer

    @property
    def described(self) -> str:
        return f"LinearGeneral over axes {self.axis}"

    @names_layer
    def __call__(self, x: Float[Array, "..."], out_sharding=None) -> Float[Array, "..."]:
        """The batch axes, the other axes of `x` in order, then the features; of the recipe's output type.

        Raises:
            ShapeError: `x` does not fit the kernel, or the layer is a stack.
            CalibrationError: a static activation scale is not calibrated; see `check_calibrated`.
        """
        x = self.begin_call(x)
        labels = general_labels(x.ndim, self.axis, self.batch_axis, len(self.kernel.features))
        return place(contract(x, self.kernel, labels, self._multiply, self.described), out_sharding)


def check_linear_general(source: nnx.LinearGeneral, recipe: Recipe, name: str) -> None:
    """Raises what `LinearGeneral.from_linear_general` does, but for NaN and Inf."""
    _general_kernel(source).check(source.kernel, recipe, name)


def _general_kernel(source: nnx.LinearGeneral) -> Kernel:
    shape = (*source.batch_axis.values(), *source.in_features, *source.out_features)
    return general_kernel(shape, len(source.batch_axis), len(source.out_features))


def general_kernel(shape: Sequence[int], batch: int, features: int) -> Kernel:
    """A kernel with so many dims of a batch first and so many features last; those between are contracted."""
    dims, contracted = tuple(range(len(shape))), len(shape) - features
    return Kernel(tuple(shape), dims[:batch], dims[batch:contracted], dims[contracted:])


def general_labels(
    ndim: int, axis: Sequence[int], batch_axis: Sequence[int], features: int
) -> tuple[Labels, Labels, Labels]:
    """A label for each dim of an input of `ndim` dims, of such a kernel, and of the output."""
    axis, batch = (sorted(range(ndim)[dim] for dim in axes) for axes in (axis, batch_axis))
    of_features = [f"feature {i}" for i in range(features)]
    rows = [dim for dim in range(ndim) if dim not in axis and dim not in batch]
    return range(ndim), [*batch, *axis, *of_features], [*batch, *rows, *of_features]


class Einsum(Contraction):
    """`nnx.Einsum` in 8 bits: an equation of an input and a kernel that is a product of matrices.

    Arguments:
        einsum_str: the equation, such as `"btd,dnh->btnh"`; an ellipsis may stand in input and output. Dims of the
            kernel that both have are a batch of matrices, those that only the input has are contracted (K), and
            those that only the output has are features (N).
        kernel_shape: of the kernel.
        bias_shape: of the bias, in the order of the output; None for none.
        recipe: a `Recipe` or its code; its blocks lie over the matrices `[N, K]` that the kernel makes.
        rngs: the stream `params` initializes the weight.

    Raises:
        ShapeError: an equation that is no product of matrices, or sizes that the recipe's blocks do not fit.
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        recipe: Recipe | str,
        rngs: nnx.Rngs,
    ):
        if reason := equation_fault(einsum_str, len(kernel_shape)):
            raise ShapeError(f"einsum_str: {einsum_str!r} {reason}")
        self.einsum_str = einsum_str.replace(" ", "")
        self._begin(einsum_kernel(self.einsum_str, kernel_shape), as_recipe(recipe), bias_shape is not None, rngs)

    @classmethod
    def from_einsum(
        cls, source: nnx.Einsum, recipe: Recipe | str, *, name: str = "kernel", allow_nonfinite: bool = False
    ) -> Self:
        """Quantizes an `nnx.Einsum`, or a stack of them. `name` stands in errors.

        Raises:
            ShapeError: an equation that is no product of matrices, sizes that the recipe's blocks do not fit, or NaN or
                Inf in the kernel.
        """
        recipe = as_recipe(recipe)
        check_einsum(source, recipe, name)
        kernel = einsum_kernel(source.einsum_str, source.kernel_shape)
        layer = nnx.eval_shape(lambda: cls(source.einsum_str, kernel.shape, recipe=recipe, rngs=nnx.Rngs(0)))
        bias, of_bias = None, []
        if source.bias is not None:
            stack = source.bias.shape[: source.kernel.ndim - len(kernel.shape)]
            bias = einsum_bias(source.bias[...], source.einsum_str, kernel, stack)
            _, of_kernel, of_y = _terms(source.einsum_str)
            in_order = [label for label in of_y if label in of_kernel]
            of_bias = [[in_order.index(of_kernel[dim]) for dim in dims] for dims in (kernel.batch, kernel.features)]
            of_bias = of_bias if kernel.batch else of_bias[1:]
        layer._quantize(source, bias, recipe, name, allow_nonfinite)
        layer._keep_sharding(source.kernel, source.bias, of_bias)
        return layer

    @property
    def described(self) -> str:
        return f"Einsum {self.einsum_str!r}"

    @names_layer
    def __call__(self, x: Float[Array, "..."], einsum_str: str | None = None, out_sharding=None) -> Float[Array, "..."]:
        """What the equation says, of the recipe's output type.

        Raises:
            ShapeError: `x` does not fit the kernel, `einsum_str` is another equation, or the layer is a stack.
            CalibrationError: a static activation scale is not calibrated; see `check_calibrated`.
        """
        if einsum_str is not None and einsum_str.replace(" ", "") != self.einsum_str:
            raise ShapeError(f"einsum_str: {einsum_str!r} is not the equation that was quantized, {self.einsum_str!r}")
        x = self.begin_call(x)
        if (labels := einsum_labels(self.einsum_str, x.ndim)) is None:
            raise ShapeError(f"x: shape {x.shape} does not fit the kernel {self.kernel.shape} of {self.described}")
        return place(contract(x, self.kernel, labels, self._multiply, self.described), out_sharding)


def check_einsum(source: nnx.Einsum, recipe: Recipe, name: str) -> None:
    """Raises what `Einsum.from_einsum` does, but for NaN and Inf."""
    if reason := einsum_fault(source):
        raise ShapeError(f"{name}: {reason}")
    einsum_kernel(source.einsum_str, source.kernel_shape).check(source.kernel, recipe, name)


def einsum_fault(source: nnx.Einsum) -> str | None:
    """Why an `nnx.Einsum` can't be quantized."""
    if source.einsum_str is None:
        return "its equation is given at the call"
    reason = equation_fault(source.einsum_str, len(source.kernel_shape))
    return None if reason is None else f"its equation {source.einsum_str!r} {reason}"


def equation_fault(equation: str, rank: int) -> str | None:
    """Why an equation of an input and a kernel of `rank` dims is no product of matrices."""
    of_x, of_kernel, of_y = _terms(equation.replace(" ", ""))
    if Ellipsis in of_kernel:
        return "has an ellipsis in the kernel"
    if len(of_kernel) != rank:
        return f"names {len(of_kernel)} dims of the kernel, which has {rank}"
    if any(len(set(labels)) < len(labels) for labels in (of_x, of_kernel, of_y)):
        return "takes a diagonal"
    if alone := [label for label in of_x if label not in of_kernel and label not in of_y]:
        return f"sums the input over {alone[0]!r} alone" if alone[0] is not Ellipsis else "sums over an ellipsis"
    if alone := [label for label in of_kernel if label not in of_x and label not in of_y]:
        return f"sums the kernel over {alone[0]!r} alone"
    if unknown := [label for label in of_y if label not in of_x and label not in of_kernel]:
        return f"has {unknown[0]!r} in the output alone"
    if not any(label in of_x and label not in of_y for label in of_kernel):
        return "contracts no dim of the kernel"
    if not any(label not in of_x for label in of_kernel):
        return "multiplies vectors: no dim of the kernel is in the output alone"
    return None


def _terms(equation: str) -> tuple[list[Hashable], list[Hashable], list[Hashable]]:
    """The labels of input, kernel and output; an ellipsis is one."""
    operands, result = equation.split("->")
    of_x, of_kernel = operands.split(",")
    return tuple(
        [Ellipsis if part == "..." else part for part in re.findall(r"\.\.\.|.", term)]
        for term in (of_x, of_kernel, result)
    )


def einsum_labels(equation: str, ndim: int) -> tuple[Labels, Labels, Labels] | None:
    """A label for each dim of an input of `ndim` dims, the kernel and the output; None if the input has others."""
    of_x, of_kernel, of_y = _terms(equation.replace(" ", ""))
    spare = ndim - sum(label is not Ellipsis for label in of_x)
    if spare < 0 or (spare and Ellipsis not in of_x):
        return None
    return _without_ellipsis(of_x, spare), of_kernel, _without_ellipsis(of_y, spare)


def einsum_bias(
    bias: Float[Array, "..."], equation: str, kernel: Kernel, stack: tuple[int, ...] = ()
) -> Float[Array, "..."]:
    """The bias of an einsum, or of a stack of them, `[N]` or `[B, N]`.

    It comes in the order of the output, and the weight's rows lie in that of the kernel.
    """
    _, of_kernel, of_y = _terms(equation.replace(" ", ""))
    in_order = [label for label in of_y if label in of_kernel]
    wanted = [of_kernel[dim] for dim in (*kernel.batch, *kernel.features)]
    bias = bias.reshape(*stack, *(kernel.shape[of_kernel.index(label)] for label in in_order))
    bias = bias.transpose(*range(len(stack)), *(len(stack) + in_order.index(label) for label in wanted))
    return bias.reshape(*stack, *kernel.matrix[:-1])


def _without_ellipsis(labels: Sequence[Hashable], count: int) -> list[Hashable]:
    """Labels with so many numbers in place of the ellipsis."""
    return [each for label in labels for each in (range(count) if label is Ellipsis else [label])]


def einsum_kernel(equation: str, shape: Sequence[int]) -> Kernel:
    """What the dims of the kernel of an equation are."""
    of_x, of_kernel, of_y = _terms(equation.replace(" ", ""))
    roles = [(label in of_x, label in of_y) for label in of_kernel]
    batch, contracted, features = (
        tuple(dim for dim, each in enumerate(roles) if each == role)
        for role in [(True, True), (True, False), (False, True)]
    )
    return Kernel(tuple(shape), batch, contracted, features)
