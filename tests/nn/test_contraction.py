"""`LinearGeneral` and `Einsum`: Flax's numbers where 8 bits hold them exactly, and those of `ops` bit for bit."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from metric import as_bits
from shapes import quantize

import fp8x
from fp8x import ops
from fp8x.errors import ShapeError
from fp8x.recipe import OUT_DTYPES
from fp8x.scheme import Scheme, mx

F32 = OUT_DTYPES["f32"]


def pow2(*block):
    return Scheme("e4m3", block=block, scale_rule="pow2")


# Scales are powers of two and every number a small integer, so that nothing is rounded anywhere.
EXACT = {
    "tensor": fp8x.Recipe(pow2(None, None), out_dtype=F32),
    "rows": fp8x.Recipe(pow2(1, None), pow2(1, None), "dynamic", F32),
    "blocks": fp8x.Recipe(pow2(128, 128), pow2(1, 128), "dynamic", F32),
    "mx": fp8x.Recipe(mx(), mx(), "dynamic", F32),
}
exact = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("rows", "mx") else pytest.mark.slow) for name in EXACT]
)
# in_features, out_features, axis, batch_axis, and the shape of x.
GENERAL = [
    (32, (4, 8), -1, {}, (2, 3, 32)),
    ((4, 8), 24, (-2, -1), {}, (2, 3, 4, 8)),
    ((4, 8), (3, 5), (1, 3), {}, (2, 4, 3, 8)),
    ((8, 4), (3, 5, 2), (0, -1), {}, (8, 2, 4)),
    (32, 5, -1, {}, (32,)),
    (32, (2, 3), -1, {0: 3}, (3, 5, 32)),
    ((4, 8), (2, 3), (-2, -1), {0: 2, 1: 3}, (2, 3, 5, 4, 8)),
    (64, 7, 1, {}, (2, 64, 0)),
]
# Equation, shapes of kernel and bias, and the shape of x.
EQUATIONS = [
    ("btd,df->btf", (32, 5), (5,), (2, 3, 32)),
    ("btd,dnh->btnh", (32, 3, 5), (3, 5), (2, 3, 32)),
    ("btnh,nhd->btd", (4, 8, 7), None, (2, 3, 4, 8)),
    ("...d,fd->...f", (5, 32), (5,), (2, 1, 3, 32)),
    ("...d,df->f...", (32, 5), (5,), (2, 3, 32)),
    ("ecd,edf->ecf", (3, 32, 5), (3, 1, 5), (3, 4, 32)),
    ("ecd,edf->ecf", (3, 32, 5), None, (3, 4, 32)),
    ("bhtd,hdef->fbteh", (3, 32, 2, 5), (5, 2, 3), (2, 3, 4, 32)),
    ("d...e,xdey->y...x", (5, 4, 8, 2), (2, 5), (4, 3, 8)),
    (" b t d , d f -> b t f ", (64, 3), (3,), (1, 2, 64)),
]


def integers(shape, seed=0):
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def filled(source):
    """A Flax layer whose kernel and bias are small integers."""
    source.kernel[...] = jnp.asarray(integers(source.kernel.shape, 1))
    if source.bias is not None:
        source.bias[...] = jnp.asarray(integers(source.bias.shape, 2))
    return source


def check(source, x, recipe):
    layer = fp8x.quantize_model(source, recipe)
    assert isinstance(layer, fp8x.nn.LinearGeneral | fp8x.nn.Einsum)
    expected = source(x)
    for call in (lambda layer, x: layer(x), nnx.jit(lambda layer, x: layer(x))):
        y = call(layer, x)
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(y, expected)


@pytest.mark.sample
@exact
@pytest.mark.parametrize(("k", "n", "axis", "batch_axis", "shape"), GENERAL, ids=str)
def test_linear_general(name, k, n, axis, batch_axis, shape):
    source = nnx.LinearGeneral(k, n, axis=axis, batch_axis=batch_axis, use_bias=n != 24, rngs=nnx.Rngs(0))
    check(filled(source), integers(shape), EXACT[name])


@pytest.mark.sample
@exact
@pytest.mark.parametrize(("equation", "kernel", "bias", "shape"), EQUATIONS, ids=str)
def test_einsum(name, equation, kernel, bias, shape):
    check(filled(nnx.Einsum(equation, kernel, bias, rngs=nnx.Rngs(0))), integers(shape), EXACT[name])


CODES = [code for code, recipe in fp8x.RECIPES.items() if recipe.observer is None and "bf16" in code]


def static_scale(layer, x):
    if layer.recipe.needs_calibration:
        layer.input_scale[...] = quantize(x, layer.recipe.activation).scale


@pytest.mark.sample
@pytest.mark.parametrize("code", CODES)
def test_one_product_of_ops_on_the_reshaped_kernel(code):
    """Bit for bit, in every recipe: into heads, out of heads, and a matrix for each head."""
    recipe, rngs = fp8x.recipe(code), nnx.Rngs(0)
    x = jax.random.normal(jax.random.key(0), (2, 5, 64), jnp.bfloat16)
    heads = nnx.LinearGeneral(64, (4, 24), rngs=rngs)
    layer = fp8x.nn.LinearGeneral.from_linear_general(heads, code)
    static_scale(layer, x.reshape(10, 64))
    w = quantize(heads.kernel[...].reshape(64, 96).T, recipe.weight)
    scale = None if layer.input_scale is None else layer.input_scale[...]
    options = dict(activation=recipe.activation, activation_scale=scale)
    y = ops.matmul(x.reshape(10, 64), w, bias=heads.bias[...].reshape(96), out_dtype=jnp.bfloat16, **options)
    np.testing.assert_array_equal(as_bits(layer(x)), as_bits(y.reshape(2, 5, 4, 24)))

    out = nnx.Einsum("btnh,nhd->btd", (4, 24, 64), rngs=rngs)
    layer = fp8x.nn.Einsum.from_einsum(out, code)
    x = jax.random.normal(jax.random.key(1), (2, 5, 4, 24), jnp.bfloat16)
    rows = x.reshape(10, 96)
    static_scale(layer, rows)
    w = quantize(out.kernel[...].reshape(96, 64).T, recipe.weight)
    scale = None if layer.input_scale is None else layer.input_scale[...]
    options = dict(activation=recipe.activation, activation_scale=scale)
    y = ops.matmul(rows, w, out_dtype=jnp.bfloat16, **options)
    np.testing.assert_array_equal(as_bits(layer(x)), as_bits(y.reshape(2, 5, 64)))

    each = nnx.Einsum("nbh,nhd->nbd", (4, 32, 24), rngs=rngs)
    layer = fp8x.nn.Einsum.from_einsum(each, code)
    x = jax.random.normal(jax.random.key(2), (4, 5, 32), jnp.bfloat16)
    static_scale(layer, x.reshape(20, 32))
    w = quantize(each.kernel[...].mT, recipe.weight)
    scale = None if layer.input_scale is None else layer.input_scale[...]
    options = dict(activation=recipe.activation, activation_scale=scale)
    y = ops.grouped_matmul(x.reshape(20, 32), w, jnp.full(4, 5), out_dtype=jnp.bfloat16, **options)
    np.testing.assert_array_equal(as_bits(layer(x)), as_bits(y.reshape(4, 5, 24)))


def test_constructors_make_what_conversion_does():
    for made, source in [
        (
            fp8x.nn.LinearGeneral((4, 16), (3, 5), axis=(1, -1), recipe="mxfp8_bf16", rngs=nnx.Rngs(0)),
            nnx.LinearGeneral((4, 16), (3, 5), axis=(1, -1), rngs=nnx.Rngs(0)),
        ),
        (
            fp8x.nn.Einsum("btd,dnh->btnh", (64, 3, 5), (3, 5), recipe="mxfp8_bf16", rngs=nnx.Rngs(0)),
            nnx.Einsum("btd,dnh->btnh", (64, 3, 5), (3, 5), rngs=nnx.Rngs(0)),
        ),
    ]:
        converted = nnx.split(fp8x.quantize_model(source, "mxfp8_bf16"))
        graphdef, state = nnx.split(made)
        assert graphdef == converted[0]
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, converted[1])


class Attention(nnx.Module):
    def __init__(self, rngs, **options):
        self.attention = nnx.MultiHeadAttention(4, 64, rngs=rngs, **options)


@pytest.mark.sample
@pytest.mark.parametrize("code", ["e4m3_bf16", "mxfp8_mxfp8_bf16", "fp8_e4m3fn_bf16_block_scale"])
def test_attention_with_a_cache(code):
    model = Attention(nnx.Rngs(0), num_kv_heads=2, normalize_qk=True, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 6, 64), jnp.bfloat16)
    exact = model.attention(x, is_causal=True, decode=False)
    fp8x.quantize_model(model, code)
    whole = model.attention(x, is_causal=True, decode=False).astype(jnp.float32)
    assert np.linalg.norm(whole - exact) < 0.08 * np.linalg.norm(exact)
    model.attention.init_cache(x.shape, jnp.bfloat16)
    steps = [model.attention(x[:, i : i + 1], decode=True).astype(jnp.float32) for i in range(6)]
    assert np.linalg.norm(np.concatenate(steps, 1) - whole) < 0.02 * np.linalg.norm(whole)


class Layers(nnx.Module):
    """As many put them on a mesh: into heads and features by columns, out of them by rows."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.attention = nnx.MultiHeadAttention(4, 128, qkv_features=512, rngs=rngs, decode=False)
        self.up = nnx.Einsum("btd,df->btf", (128, 512), (512,), rngs=rngs)
        self.down = nnx.Linear(512, 128, rngs=rngs)
        self.each = nnx.Einsum("btnh,nhk->btnk", (4, 32, 32), (4, 32), rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        x = x + self.down(nnx.gelu(self.up(x)))
        return x + self.each(x.reshape(*x.shape[:-1], 4, 32)).reshape(x.shape)


def place(model: Layers, mesh) -> None:
    columns, rows = (P(None, "tensor"), P("tensor")), (P("tensor"), P())
    attention = model.attention
    for layer, (of_kernel, of_bias) in {
        **{each: columns for each in (attention.query, attention.key, attention.value, model.up)},
        **{each: rows for each in (attention.out, model.down)},
        model.each: (P("tensor"), P("tensor")),
    }.items():
        layer.kernel.set_value(jax.device_put(layer.kernel[...], NamedSharding(mesh, of_kernel)))
        layer.bias.set_value(jax.device_put(layer.bias[...], NamedSharding(mesh, of_bias)))


@pytest.mark.sample
@pytest.mark.parametrize("code", ["mxfp8_mxfp8_bf16", "fp8_e4m3fn_bf16_block_scale", "e4m3_bf16"])
@pytest.mark.parametrize("kind", list(AxisType)[:2], ids=lambda kind: kind.name)
def test_on_a_users_mesh_under_plain_jit_no_weight_is_gathered(kind, code):
    mesh = mesh_of(kind, data=2, tensor=4)
    one, split = Layers(), Layers()
    place(split, mesh)
    for model in (one, split):
        fp8x.quantize_model(model, code)
    assert split.attention.query.weight[...].sharding.spec[0] == "tensor"
    assert split.attention.out.weight[...].sharding.spec[1] == "tensor"
    x = jax.random.normal(jax.random.key(0), (4, 8, 128), jnp.bfloat16)
    expected = np.asarray(nnx.jit(lambda model, x: model(x))(one, x), np.float32)
    graphdef, state = nnx.split(split)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        program = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, x).compile()
        y = np.asarray(program(state, x), np.float32)
    assert np.linalg.norm(y - expected) < 2.0**-8 * np.linalg.norm(expected)
    assert not re.findall(r"= (?:f8|u8|s8)\S* all-gather", program.as_text())


