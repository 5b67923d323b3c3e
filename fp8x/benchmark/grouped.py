"""One grouped or dense product on random operands: right or not, then how fast, beside its floor."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from fp8x import numerics, ops
from fp8x.array import ScaledArray
from fp8x.benchmark.hardware import H200, Floor
from fp8x.benchmark.timing import Timing, alone, chained, sets_needed, time_queue
from fp8x.pallas import tuning
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme

SAMPLE = 64  # rows and columns of a result that are checked; all where there are no more
STATIC_SCALE = 0.02  # of activations that a static recipe quantizes: a few of normal values saturate


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


@jax.tree_util.register_dataclass
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
    """Random ones: codes of normal values, with scales of any size.

    Arguments:
        quantized: x comes as the recipe stores it.
    """
    return _operands(shape, recipe, quantized, np.uint32(seed), shape.group_sizes(seed))


# One program: a hash of each element's index draws from a table, which takes neither a generator nor a host's arrays.
@jax.jit(static_argnums=(0, 1, 2))
def _operands(shape: Shape, recipe: Recipe, quantized: bool, seed, group_sizes) -> Operands:
    m, n, k = shape.m, shape.n, shape.k
    matrices = (n, k) if shape.experts == 1 else (shape.experts, n, k)
    w = _random_array(matrices, recipe.weight, 4 * seed)
    if quantized:
        return Operands(_random_array((m, k), recipe.activation, 4 * seed + 2), w, group_sizes, None)
    scale = jnp.full(recipe.activation.scale_shape((m, k)), STATIC_SCALE) if recipe.is_static else None
    return Operands(_drawn((m, k), recipe.out_dtype, 4 * seed + 2), w, group_sizes, scale)


def _random_array(shape: tuple[int, ...], scheme: Scheme, seed) -> ScaledArray:
    """Of values as large as 1/sqrt(K), by scales that differ by a factor of 32."""
    bits = _hash(scheme.scale_shape(shape), seed + 1)
    largest = 2 - round(math.log2(shape[-1]) / 2) - round(math.log2(scheme.max))
    scale = jnp.exp2((largest - (bits % 5).astype(jnp.int32)).astype(jnp.float32))
    scale = scale if scheme.is_mx else scale * (1 + (bits >> 16).astype(jnp.float32) * 2.0**-16)
    return ScaledArray(_drawn(shape, scheme.dtype, seed), scale.astype(scheme.scale_dtype), scheme)


def _drawn(shape: tuple[int, ...], dtype, seed) -> Float[Array, "..."]:
    """Normal values; in 8 bits, up to the largest."""
    values, dtype = np.random.default_rng(0).normal(size=256), np.dtype(dtype)
    if dtype.itemsize == 1:
        values = np.clip(values / 4, -1, 1) * float(jnp.finfo(dtype).max)
    return jnp.asarray(values.astype(dtype))[_hash(shape, seed) & 255]


def _hash(shape: tuple[int, ...], seed) -> UInt32[Array, "..."]:
    """32 random bits for each element of an array."""
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)) + jnp.uint32(seed) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return (bits ^ (bits >> 16)).reshape(shape)


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
    """Bytes of a matrix and its scales; experts that share some count theirs each."""
    scheme = dataclasses.replace(scheme, block=scheme.block[-2:])
    return rows * columns + int(np.prod(scheme.scale_shape((rows, columns)))) * scheme.scale_dtype.itemsize


def tolerance(dtype) -> float:
    """What fp8x.ops promises: one rounding to the output type, and float32 accumulation."""
    return 2.0 ** -(jnp.finfo(dtype).nmant + 1) + 2.0**-18


def relative_error(y: Float[Array, "m n"], given: Operands, recipe: Recipe) -> float:
    """`‖y - expected‖ / ‖expected‖` in float64 over SAMPLE rows and columns, the first and the last among them.

    The host computes what is expected: the device has no part in it but to copy the samples.
    """
    activation, quantized = recipe.activation, isinstance(given.x, ScaledArray)
    codes = given.x.data if quantized else given.x
    rows, columns = map(_sampled, y.shape)
    x, w, y = jax.device_get(_taken(codes, given.w.data, y, rows, columns))
    if quantized:
        x = x.astype(np.float64) * _scales_of(given.x, rows)
    elif activation is not None:
        scale = given.scale if recipe.is_static else _scale_of(given.x, activation)
        scale = np.asarray(scale)[rows // activation.block_of(codes.shape)[0]]
        with jax.default_device(jax.devices("cpu")[0]):
            by_row = dataclasses.replace(activation, block=(1, activation.block[-1]))
            x = numerics.quantize_with_scale(jnp.asarray(x), jnp.asarray(scale), by_row).dequantize(jnp.float32)
    w = (w.astype(np.float64) * _scales_of(given.w, columns)).reshape(-1, *w.shape[-2:])
    ends = np.cumsum(given.group_sizes) if len(w) > 1 else [len(codes)]
    expert = np.searchsorted(ends, rows, side="right")
    expected = np.stack([w[e] @ row for e, row in zip(expert, np.asarray(x, np.float64))])
    return float(np.linalg.norm(y.astype(np.float64) - expected) / np.linalg.norm(expected))


def _sampled(size: int) -> Int[np.ndarray, " s"]:
    drawn = np.random.default_rng(size).permutation(size)[: SAMPLE - 2]
    return np.union1d(drawn, [0, size - 1])


@jax.jit
def _taken(x, w, y, rows, columns) -> tuple:
    return x[rows], w[..., columns, :], y[rows][:, columns]


_scale_of = jax.jit(lambda x, scheme: numerics.quantize(x, scheme).scale, static_argnums=1)


def _scales_of(x: ScaledArray, rows: Int[np.ndarray, " s"]) -> Float[np.ndarray, "... s k"]:
    """The scale of each element of some rows."""
    *lead, block, width = x.scheme.block_of(x.shape)
    scale = np.asarray(x.scale)[..., rows // block, :].astype(np.float64)
    for axis, extent in enumerate(lead):
        scale = scale.repeat(extent, axis=axis).take(range(x.shape[axis]), axis=axis)
    return scale.repeat(width, axis=-1)[..., : x.shape[-1]]


def inputs(shape: Shape, recipe: Recipe, *, quantized: bool = False) -> list[Operands]:
    """Sets of operands, enough of them for a call to find none of its own in a GPU's cache."""
    count = len(sizes_of_sets(shape, recipe, quantized=quantized))
    return [operands(shape, recipe, seed, quantized=quantized) for seed in range(count)]


