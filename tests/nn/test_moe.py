"""`fp8x.nn.MoE` against a dense float64 mixture: every token by every expert, in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from metric import assert_close, float64, on_tensor_cores, relative_error
from shapes import quantize, quantize_with_scale

import fp8x
from fp8x.errors import CalibrationError, ShapeError
from fp8x.ops.gate import ACTIVATIONS, ClampedSwiGLU
from fp8x.scheme import Scheme

CODES = [code for code in fp8x.RECIPES if "_f32" not in code]
CLAMPED = ClampedSwiGLU(limit=0.7)  # which a quarter of the products passes
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 96, 4, 2
forward = nnx.jit(lambda moe, x: moe(x))


def moe_of(recipe=None, *, hidden=HIDDEN, intermediate=INTERMEDIATE, **options) -> fp8x.nn.MoE:
    """A layer with random biases, if any; converted, and calibrated on `tokens(65)`, if a recipe is given."""
    moe = fp8x.nn.MoE(hidden, intermediate, EXPERTS, options.pop("top_k", TOP_K), rngs=nnx.Rngs(0), **options)
    for i, (_, bias) in enumerate(sorted(nnx.to_flat_state(nnx.state(moe, lambda path, _: path[-1] == "bias")))):
        bias[...] = jax.random.normal(jax.random.key(i), bias.shape)
    if moe.correction_bias is not None:
        moe.correction_bias[...] = jnp.linspace(0.3, -0.3, EXPERTS)
    if recipe is not None:
        fp8x.quantize_model(moe, recipe)
        if moe.w13.recipe.is_static and not moe.w13.is_calibrating:
            fp8x.calibrate(moe, [tokens(65, hidden=hidden)])
    return moe


def tokens(count, dtype=jnp.float32, hidden=HIDDEN, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, hidden)), dtype)


def dense(moe, x) -> np.ndarray:
    """The mixture in float64; what a recipe quantizes is quantized, from the float64 values."""
    x = float64(x)
    logits = x @ float64(moe.router.kernel[...]) + (0 if moe.router.bias is None else float64(moe.router.bias[...]))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = 1 / (1 + np.exp(-logits)) if moe.scores == "sigmoid" else p / p.sum(-1, keepdims=True)
    bias = 0.0 if moe.correction_bias is None else float64(moe.correction_bias[...])
    chosen = np.argsort(-(p + bias), axis=-1, kind="stable")[:, : moe.top_k]
    weights = np.zeros_like(p)
    np.put_along_axis(weights, chosen, np.take_along_axis(p, chosen, -1), -1)
    if moe.normalize_top_k:
        weights /= weights.sum(-1, keepdims=True)
    weights *= moe.routed_scale
    y = np.zeros_like(x)
    for e in range(moe.num_experts):
        gate_up = product(moe.w13, e, x)
        y += weights[:, e, None] * product(moe.w2, e, gated(moe.activation, gate_up[:, 0], gate_up[:, 1]))
    if moe.shared is not None:
        kernels = [float64(getattr(moe.shared, name).kernel[...]) for name in ("gate_proj", "up_proj", "down_proj")]
        gate, up = x @ kernels[0], x @ kernels[1]
        y += gated(moe.activation, gate, up) @ kernels[2]
    return y


def gated(activation, gate, up) -> np.ndarray:
    """What lies between an expert's products, in float64."""
    if isinstance(activation, ClampedSwiGLU):
        gate, up = np.minimum(gate, activation.limit), np.clip(up, -activation.limit, activation.limit)
        return gate / (1 + np.exp(-activation.alpha * gate)) * (up + 1)
    return float64(ACTIVATIONS[activation](jnp.asarray(gate, jnp.float32))) * up


def product(layer, e, x) -> np.ndarray:
    """`x` by one expert's matrices, and its biases."""
    is_quantized = isinstance(layer, fp8x.nn.GroupedLinear)
    if is_quantized and (activation := layer.recipe.activation) is not None:
        x = jnp.asarray(x, jnp.float32)
        if layer.recipe.is_static:
            x = quantize_with_scale(x, layer.input_scale[...], activation)
        else:
            x = quantize(x, activation)
    w = float64(layer.quantized_weight if is_quantized else layer.weight[...])[e]
    y = np.einsum("mk,...nk->m...n", float64(x), w)
    return y if layer.bias is None else y + float64(layer.bias[e])


@pytest.mark.sample
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(normalize_top_k=False, use_bias=True),
        dict(top_k=1, activation="gelu"),
        dict(top_k=EXPERTS, activation="relu", use_bias=True),
        dict(shared_intermediate=32, activation="gelu_pytorch_tanh"),
        dict(scores="sigmoid", routed_scale=2.5, use_correction_bias=True),
        dict(activation=ClampedSwiGLU(1.5, 0.8), use_bias=True, router_bias=True),
    ],
    ids=str,
)
def test_unquantized_is_the_dense_mixture(options):
    moe, x = moe_of(**options), tokens(65)
    y = moe(x)
    assert y.dtype == jnp.float32
    assert_close(y, dense(moe, x), tolerance=1e-6)


