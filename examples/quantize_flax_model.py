"""Your own Flax NNX model in FP8: teach fp8x a module type, quantize, calibrate, compile.

python examples/quantize_flax_model.py
"""

import jax
import jax.numpy as jnp
from flax import nnx

import fp8x
from fp8x import numerics


class HeadsLinear(nnx.Module):
    """A projection into heads, `[..., K] -> [..., heads, D]`: a type that fp8x does not know."""

    def __init__(self, k: int, heads: int, d: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (k, heads * d)).reshape(k, heads, d))

    def __call__(self, x):
        return jnp.einsum("...k,khd->...hd", x, self.kernel[...])


class QuantizedHeadsLinear(nnx.Module):
    """The same in 8 bits: one `fp8x.nn.Linear` over all heads."""

    def __init__(self, linear: fp8x.nn.Linear, heads: int):
        self.linear, self.heads = linear, heads

    def __call__(self, x):
        return self.linear(x).reshape(*x.shape[:-1], self.heads, -1)


@fp8x.nn.register(HeadsLinear)
def quantize_heads(module: HeadsLinear, recipe: fp8x.Recipe, *, name: str, allow_nonfinite: bool):
    """What `quantize_model` calls for every `HeadsLinear`; `name` is its path, for errors."""
    k, heads, d = module.kernel.shape
    matrix = module.kernel[...].reshape(k, heads * d).T  # [N, K]: K-major, as Hugging Face stores matrices
    weight = numerics.quantize_weight(matrix, recipe.weight, name=name, allow_nonfinite=allow_nonfinite)
    return QuantizedHeadsLinear(fp8x.nn.Linear.from_arrays(weight, recipe), heads)


class Block(nnx.Module):
    """Attention over one sequence, then a mixture of experts."""

    def __init__(self, features: int = 64, heads: int = 4, *, rngs: nnx.Rngs):
        d = features // heads
        self.q, self.k, self.v = (HeadsLinear(features, heads, d, rngs=rngs) for _ in range(3))
        self.out = nnx.Linear(features, features, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(features, rngs=rngs) for _ in range(2)])
        self.moe = fp8x.nn.MoE(features, 2 * features, num_experts=4, top_k=2, rngs=rngs)

    def __call__(self, x):
        h = self.norms[0](x)
        heads = jax.nn.dot_product_attention(self.q(h), self.k(h), self.v(h), is_causal=True)
        x = x + self.out(heads.reshape(x.shape))
        return x + self.moe(self.norms[1](x))


def main() -> dict[str, float]:
    """Quantizes the model by several recipes; the relative error of each."""
    x = jax.random.normal(jax.random.key(0), (8, 16, 64), jnp.bfloat16)
    forward = nnx.jit(lambda model, x: model(x).astype(jnp.float32))
    expected = forward(Block(rngs=nnx.Rngs(0)), x)

    errors = {}
    for recipe in ("mxfp8_mxfp8_bf16", "e4m3_bf16", "e4m3_e4m3_bf16"):
        model = fp8x.quantize_model(Block(rngs=nnx.Rngs(0)), recipe, rules={"out": "e4m3_e4m3_bf16_dynamic"})
        if fp8x.recipe(recipe).is_static:
            fp8x.calibrate(model, [x[:4], x[4:]])
        errors[recipe] = float(jnp.linalg.norm(forward(model, x) - expected) / jnp.linalg.norm(expected))
    return errors


if __name__ == "__main__":
    for recipe, error in main().items():
        print(f"{recipe:20} relative error {error:.2%}")