def sizes_of_sets(shape: Shape, recipe: Recipe, *, quantized: bool = False) -> list[Int[np.ndarray, " e"]]:
    """The group sizes of each of `inputs`."""
    nbytes = floor(shape, recipe, shape.group_sizes(0), quantized=quantized).bytes
    return [shape.group_sizes(seed) for seed in range(sets_needed(nbytes) if jax.default_backend() == "gpu" else 1)]


def measure(shape: Shape, recipe: Recipe, *, quantized: bool = False) -> dict[str, Any]:
    """The op in the backend and tiling that are in force: checked, and then timed if it is right.

    All that takes long on the host comes first, then all that runs on the device, `alone`.
    """
    fn = product(shape, recipe, quantized=quantized)
    sizes = sizes_of_sets(shape, recipe, quantized=quantized)
    make = _operands.lower(shape, recipe, quantized, np.uint32(0), sizes[0]).compile()
    abstract = jax.eval_shape(functools.partial(operands, shape, recipe, 0, quantized=quantized)).arguments
    with tuning.recorded() as tilings:
        (choice,) = ops.explain(fn, *abstract)
    program = chained(fn).lower([abstract] * len(sizes)).compile()
    found = {"kernel": choice.kernel} | ({"tiling": dataclasses.asdict(tilings[-1].tiling)} if tilings else {})
    with alone():
        sets = [make(np.uint32(seed), given) for seed, given in enumerate(sizes)]
        arguments = [given.arguments for given in sets]
        results = jax.block_until_ready(program(arguments))
        time = functools.partial(time_queue, lambda: program(arguments), jax.block_until_ready, len(sizes))
        return found | checked(results, sets, recipe, tolerance(recipe.out_dtype), time)


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