def test_gradients_are_those_of_the_dequantized_kernel():
    source = filled(nnx.Einsum("btd,dnh->btnh", (32, 3, 5), (3, 5), rngs=nnx.Rngs(0)))
    layer = fp8x.quantize_model(source, EXACT["rows"])
    x = jnp.asarray(integers((2, 3, 32)))
    of_x = [jax.grad(lambda x, call=call: jnp.sum(call(x) ** 2))(x) for call in (layer, source)]
    np.testing.assert_array_equal(*of_x)
    of_bias = nnx.grad(lambda layer: jnp.sum(layer(x)))(layer)["bias"][...]
    np.testing.assert_array_equal(of_bias, np.full(15, 6))


class TestErrors:
    @pytest.mark.parametrize(
        ("equation", "shape", "message"),
        [
            ("btd,d->bt", (32,), "multiplies vectors: no dim of the kernel is in the output alone"),
            ("btd,d->btd", (32,), "contracts no dim of the kernel"),
            ("btd,...df->btf", (32, 5), "has an ellipsis in the kernel"),
            ("btd,df->bf", (32, 5), "sums the input over 't' alone"),
            ("...d,df->f", (32, 5), "sums over an ellipsis"),
            ("btd,dfg->btf", (32, 5, 2), "sums the kernel over 'g' alone"),
            ("btd,dff->btf", (32, 5, 5), "takes a diagonal"),
            ("btd,df->btf", (32, 5, 2), "names 2 dims of the kernel, which has 3"),
            ("btd,df->btfz", (32, 5), "has 'z' in the output alone"),
        ],
    )
    def test_equations_that_are_no_product_of_matrices(self, equation, shape, message):
        with pytest.raises(ShapeError, match=f"einsum_str: {equation!r} {message}".replace("...", r"\.\.\.")):
            fp8x.nn.Einsum(equation, shape, recipe="e4m3_bf16", rngs=nnx.Rngs(0))

    def test_an_input_that_does_not_fit(self):
        layer = fp8x.nn.Einsum("btd,df->btf", (32, 5), recipe="e4m3_bf16", rngs=nnx.Rngs(0))
        for shape in ((2, 3, 31), (2, 32), (1, 2, 3, 32)):
            with pytest.raises(ShapeError, match=r"x: shape \(.*\) does not fit the kernel \(32, 5\) of Einsum"):
                layer(jnp.zeros(shape))
        with pytest.raises(ShapeError, match="'tbd,df->btf' is not the equation that was quantized, 'btd,df->btf'"):
            layer(jnp.zeros((2, 3, 32)), "tbd,df->btf")
        layer = fp8x.nn.LinearGeneral((4, 8), 5, axis=(-2, -1), recipe="e4m3_bf16", rngs=nnx.Rngs(0))
        with pytest.raises(ShapeError, match=r"x: shape \(3, 8, 4\) does not fit the kernel .* LinearGeneral"):
            layer(jnp.zeros((3, 8, 4)))

    def test_sizes_that_the_recipe_does_not_fit(self):
        with pytest.raises(ShapeError, match=r"heads: dim 1 of shape \(96, 40\) is 40, which 32 does not divide"):
            fp8x.quantize_model(nnx.Dict(heads=nnx.LinearGeneral(40, (4, 24), rngs=nnx.Rngs(0))), "mxfp8_bf16")

    def test_a_scale_across_matrices_of_a_batch(self):
        """Three dims of a block reach over a batch of matrices, and fit no other layer."""
        recipe = dataclasses.replace(fp8x.recipe("e4m3_bf16"), weight=Scheme("e4m3", block=(None, None, None)))
        layer = fp8x.nn.Einsum("ecd,edf->ecf", (3, 32, 5), recipe=recipe, rngs=nnx.Rngs(0))
        assert math.prod(layer.weight_scale.shape) == 1
        with pytest.raises(ShapeError, match="has 2 dims, but block"):
            fp8x.nn.Einsum("btd,df->btf", (32, 5), recipe=recipe, rngs=nnx.Rngs(0))
