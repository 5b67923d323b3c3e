"""fp8x's layers inside a Linen model, through `flax.nnx.bridge`: what calibrates static activation scales there.

    python examples/linen_bridge.py

A Linen model that is to stay as it is: examples/quantize_linen_model.py.

A bridged layer keeps each type of its variables in a Linen collection of that name: the 8-bit weights in
`Float8Weight` and `WeightScale`, the static activation scale in `InputScale`, the bias in `params`.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.nnx import bridge

import fp8x
from fp8x import numerics


class Mlp(nn.Module):
    """Two dense layers; in 8 bits if there is a recipe."""

    hidden: int = 256
    recipe: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(self.dense(x, self.hidden, "up"))
        return self.dense(x, 64, "down")

    def dense(self, x, features: int, name: str):
        if self.recipe is None:
            return nn.Dense(features, name=name)(x)
        return bridge.to_linen(fp8x.nn.Linear, x.shape[-1], features, recipe=self.recipe, name=name)(x)


def quantize_params(params: dict, recipe: str) -> dict:
    """The variables of 8-bit layers from the parameters of `nn.Dense` layers."""
    weights = {
        name: fp8x.quantize(dense["kernel"].T, fp8x.recipe(recipe).weight)  # [K, N] in Flax, [N, K] in fp8x
        for name, dense in params.items()
    }
    return {
        "params": {name: {"bias": dense["bias"]} for name, dense in params.items()},
        "Float8Weight": {name: {"weight": weight.data} for name, weight in weights.items()},
        "WeightScale": {name: {"weight_scale": weight.scale} for name, weight in weights.items()},
    }


def calibrate(variables: dict, batches: Sequence[jax.Array], recipe: str) -> dict:
    """The variables with static activation scales from the amax of what the layers saw."""
    observing = Mlp(recipe=f"{recipe}_max_calibrate")
    step = jax.jit(lambda variables, x: observing.apply(variables, x, mutable=["Amax", "TokenCount"])[1])
    state = observing.init(jax.random.key(0), batches[0]) | variables
    for x in batches:
        state |= step(state, x)
    scheme = fp8x.recipe(recipe).activation
    scales = {
        name: {"input_scale": numerics.compute_scale(layer["amax"], scheme)} for name, layer in state["Amax"].items()
    }
    return variables | {"InputScale": scales}


def main() -> dict[str, float]:
    """Quantizes one dense model by several recipes; the relative error of each."""
    x = jax.random.normal(jax.random.key(0), (32, 64))
    dense = Mlp()
    params = dense.init(jax.random.key(1), x)["params"]
    expected = dense.apply({"params": params}, x)

    errors = {}
    for recipe in ("mxfp8_mxfp8_bf16", "e4m3_bf16", "e4m3_e4m3_bf16"):
        variables = quantize_params(params, recipe)
        if fp8x.recipe(recipe).is_static:
            variables = calibrate(variables, [x[:16], x[16:]], recipe)
        y = jax.jit(Mlp(recipe=recipe).apply)(variables, x)
        errors[recipe] = float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))
    return errors


if __name__ == "__main__":
    for recipe, error in main().items():
        print(f"{recipe:20} relative error {error:.2%}")
