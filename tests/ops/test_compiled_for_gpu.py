"""What XLA makes of ops for a GPU keeps the roundings that their contracts name, which it would take for nothing.

On a GPU XLA computes on with what was not rounded yet, wherever it sees a conversion down and up again. On a CPU it
does not, and no test that runs there can see it. So programs are compiled for a described H200, and looked at.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest

import fp8x
from fp8x import ops
from fp8x.array import ScaledArray
from fp8x.benchmark.program import optimized
from fp8x.ops.gated import multiply_parts
from fp8x.pallas import aot
from fp8x.recipe import RECIPES
from fp8x.scheme import Scheme, mx, per_row, per_tensor

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
F8 = {"e4m3": "f8e4m3fn", "e5m2": "f8e5m2"}
array = jax.ShapeDtypeStruct


def elements(program: str, dtype: str) -> set[int]:
    """How many elements the values of a type have, anywhere in a program."""
    return {math.prod(int(d) for d in dims.split(",") if d) for dims in re.findall(rf"\b{dtype}\[([\d,]*)\]", program)}


def stored(scheme: Scheme, *shape: int) -> ScaledArray:
    return ScaledArray(array(shape, scheme.dtype), array(scheme.scale_shape(shape), scheme.scale_dtype), scheme)


class Program:
    """Functions compiled as one; each has an input of a size of its own, so that it can be told what became of it."""

    def __init__(self):
        self.functions, self.arguments, self.sizes, self.k = [], [], [], 128

    def add(self, function, m: int, how: str, arguments_of=lambda k: ()):
        """`function(x, *rest)` of `x [m, k]` and `rest = arguments_of(k)`; or of three such x, mapped or in a loop."""
        self.k += 128
        x, rest = array((m, self.k), jnp.bfloat16), arguments_of(self.k)
        self.sizes.append(m * self.k * (3 if how == "vmap" else 1))
        if how != "plain":
            x, once = array((3, m, self.k), jnp.bfloat16), function
            function = jax.vmap(once, (0, *(None for _ in rest)))
        if how == "scan":

            def function(x, *rest):
                return jax.lax.scan(lambda carry, x: (carry, once(x, *rest)), 0, x)[1]

        self.functions.append(function)
        self.arguments.append((x, *rest))

    def lost(self, dtype: str) -> list[int]:
        """The functions whose input never is of the type."""
        assert len(set(self.sizes)) == len(self.sizes)
        kept = elements(optimized(lambda given: [f(*x) for f, x in zip(self.functions, given)], self.arguments), dtype)
        return [index for index, size in enumerate(self.sizes) if size not in kept]


def product(op: str, recipe: fp8x.Recipe, m: int):
    """An op that quantizes its input as a recipe says, and what it takes beside x."""
    e, n, activation = 4, 192, recipe.activation
    options = dict(activation=activation, out_dtype=recipe.out_dtype)

    def scale(k):
        return array(activation.scale_shape((m, k)), activation.scale_dtype) if recipe.is_static else None

    def gated_matmul(x, w, scale, sizes):
        of_h = None if scale is None else jnp.ones(activation.scale_shape((m, n)), activation.scale_dtype)
        options["out_activation_scale"] = of_h
        gate = dict(gate="silu", out_activation=activation)
        return ops.gated_matmul(x, w, sizes, activation_scale=scale, **gate, **options).dequantize(jnp.float32)

    run, shape, groups = {
        "matmul": (lambda x, w, scale: ops.matmul(x, w, activation_scale=scale, **options), (n,), ()),
        "grouped_matmul": (
            lambda x, w, scale, sizes: ops.grouped_matmul(x, w, sizes, activation_scale=scale, **options),
            (e, n),
            (array((e,), jnp.int32),),
        ),
        "expert_matmul": (
            lambda x, w, scale, experts: ops.expert_matmul(x, w, experts, activation_scale=scale, **options),
            (e, n),
            (array((m,), jnp.int32),),
        ),
        "gated_matmul": (gated_matmul, (e, 2, n), (array((e,), jnp.int32),)),
    }[op]
    return run, lambda k: (stored(recipe.weight, *shape, k), scale(k), *groups)


OPS = ("matmul", "grouped_matmul", "expert_matmul", "gated_matmul")
FORMS = list(itertools.product(OPS, (1, 64), ("plain", "vmap", "scan")))
QUICK = [(op, 64, "plain") for op in OPS] + [
    ("matmul", 1, "plain"),
    ("expert_matmul", 1, "plain"),
    ("matmul", 64, "vmap"),
    ("grouped_matmul", 64, "scan"),
]
CODES = [
    code for code, recipe in RECIPES.items() if recipe.activation and recipe.observer is None and "_f32" not in code
]


def check_products(code: str, forms) -> None:
    recipe, program = fp8x.recipe(code), Program()
    for op, m, how in forms:
        run, arguments_of = product(op, recipe, m)
        program.add(run, m, how, arguments_of)
    with fp8x.backend("xla"):
        lost = program.lost(F8[recipe.activation.element])
    assert not lost, f"never quantized: {[forms[index] for index in lost]}"


@pytest.mark.sample
@pytest.mark.parametrize("code", ["e4m3_e4m3_bf16", "fp8_e4m3fn_bf16_block_scale", "mxfp8_mxfp8_bf16"])
def test_products_multiply_codes(code):
    check_products(code, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("code", CODES)
def test_products_multiply_codes_in_every_form(code):
    check_products(code, FORMS)


def test_dequantize_reads_codes():
    for element, dtype in F8.items():
        program, forms = Program(), []
        for make in (per_tensor, per_row, mx, lambda element: Scheme(element, block=(128, 128))):
            scheme = make(element)
            for how in ("plain", "vmap", "scan"):
                forms.append((str(scheme), how))
                program.add(lambda x, s=scheme: fp8x.quantize(x, s).dequantize(jnp.float32), 64, how)
        lost = program.lost(dtype)
        assert not lost, f"never quantized: {[forms[index] for index in lost]}"


def test_what_xla_quantizes_for_a_kernel():
    """The quantizing kernel has no tile for one row of MX."""
    program, recipe = Program(), fp8x.recipe("mxfp8_mxfp8_bf16")
    run, arguments_of = product("matmul", recipe, 1)
    program.add(run, 1, "plain", arguments_of)
    with fp8x.backend("mosaic_gpu"):
        assert program.lost(F8["e4m3"]) == []


def test_kernels_read_gate_and_up_where_they_lie():
    """Also where blocks of 128 do not divide their rows: a slice would copy half of the weights at every call."""
    recipe, e, i, k = fp8x.recipe("fp8_e4m3fn_bf16_block_scale"), 4, 160, 384

    def run(x, w, bias, sizes, experts):
        def multiply(op, x, of_rows):
            return multiply_parts(
                lambda x, w, bias: op(x, w, of_rows, activation=recipe.activation, bias=bias), x, w, bias
            )

        return multiply(ops.grouped_matmul, x, sizes), multiply(ops.expert_matmul, x[:2], experts)

    x, w, bias = array((8, k), jnp.bfloat16), stored(recipe.weight, e, 2, i, k), array((e, 2, i), jnp.bfloat16)
    with fp8x.backend("mosaic_gpu"):
        found = elements(optimized(run, x, w, bias, array((e,), jnp.int32), array((2,), jnp.int32)), F8["e4m3"])
    assert e * 2 * i * k in found and e * i * k not in found


@pytest.mark.parametrize(
    "dtype, name", [(jnp.bfloat16, "bf16"), pytest.param(jnp.float16, "f16", marks=pytest.mark.slow)]
)
def test_results_are_rounded_before_more_arithmetic(dtype, name):
    """Of each function, the number of elements that have to be of the type somewhere."""
    x, group = array((64, 384), jnp.float32), Scheme("e4m3", block=(1, 128))
    w, w13, sizes = stored(per_row(), 200, 384), stored(per_row(), 4, 2, 136, 384), array((4,), jnp.int32)

    def in_float32(x, w, w13, q, sizes):
        def loss(x):
            return jnp.sum(ops.matmul(x, w, out_dtype=dtype).astype(jnp.float32))

        yield 64 * 200, ops.matmul(x[:, :384], w, out_dtype=dtype).astype(jnp.float32) * 3
        yield 96, q.dequantize(dtype).astype(jnp.float32) * 3
        h = ops.gated_matmul(x, w13, sizes, gate="silu", out_activation=group, out_dtype=dtype)
        yield 64 * 2 * 136, h.data
        yield 64 * 136, h.scale
        yield 32 * 384, jax.grad(loss)(x[:32].astype(dtype)).astype(jnp.float32) * 3
        if dtype == jnp.float16:  # of bfloat16, quantizing rounds the mantissa itself
            yield 16 * 384, fp8x.quantize((x[:16] * 2).astype(dtype), group).data

    arguments = x, w, w13, stored(per_row(), 1, 96), sizes
    wanted = []
    with fp8x.backend("xla"):

        def run(*arguments):
            wanted[:], results = zip(*in_float32(*arguments))
            return results

        found = elements(optimized(run, *arguments), name)
    assert set(wanted) <= found
