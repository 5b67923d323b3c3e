"""One grouped or dense product on random operands: right or not, then how fast, beside its floor."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fp8x import numerics, ops
from fp8x.array import ScaledArray
from fp8x.benchmark.hardware import H200, Floor
from fp8x.benchmark.timing import Timing, chained, sets_needed, time_queue
from fp8x.pallas import tuning
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme

CHECKED_ROWS = 1024  # of a result; all where there are no more


@dataclasses.dataclass(frozen=True)
class Shape:
    """`[m, k] x [experts, n, k]`; a dense product for a single expert.

    Attributes:
        tokens: rows before routing.
        top_k: experts that each token draws; None gives each expert as many rows as the others.
    """

    tokens: int
    n: int
    k: int
    experts: int = 1
    top_k: int | None = None

    @property
    def m(self) -> int:
        return self.tokens * (self.top_k or 1)

    def group_sizes(self, seed: int) -> Int[np.ndarray, " e"]:
        if self.top_k is None:
            return np.diff(np.arange(self.experts + 1) * self.m // self.experts).astype(np.int32)
        scores = np.random.default_rng(seed).random((self.tokens, self.experts))
        drawn = scores.argsort(axis=1)[:, : self.top_k]
        return np.bincount(drawn.ravel(), minlength=self.experts).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Operands:
    """Arguments of an op.

    Attributes:
        x: in the recipe's 16 bits, or quantized already.
        w: `[n, k]` for a single expert, else `[experts, n, k]`.
        scale: the activation scale of a static recipe; None if there is none, or x has it already.
    """

    x: Float[Array, "m k"] | ScaledArray
    w: ScaledArray
    group_sizes: Int[Array, " e"]
    scale: Float[Array, "..."] | None

    @property
    def arguments(self) -> tuple:
        return self.x, self.w, self.group_sizes, self.scale


def operands(shape: Shape, recipe: Recipe, seed: int, *, quantized: bool = False) -> Operands:
    """Random ones: normal values of w with scales of any size, and of x with columns of any size.

    Arguments:
        quantized: x comes as the recipe stores it.
    """
    of_x, of_w, of_scale = jax.random.split(jax.random.key(seed), 3)
    x = _random_rows(shape.m, shape.k, recipe.out_dtype, of_x)
    matrices = (shape.n, shape.k) if shape.experts == 1 else (shape.experts, shape.n, shape.k)
    scales = _random_scales(recipe.weight.scale_shape(matrices), shape.k, recipe.weight.is_mx, of_scale)
    w = ScaledArray(_random_codes(matrices, recipe.weight, of_w), scales, recipe.weight)
    scale = None
    if recipe.is_static or quantized:
        scale = _scale_of(x, recipe.activation)
    if quantized:
        x = _quantize(x, scale, recipe.activation)
    return Operands(x, w, jnp.asarray(shape.group_sizes(seed)), scale if recipe.is_static and not quantized else None)


# Each is compiled by itself, so that forms of one shape share what they can.
@jax.jit(static_argnums=(0, 1, 2))
def _random_rows(m: int, k: int, dtype, key):
    columns, values = jax.random.split(key)
    return (jax.random.normal(values, (m, k)) * jnp.exp(jax.random.normal(columns, (k,)))).astype(dtype)


@jax.jit(static_argnums=(0, 1))
def _random_codes(shape: tuple[int, ...], scheme: Scheme, key):
    return jnp.clip(scheme.max / 4 * jax.random.normal(key, shape), -scheme.max, scheme.max).astype(scheme.dtype)


@jax.jit(static_argnums=(0, 1, 2))
def _random_scales(shape: tuple[int, ...], k: int, e8m0: bool, key):
    scales = jnp.exp2(jax.random.randint(key, shape, -10, -5).astype(jnp.float32)) * 2.0 ** -round(math.log2(k) / 2)
    return scales.astype(jnp.float8_e8m0fnu) if e8m0 else scales * jax.random.uniform(key, shape, minval=1, maxval=2)


_scale_of = jax.jit(lambda x, scheme: numerics.quantize(x, scheme).scale, static_argnums=1)
_quantize = jax.jit(numerics.quantize_with_scale, static_argnums=2)


def product(shape: Shape, recipe: Recipe, *, quantized: bool = False) -> Callable:
    """The op as a function of `Operands.arguments`."""
    options = dict(activation=None if quantized else recipe.activation, out_dtype=recipe.out_dtype)

    def run(x, w, group_sizes, scale):
        if shape.experts == 1:
            return ops.matmul(x, w, activation_scale=scale, **options)
        return ops.grouped_matmul(x, w, group_sizes, activation_scale=scale, **options)

    return run


def floor(shape: Shape, recipe: Recipe, group_sizes, *, quantized: bool = False) -> Floor:
    """The least that a product is: x, y and the matrices of experts that have rows once, and its FLOPs.

    Tensor cores of sm_90 multiply in 16 bits where weights alone have 8, or blocks are those of MX.
    """
    m, n, k = shape.m, shape.n, shape.k
    x = _stored(recipe.activation, m, k) if quantized else 2 * m * k
    w = int(np.count_nonzero(group_sizes)) * _stored(recipe.weight, n, k)
    in_16_bits = recipe.activation is None or recipe.weight.is_mx
    return Floor(x + w + recipe.out_dtype.itemsize * m * n, 2 * m * n * k, H200.bf16 if in_16_bits else H200.fp8)


def _stored(scheme: Scheme, rows: int, columns: int) -> int:
    """Bytes of a matrix and its scales."""
    return rows * columns + int(np.prod(scheme.scale_shape((rows, columns)))) * scheme.scale_dtype.itemsize


def tolerance(dtype) -> float:
    """What fp8x.ops promises: one rounding to the output type, and float32 accumulation."""
    return 2.0 ** -(jnp.finfo(dtype).nmant + 1) + 2.0**-18


def relative_error(y: Float[Array, "m n"], given: Operands, recipe: Recipe) -> float:
    """`‖y - expected‖ / ‖expected‖` in float64 over CHECKED_ROWS random rows, the first and the last among them."""
    m = y.shape[0]
    rows = np.union1d(np.random.default_rng().choice(m, min(m, CHECKED_ROWS), replace=False), [0, m - 1])
    x, w = given.x, _dequantize(given.w)
    if recipe.activation is not None and not isinstance(x, ScaledArray):
        x = _quantize(x, given.scale if recipe.is_static else _scale_of(x, recipe.activation), recipe.activation)
    x = _dequantize(x) if isinstance(x, ScaledArray) else x.astype(jnp.float32)
    with jax.enable_x64(True):
        return float(_relative_error(y, x, w if w.ndim == 3 else w[None], given.group_sizes, rows))


_dequantize = jax.jit(lambda q: q.dequantize(jnp.float32))  # off by 2^-24; all that follows is in float64


@jax.jit
def _relative_error(y, x, w, group_sizes, rows) -> Float[Array, ""]:
    x, y = x[rows].astype(jnp.float64), y[rows].astype(jnp.float64)
    group = jnp.searchsorted(jnp.cumsum(group_sizes), rows, side="right")

    def add(expected, expert):
        matrix, index = expert
        return expected + jnp.where((group == index)[:, None], x, 0) @ matrix.astype(jnp.float64).T, None

    expected, _ = jax.lax.scan(add, jnp.zeros_like(y), (w, jnp.arange(w.shape[0])))
    return jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)


def inputs(shape: Shape, recipe: Recipe, *, quantized: bool = False) -> list[Operands]:
    """Sets of operands, enough of them for a call to find none of its own in a GPU's cache."""
    nbytes = floor(shape, recipe, shape.group_sizes(0), quantized=quantized).bytes
    count = sets_needed(nbytes) if jax.default_backend() == "gpu" else 1
    return [operands(shape, recipe, seed, quantized=quantized) for seed in range(count)]