@pytest.mark.sample
@pytest.mark.parametrize(
    ("index", "code"),
    # Those with float16 differ from bfloat16's in that alone.
    [pytest.param(*case, marks=pytest.mark.slow if "_f16" in case[1] else ()) for case in enumerate(CODES)],
    ids=str,
)
def test_every_recipe_in_jit(index, code):
    moe = moe_of(code, use_bias=index % 2 == 0, intermediate=192 if code.endswith("block_scale") else 96)
    dtype = moe.w13.recipe.out_dtype
    x = tokens((65, 1, 64, 63)[index % 4], dtype)
    y = forward(moe, x)
    assert y.dtype == dtype and y.shape == x.shape
    if moe.w13.is_calibrating:
        for layer in (moe.w13, moe.w2):
            layer.finish_calibration()
    # Every intermediate is rounded to 16 bits, and now and then falls to the other side of an 8-bit step by that.
    assert_close(y, dense(moe, x), tolerance=4e-2)


@pytest.mark.sample
@pytest.mark.parametrize("code", ["e4m3_e4m3_bf16", "fp8_e4m3fn_bf16_block_scale", "mxfp8_mxfp8_bf16"])
def test_with_float32_between_the_products_nothing_falls_aside(code):
    moe, x = moe_of(dataclasses.replace(fp8x.recipe(code), out_dtype=jnp.float32)), tokens(65)
    # By shorter sums in w13 a code of w2's input falls aside here and there.
    tolerance = 5e-3 if on_tensor_cores(moe.w13.recipe.activation) else 5e-6
    assert_close(forward(moe, x), dense(moe, x), tolerance=tolerance)


@pytest.mark.sample
@pytest.mark.parametrize("code", [None, "e4m3_e4m3_bf16", "mxfp8_mxfp8_bf16"])
def test_no_tokens(code):
    moe = moe_of(code, use_bias=True, shared_intermediate=32)
    assert forward(moe, tokens(0)).shape == (0, HIDDEN)
    assert moe(jnp.zeros((2, 0, HIDDEN))).shape == (2, 0, HIDDEN)


@pytest.mark.sample
@pytest.mark.parametrize("block", [(None, None, None), (128, 128)], ids=str)
def test_weight_only_in_float32_is_exact(block):
    """Nothing is rounded but the weights: one scale for all experts, and 128-blocks over 96 rows of gate and of up."""
    weight = Scheme("e4m3", block=block)
    moe, x = moe_of(fp8x.Recipe(weight, out_dtype=jnp.float32), use_bias=True), tokens(33)
    assert_close(moe(x), dense(moe, x), tolerance=1e-6)
    made = fp8x.nn.MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, recipe=fp8x.Recipe(weight), rngs=nnx.Rngs(0))
    assert made.w13.weight_scale.shape == moe.w13.weight_scale.shape


@pytest.mark.sample
@pytest.mark.parametrize("code", [None, "mxfp8_mxfp8_bf16", "e4m3_bf16"])
def test_a_hot_expert_and_empty_ones(code):
    moe, x = moe_of(code, top_k=1, use_bias=True), tokens(300)
    moe.router.kernel[...] = jnp.zeros_like(moe.router.kernel[...]).at[0, 2].set(100.0)
    x = x.at[:, 0].set(1.0)
    assert (moe.route(x)[1] == 2).all()
    assert_close(moe(x), dense(moe, x), tolerance=4e-2 if code else 1e-6)


@pytest.mark.sample
@pytest.mark.parametrize("code", [None, "e4m3_e4m3_bf16", "fp8_e4m3fn_bf16_block_scale"])
def test_a_token_alone_is_the_token_in_a_batch(code):
    moe, x = moe_of(code, use_bias=True), tokens(65)
    y = float64(forward(moe, x))
    for i in (0, 64):
        # 8-bit steps of what w2 reads: a sum in another order may fall to the other side of one.
        assert relative_error(forward(moe, x[i]), y[i]) < (4e-2 if code else 1e-6)


@pytest.mark.sample
@pytest.mark.parametrize("code", ["e4m3_bf16", "mxfp8_mxfp8_bf16"])
def test_one_token_goes_unsorted_and_sees_the_same_experts(no_gpu, code):
    moe = moe_of(dataclasses.replace(fp8x.recipe(code), out_dtype=jnp.float32), use_bias=True)
    x = tokens(1, seed=3)
    names = {choice.kernel for choice in fp8x.ops.explain(moe, x)}
    assert names == {"xla_expert_matmul"}
    alone, twice = forward(moe, x), forward(moe, jnp.concatenate([x, x]))
    assert_close(alone, float64(twice[:1]), tolerance=1e-6)
    assert_close(alone, dense(moe, x), tolerance=5e-6)


