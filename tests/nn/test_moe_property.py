"""Any routing, any number of experts up to 256, up to 8 a token: `MoE` against float64, a row at a time in numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from metric import assert_close, float64
from shapes import quantize

import fp8x
from fp8x.nn.routing import MAX_COMPARED

HIDDEN, INTERMEDIATE = 32, 64
CODES = ["mxfp8_mxfp8_bf16", "e4m3_e4m3_bf16_dynamic", "fp8_e4m3fn_bf16_block_scale", "e4m3_bf16"]
# (tokens, experts, top-k): one token; fewer rows than experts; sorted by comparing; sorted by sorting; one expert.
SIZES = [(1, 256, 8), (7, 256, 8), (40, 32, 4), (160, 16, 4), (9, 1, 1)]
FAST = [(1, CODES[0]), (40, CODES[2]), (160, CODES[3])]
combine = nnx.jit(lambda moe, *routed: moe.combine(*routed))


@functools.cache
def moe_of(experts: int, top_k: int, code: str) -> fp8x.nn.MoE:
    """Experts of different magnitude, and float32 between the products: steps of 8 bits are the only rounding."""
    recipe = dataclasses.replace(fp8x.recipe(code), out_dtype=jnp.float32)
    moe = fp8x.nn.MoE(HIDDEN, INTERMEDIATE, experts, top_k, rngs=nnx.Rngs(0))
    for layer in (moe.w13, moe.w2):
        layer.weight[...] *= jnp.linspace(0.5, 2, experts).reshape(-1, *(1,) * (layer.weight.ndim - 1))
    return fp8x.quantize_model(moe, recipe)


def expected(moe, tokens, weights, experts) -> np.ndarray:
    w13, w2 = float64(moe.w13.quantized_weight), float64(moe.w2.quantized_weight)
    x = _as_multiplied(moe.w13, tokens)[:, None]
    gate, up = np.moveaxis(
        np.einsum("tkh,tkpih->tkpi", np.broadcast_to(x, (*experts.shape, HIDDEN)), w13[experts]), 2, 0
    )
    h = (gate / (1 + np.exp(-gate)) * up).reshape(-1, INTERMEDIATE)
    h = _as_multiplied(moe.w2, jnp.asarray(h, jnp.float32)).reshape(*experts.shape, INTERMEDIATE)
    return np.einsum("tki,tkhi,tk->th", h, w2[experts], weights)


def _as_multiplied(layer, x) -> np.ndarray:
    return float64(x if layer.recipe.activation is None else quantize(x, layer.recipe.activation))


@st.composite
def routings(draw, tokens: int, num_experts: int, top_k: int):
    """Distinct experts for every token: the same ones for all, all in turn, or at random among some."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    match draw(st.sampled_from(["hot", "round", "random"])):
        case "hot":
            experts = np.tile(rng.permutation(num_experts)[:top_k], (tokens, 1))
        case "round":
            experts = np.arange(tokens * top_k).reshape(tokens, top_k) % num_experts
        case "random":
            used = rng.permutation(num_experts)[: draw(st.integers(top_k, num_experts))]
            experts = np.stack([rng.permutation(used)[:top_k] for _ in range(tokens)])
    x = rng.normal(size=(tokens, HIDDEN)) * np.exp(rng.normal(size=(tokens, 1)))
    weights = draw(st.sampled_from([0.0, 1.0])) + rng.random((tokens, top_k))
    return np.float32(x), np.float32(weights), np.int32(experts)


@pytest.mark.sample
@pytest.mark.parametrize(
    ("sizes", "code"),
    [
        pytest.param(sizes, code, marks=() if (sizes[0], code) in FAST else pytest.mark.slow)
        for sizes in SIZES
        for code in CODES
    ],
    ids=str,
)
def test_any_routing(sizes, code):
    tokens, num_experts, top_k = sizes
    assert (tokens * top_k > MAX_COMPARED) == (tokens == 160)
    moe = moe_of(num_experts, top_k, code)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(routed=routings(*sizes))
    def check(routed):
        y = combine(moe, *map(jnp.asarray, routed))
        # Float32 sums put one element in a million of w2's input to the other side of a step: 6 % of it.
        assert_close(y, expected(moe, *routed), tolerance=5e-3)

    check()


@pytest.mark.slow
def test_no_host_and_no_shape_that_depends_on_data():
    """One compiled function for every routing: what a CUDA graph needs."""
    moe = moe_of(32, 4, CODES[0])
    graphdef, state = nnx.split(moe)
    step = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40, HIDDEN)), jnp.float32)
    with jax.transfer_guard("disallow"):
        for batch in x:
            step(state, batch)
    assert step._cache_size() == 1
    text = step.lower(state, x[0]).as_text()
    assert "callback" not in text and "?x" not in text
