"""Your own Flax Linen model in FP8: params in, params out, the model's code as it is.

python examples/quantize_linen_model.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import fp8x


class Block(nn.Module):
    """Attention over one sequence, then two dense layers."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attn")(h, mask=nn.make_causal_mask(h[..., 0]))
        h = nn.gelu(nn.Dense(256, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(64, name="down")(h), None


class Decoder(nn.Module):
    """Three blocks as one stack, rematerialized."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(128, 64, name="embed")(ids)
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(128, name="lm_head")(x)


def main() -> dict[str, float]:
    """Quantizes the model by several recipes; the relative error of each."""
    model, ids = Decoder(), jax.random.randint(jax.random.key(0), (8, 16), 0, 128)
    variables = model.init(jax.random.key(1), ids)
    expected = model.apply(variables, ids)

    errors = {}
    for recipe in ("mxfp8_mxfp8_bf16", "e4m3_bf16", "fp8_e4m3fn_bf16_block_scale"):
        rules = {r"layers\.down": "e4m3_e4m3_bf16_dynamic"}
        quantized = fp8x.linen.quantize(model, variables, recipe, rules, args=(ids,))
        y = jax.jit(fp8x.linen.Quantized(model).apply)(quantized, ids)
        errors[recipe] = float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))
    print(fp8x.linen.report(model, quantized, recipe, rules, args=(ids,)))
    return errors


if __name__ == "__main__":
    for recipe, error in main().items():
        print(f"{recipe:27} relative error {error:.2%}")
