"""A small problem for each form of a kernel, emulated and checked."""

import re

import jax
import jax.numpy as jnp
import metric
import numpy as np
from shapes import Shape, operands, quantize

from fp8x.array import ScaledArray
from fp8x.numerics import quantize_with_scale
from fp8x.ops.gate import gated, kernel_gate
from fp8x.ops.quantize import by_xla
from fp8x.pallas.epilogue import Gated
from fp8x.pallas.sm90_grouped_fp8 import Tiling, gated_fp8, grouped_fp8
from fp8x.pallas.sm90_grouped_swapped import grouped_swapped
from fp8x.pallas.sm90_quantize import quantize_blocks
from fp8x.pallas.swapped_tiling import Tiling as Swapped
from fp8x.scheme import E8M0, SCALE_RULES, Scheme
from ptx.emulated import emulated
from ptx.forms import GATES, Form, ProductForm, QuantizeForm, form_of_quantizer, quantizer_shapes

BLOCKS = {"one": (None, None), "rows": (1, None), "1×128": (1, 128), "128×128": (128, 128)}
EXPERTS = (3, 0, 4, -1, 2, 0, 1)


def check(form: Form) -> None:
    """Emulates a problem of this form. Raises what the emulator finds, or AssertionError where the result is wrong."""
    if isinstance(form, QuantizeForm):
        check_quantized(form)
    elif form.kernel == "gated":
        check_gated(form)
    else:
        check_product(form)


def check_quantized(form: QuantizeForm) -> None:
    """Bit for bit as XLA on a CPU; behind a gate, where h may round to its neighbor, nearly."""
    parts, element = 2 if form.gate else 1, "e4m3" if "e4m3" in form.element else "e5m2"
    is_mx, given = form.scale in SCALE_RULES[E8M0], None
    m, b, width = quantizer_shapes(form.x, is_mx=is_mx, has_gate=bool(form.gate))[form.threads, form.tile]
    x = np.random.default_rng(0).normal(size=(m, parts, b * width)).astype(form.x)
    scheme = Scheme(
        element,
        block=(None, width) if form.scale == "given" else (1, width),
        scale_dtype=E8M0 if is_mx else np.float32,
        scale_rule=None if form.scale == "given" else form.scale,
    )
    if form.scale == "given":
        given = np.linspace(0.5, 2, b, dtype=np.float32)[None] / scheme.max
    used = np.int32(m - 3) if form.used else None
    gate = GATES.get(form.gate)
    function = None if gate is None else kernel_gate(gate)
    blocks = x.reshape(m, parts, b, width)

    def kernel(x, scale, used):
        return quantize_blocks(x, scheme, scale, used, function)

    arguments = blocks, None if given is None else given[0], used
    assert form_of_quantizer(blocks, scheme, *arguments[1:], function) == form
    with emulated():
        data, scale = jax.jit(kernel)(*arguments)
    expected = jax.jit(by_xla, static_argnames=("scheme", "gate"))(
        x if form.gate else x[:, 0], scheme, given, used, gate
    )
    scale = expected.scale if scale is None else np.asarray(scale).view(expected.scale.dtype)
    actual = ScaledArray(data.reshape(expected.shape), scale, scheme)
    if form.gate:
        assert np.mean(metric.as_bits(actual.data) != metric.as_bits(expected.data)) < 1e-2
        metric.assert_close(metric.float64(actual), metric.float64(expected), tolerance=2.0**-8)
    else:
        np.testing.assert_array_equal(metric.as_bits(actual.data), metric.as_bits(expected.data))
        np.testing.assert_array_equal(metric.as_bits(actual.scale), metric.as_bits(expected.scale))


def check_product(form: ProductForm) -> None:
    """Against float64, by the one metric."""
    given, w, x, x_scale, w_scale, sizes = product_operands(form)
    bias = given.bias if form.bias else None
    experts = np.int32(EXPERTS) if form.rows == "by expert" else None
    run = grouped_fp8 if form.kernel == "fp8" else grouped_swapped
    options = dict(out_dtype=np.dtype(form.out), tiling=tiling_of(form), programs=2)
    options |= {} if experts is None else {"experts": np.where(experts < 0, len(w.data), experts)}

    def kernel(x, *arguments):
        return run(x, *arguments, **options)

    data = x.data if isinstance(x, ScaledArray) else x
    arguments = data, w.data, x_scale, w_scale, bias, None if form.rows != "grouped" else np.int32(sizes)
    with emulated():
        y = np.asarray(jax.jit(kernel)(*arguments))
    x = x if isinstance(x, ScaledArray) else jnp.nan_to_num(x)
    if experts is None:
        expected = metric.grouped_matmul(x, w, sizes, bias)
    else:
        rows, matrices = metric.float64(x), metric.float64(w)
        expected = np.stack([matrices[e] @ row for e, row in zip(experts, rows)])
        expected = (expected + (0 if bias is None else metric.float64(bias)[experts])) * (experts >= 0)[:, None]
    metric.assert_close(y, expected, short_sums=form.x_scale != "")