def test_the_router_is_never_quantized_and_the_shared_expert_is():
    for moe in (
        moe_of("mxfp8_bf16", shared_intermediate=32),
        fp8x.nn.MoE(64, 32, 4, 2, recipe="mxfp8_bf16", shared_intermediate=32, rngs=nnx.Rngs(0)),
    ):
        assert type(moe.router) is nnx.Linear
        assert isinstance(moe.shared.down_proj, fp8x.nn.Linear) and isinstance(moe.shared.gate_proj, fp8x.nn.Linear)


@pytest.mark.slow
def test_quantized_stays_near_unquantized():
    x = tokens(65)
    truth = dense(moe_of(shared_intermediate=32), x)
    for code, limit in [("e4m3_bf16", 0.05), ("mxfp8_mxfp8_bf16", 0.08)]:
        assert relative_error(forward(moe_of(code, shared_intermediate=32), x), truth) < limit


@pytest.mark.slow
def test_leading_dims_and_vmap():
    moe, x = moe_of("mxfp8_mxfp8_bf16", use_bias=True), tokens(6).reshape(2, 3, HIDDEN)
    y = moe(x)
    assert y.shape == x.shape
    assert relative_error(jax.vmap(moe)(x), y) < 2e-2


def test_calibration_is_inference_with_the_running_scale():
    moe = fp8x.quantize_model(moe_of(use_bias=True), "e4m3_e4m3_bf16_max_calibrate")
    x = tokens(17)
    observed = forward(moe, x)
    assert moe.w13.tokens[...].sum() == 17 * TOP_K
    for layer in (moe.w13, moe.w2):
        layer.finish_calibration()
    np.testing.assert_array_equal(forward(moe, x), observed)


def test_uncalibrated():
    moe = fp8x.nn.MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, recipe="e4m3_e4m3_bf16", rngs=nnx.Rngs(0))
    with pytest.raises(CalibrationError, match=r"the layer \[64 -> 96\] is not calibrated"):
        moe(tokens(2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(top_k=5), "top_k: 5 does not fit 4 experts; use 1 to 4"),
        (dict(top_k=0), "top_k: 0"),
        (dict(scores="tanh"), "scores: 'tanh' is unknown; use one of 'softmax', 'sigmoid'"),
        (dict(activation="swiglu"), "activation: 'swiglu' is unknown; use one of 'silu'"),
        (
            dict(recipe="mxfp8_bf16", intermediate=48),
            r"w2, \[num_experts, hidden, intermediate\]: dim 2 .* is 48",
        ),
        (dict(recipe="mxfp8_bf16", hidden=80), r"w13, \[num_experts, intermediate, hidden\]: dim 2 .* is 80"),
    ],
)
def test_errors_name_the_size(options, match):
    sizes = dict(hidden=64, intermediate=96, num_experts=4, top_k=2)
    with pytest.raises(ShapeError, match=match):
        fp8x.nn.MoE(**(sizes | options), rngs=nnx.Rngs(0))


class TestGradient:
    """Fine-tuning what is not quantized, through frozen experts in 8 bits."""

    def gradients(self, moe, x):
        target = tokens(x.shape[0], seed=1)
        grad = nnx.grad(lambda moe, x: jnp.mean((moe(x) - target) ** 2), argnums=(nnx.DiffState(0, nnx.Param), 1))
        return nnx.jit(grad)(moe, x)

    def dequantized(self, moe):
        """The same mixture with its dequantized weights, unquantized."""
        plain = moe_of(use_bias=True, activation=moe.activation)
        plain.router.kernel[...] = moe.router.kernel[...]
        for name in ("w13", "w2"):
            layer = getattr(moe, name)
            getattr(plain, name).weight[...] = layer.quantized_weight.dequantize()
            getattr(plain, name).bias[...] = layer.bias[...]
        return plain

    @pytest.mark.sample
    @pytest.mark.parametrize(
        ("code", "activation"),
        [("e4m3_bf16", "silu"), ("e4m3_bf16", CLAMPED), ("mxfp8_mxfp8_bf16", "silu"), ("e4m3_e4m3_bf16", CLAMPED)],
        ids=str,
    )
    def test_is_that_of_the_dequantized_mixture(self, code, activation):
        limit = 1e-5 if code == "e4m3_bf16" else 0.15  # activations in 8 bits are off by that much themselves
        recipe = dataclasses.replace(fp8x.recipe(code), out_dtype=jnp.float32)
        moe = moe_of(recipe, use_bias=True, activation=activation)
        x = tokens(33)
        (params, dx), (plain, plain_dx) = self.gradients(moe, x), self.gradients(self.dequantized(moe), x)
        assert set(params) == {"router", "w13", "w2"}
        assert relative_error(dx, plain_dx) < limit
        for name, leaf in [("router", "kernel"), ("w13", "bias"), ("w2", "bias")]:
            assert relative_error(params[name][leaf][...], plain[name][leaf][...]) < limit


def test_input_of_another_width_is_named():
    moe = fp8x.nn.MoE(64, 32, 4, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ShapeError, match=r"x: shape is \(3, 32\), but the layer takes \[..., 64\]"):
        moe(jnp.ones((3, 32)))
