"""LoRA on a base in 8 bits: adapters are trained, and the base keeps every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from metric import as_bits

import fp8x
from fp8x.nn import Float8Weight, WeightScale

X = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
CODES = ("mxfp8_bf16", "e4m3_e4m3_bf16_dynamic")


class OfLayers(nnx.Module):
    """Adapters inside their layers, `nnx.LoRALinear`."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.LoRALinear(64, 96, lora_rank=4, rngs=rngs)
        self.down = nnx.LoRALinear(96, 64, lora_rank=4, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class AroundLayers(OfLayers):
    """Adapters around layers, `nnx.LoRA`."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        up, down = nnx.Linear(64, 96, rngs=rngs), nnx.Linear(96, 64, rngs=rngs)
        self.up = nnx.LoRA(64, 4, 96, base_module=up, rngs=rngs)
        self.down = nnx.LoRA(96, 4, 64, base_module=down, rngs=rngs)


def mse(model, x):
    return jnp.mean((model(x).astype(jnp.float32) - jnp.roll(x, 1, -1)) ** 2)


value_and_grad = nnx.value_and_grad(mse, argnums=nnx.DiffState(0, nnx.LoRAParam))


@pytest.mark.parametrize("kind", [OfLayers, AroundLayers])
def test_the_base_is_quantized_and_the_adapter_stays(kind):
    model, before = kind(), kind()
    fp8x.quantize_model(model, "mxfp8_bf16")
    rows = {row.path: row for row in fp8x.report(model).rows}
    bases = {path for path, row in rows.items() if row.recipe == fp8x.recipe("mxfp8_bf16")}
    inside = ".base_module" if kind is AroundLayers else ""
    assert bases == {f"up{inside}.weight", f"down{inside}.weight"}
    assert {row.reason for path, row in rows.items() if path not in bases} == {"an adapter, which is trained"}
    adapters = (nnx.to_flat_state(nnx.state(each, nnx.LoRAParam)) for each in (model, before))
    for (path, one), (other_path, other) in zip(*adapters, strict=True):
        assert path == other_path and type(one) is nnx.LoRAParam
        np.testing.assert_array_equal(one[...], other[...])


@pytest.mark.sample
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("kind", [OfLayers, AroundLayers])
def test_only_adapters_are_trained(kind, code):
    model = fp8x.quantize_model(kind(), code)
    base = nnx.filterlib.Any(Float8Weight, WeightScale)
    before = jax.tree.map(as_bits, nnx.as_pure(nnx.state(model, base)))
    biases = jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, x):
        loss, gradients = value_and_grad(model, x)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer, X)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    after = jax.tree.map(as_bits, nnx.as_pure(nnx.state(model, base)))
    assert len(jax.tree.leaves(after)) == 4
    jax.tree.map(np.testing.assert_array_equal, after, before)
    same = nnx.as_pure(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))
    jax.tree.map(np.testing.assert_array_equal, same, biases)


@pytest.mark.parametrize("kind", [OfLayers, AroundLayers])
def test_gradients_are_of_adapters_alone_and_those_of_the_dequantized_base(kind):
    model, plain = fp8x.quantize_model(kind(), "e4m3_bf16"), kind()
    for name in ("up", "down"):
        layer, linear = getattr(model, name), getattr(plain, name)
        layer, linear = getattr(layer, "base_module", layer), getattr(linear, "base_module", linear)
        linear.kernel[...] = layer.quantized_weight.dequantize().T
    (loss, actual), (same, expected) = (nnx.jit(value_and_grad)(each, X) for each in (model, plain))
    np.testing.assert_allclose(loss, same, rtol=1e-2)
    names = {path[-1] for path, _ in nnx.to_flat_state(actual)}
    assert names == {"lora_a", "lora_b"}
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(one - other) <= 0.03 * np.linalg.norm(other)  # activations are rounded to 16 bits


def test_remat():
    model = fp8x.quantize_model(OfLayers(), "mxfp8_mxfp8_bf16")

    def by_remat(model, x):
        y = nnx.remat(lambda model, x: model(x))(model, x)
        return jnp.mean((y.astype(jnp.float32) - jnp.roll(x, 1, -1)) ** 2)

    _, expected = nnx.jit(value_and_grad)(model, X)
    actual = nnx.jit(nnx.grad(by_remat, argnums=nnx.DiffState(0, nnx.LoRAParam)))(model, X)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_adapters_beside_a_base_in_training():
    model = fp8x.quantize_model(OfLayers(), fp8x.Recipe(fp8x.Scheme("e4m3", block=(1, None)), master_weights=True))
    y = nnx.jit(lambda model, x: model(x))(model, X)
    lora = model.up.source.lora
    fp8x.nn.finish_training(model)
    assert isinstance(model.up, fp8x.nn.LoRALinear) and model.up.lora is lora
    np.testing.assert_array_equal(as_bits(nnx.jit(lambda model, x: model(x))(model, X)), as_bits(y))