def measure(shape: Shape, recipe: Recipe, sets: Sequence[Operands]) -> dict[str, Any]:
    """The op in the backend and tiling that are in force: checked, and then timed if it is right."""
    fn = product(shape, recipe, quantized=isinstance(sets[0].x, ScaledArray))
    arguments = [given.arguments for given in sets]
    with tuning.recorded() as tilings:
        (choice,) = ops.explain(fn, *arguments[0])
    program = chained(fn).lower(arguments).compile()
    results = jax.block_until_ready(program(arguments))
    found = {"kernel": choice.kernel} | ({"tiling": dataclasses.asdict(tilings[-1].tiling)} if tilings else {})
    limit = tolerance(recipe.out_dtype)
    return found | checked(
        results, sets, recipe, limit, lambda: time_queue(lambda: program(arguments), jax.block_until_ready, len(sets))
    )


def checked(
    results: Sequence, sets: Sequence[Operands], recipe: Recipe, limit: float, time: Callable[[], Timing]
) -> dict[str, Any]:
    """The largest error of the results; and the time, unless that is over the limit."""
    error = float(np.max([relative_error(y, given, recipe) for y, given in zip(results, sets)]))  # NaN stays
    if not error <= limit:
        return {"relative_error": error, "failure": f"wrong: relative error {error:.3g} is over {limit:.3g}"}
    return {"relative_error": error, **dataclasses.asdict(time())}


def candidates(shape: Shape, recipe: Recipe) -> tuning.Choice | None:
    """The tilings that the op's kernel could take, with its estimates; None for a kernel without tilings."""
    given = jax.eval_shape(lambda: operands(shape, recipe, 0).arguments)
    with tuning.recorded() as choices:
        jax.eval_shape(product(shape, recipe), *given)
    return choices[-1] if choices else None


def gemm_seconds(result: dict[str, Any]) -> float | None:
    """Of what `measure` or a peer gave, the product's kernel without what surrounds it: Mosaic's, or the longest."""
    kernels = result.get("kernels") or {}
    mosaic = [seconds for name, seconds in kernels.items() if "mosaic" in name]
    return sum(mosaic) if mosaic else max(kernels.values(), default=None)