def check_gated(form: ProductForm) -> None:
    """As the steps one after the other, from float64 on: in what it dequantizes to, and in most codes."""
    _, _, x, x_scale, _, sizes = product_operands(form)
    i, k, e = 136 if form.h_scale != "given blocks" else 264, x.shape[1], len(sizes)
    rng, out = np.random.default_rng(1), np.dtype(form.out)
    w = quantize(jnp.asarray(rng.normal(size=(e, 2, i, k)) * k**-0.5, jnp.float32), scheme_of(form.w, form.w_scale))
    bias = jnp.asarray(rng.normal(size=(e, 2, i)), out) if form.bias else None
    is_static, element = form.h_scale.startswith("given"), "e4m3" if "e4m3" in form.h else "e5m2"
    scheme, scale, inverse = Scheme(element, block=(1, 128), scale_rule=None if is_static else form.h_scale), None, None
    if is_static:
        scheme = Scheme(element, block=(None, 128 if form.h_scale == "given blocks" else None))
        scale = np.linspace(4, 6, scheme.scale_shape((1, i))[1], dtype=np.float32)[None] / scheme.max
        inverse = 1 / scale[0]
    w_scale = w.scale if "×" in form.w_scale else w.scale[..., 0]
    end = Gated(kernel_gate(GATES[form.gate]), out, scheme, is_static)

    def kernel(*arguments):
        return gated_fp8(*arguments, end=end, tiling=tiling_of(form), programs=2)

    with emulated():
        data, found = jax.jit(kernel)(x.data, w.data, x_scale, w_scale, bias, np.int32(sizes), inverse)
    y = metric.grouped_matmul(x, w, sizes, bias).astype(out)

    @jax.jit
    def finish(y):
        h = gated(y, GATES[form.gate])
        return quantize_with_scale(h, scale, scheme) if is_static else quantize(h, scheme)

    expected = finish(y)
    metric.assert_codes_close(ScaledArray(data, expected.scale if is_static else found, scheme), expected)


def product_operands(form: ProductForm):
    """Operands of the form, and x and w's scales as its kernel reads them."""
    k = {32: 160, 64: 192, 128: 256}[form.swizzle]
    if form.rows == "grouped":
        shape = Shape((7, 0, 33, 5), 136, k, spare=11)
    else:
        shape = Shape((1,) * 5, 136, k, spare=2) if form.rows == "by expert" else Shape((44,), 136, k)
    given = operands(shape, scheme_of(form.w, form.w_scale), dtype=form.x if not form.x_scale else jnp.bfloat16)
    w, x, x_scale = given.w, given.x, None
    if form.rows == "by expert":
        x = jnp.where(jnp.isnan(x), 1, x)
    if form.x_scale:
        x = quantize(jnp.nan_to_num(x), scheme_of(form.x, form.x_scale))
        x_scale = {"one": x.scale.reshape(-1), "rows": x.scale[:, 0], "1×128": x.scale.T}[form.x_scale]
    w_scale = w.scale if "×" in form.w_scale else w.scale[..., 0]
    if (form.kernel, form.w_scale) == ("fp8", "1×128"):
        w_scale = w_scale.swapaxes(1, 2)
    return given, w, x, x_scale, w_scale, shape.group_sizes


def scheme_of(dtype: str, scale: str) -> Scheme:
    element = "e4m3" if "e4m3" in dtype else "e5m2"
    return Scheme(element, block=(1, 32), scale_dtype=E8M0) if scale == "1×32" else Scheme(element, block=BLOCKS[scale])


def tiling_of(form: ProductForm) -> Tiling | Swapped:
    fields = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", form.tiling)}
    if form.kernel == "swapped":
        return Swapped(form.tokens, **fields, stages=3, splits=2 if form.splits else 1)
    return Tiling(**fields, stages=2)
