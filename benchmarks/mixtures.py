"""Mixtures of experts as models have them: their shapes, how tokens spread over experts, and random layers of them."""

import dataclasses
import itertools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

import fp8x
from fp8x.benchmark import H200, Floor
from fp8x.nn import MoE
from fp8x.nn.quantized import QuantizedLayer
from fp8x.nn.walk import named_modules
from fp8x.scheme import E8M0, ELEMENTS, Scheme

Load = Literal["uniform", "hot"]

# Recipes by code, of bfloat16; None leaves the experts in it.
RECIPES = [code for code, recipe in fp8x.RECIPES.items() if recipe.out_dtype == jnp.bfloat16 and not recipe.observer]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The sizes of one MoE block, and how it routes."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    scores: str = "softmax"
    routed_scale: float = 1.0

    def active_experts(self, tokens: int, load: Load = "uniform") -> float:
        """How many experts some token visits, on average: each token draws `top_k` of them; or one is in every draw."""
        always = 1 if load == "hot" else 0
        others, drawn = self.experts - always, self.top_k - always
        return always + others * (1 - (1 - drawn / others) ** tokens) if others else always

    def expert_bytes(self, code: str | None) -> int:
        """Of one expert's matrices and their scales."""
        shapes = ((self.intermediate, self.hidden),) * 2 + ((self.hidden, self.intermediate),)
        if code is None:
            return 2 * sum(map(math.prod, shapes))
        scheme = fp8x.recipe(code).weight
        scales = sum(math.prod(scheme.scale_shape(shape)) for shape in shapes)
        return sum(map(math.prod, shapes)) + scales * scheme.scale_dtype.itemsize

    def floor(self, code: str | None, tokens: int, active: float) -> Floor:
        """The least that the experts are: matrices of `active` ones, tokens in and out, and the products' FLOPs.

        Tensor cores of sm_90 multiply in 16 bits where weights alone have 8, or blocks are those of MX.
        """
        recipe = None if code is None else fp8x.recipe(code)
        in_8_bits = recipe is not None and recipe.activation is not None and not recipe.weight.is_mx
        nbytes = active * self.expert_bytes(code) + 2 * 2 * tokens * self.hidden
        flops = 2 * 3 * tokens * self.top_k * self.hidden * self.intermediate
        return Floor(round(nbytes), flops, H200.fp8 if in_8_bits else H200.bf16)

    def layer(self, code: str | None, load: Load = "uniform") -> MoE:
        """With random weights, made in the bits that they are stored in."""
        moe = nnx.eval_shape(
            lambda: MoE(
                self.hidden,
                self.intermediate,
                self.experts,
                self.top_k,
                recipe=code,
                scores=self.scores,
                routed_scale=self.routed_scale,
                param_dtype=jnp.bfloat16,
                rngs=nnx.Rngs(0),
            )
        )
        randomize(moe)
        if load == "hot":
            # The first feature of every token is 1.
            moe.router.kernel[...] = moe.router.kernel[...].at[0, self.experts // 2].set(10)
        return moe

    def tokens(self, count: int, seed: int) -> Float[Array, "t h"]:
        """Random ones for `layer`."""
        x = jax.random.normal(jax.random.key(seed), (count, self.hidden), jnp.bfloat16)
        return x.at[:, 0].set(1)


MIXTURES = {
    "Mixtral 8x7B": Mixture(4096, 14336, 8, 2),
    "Mixtral 8x22B": Mixture(6144, 16384, 8, 2),
    "Qwen3-30B-A3B": Mixture(2048, 768, 128, 8),
    "Qwen3-235B-A22B": Mixture(4096, 1536, 128, 8),
    "DeepSeek-V3": Mixture(7168, 2048, 256, 8, "sigmoid", 2.5),
}
TINY = {"Mixtral 8x7B": Mixture(64, 96, 4, 2), "DeepSeek-V3": Mixture(64, 32, 8, 3, "sigmoid", 2.5)}


def randomize(model: nnx.Module) -> None:
    """Gives an abstract model random weights on the device, of variance 1/K; those in 8 bits never were in more.

    Static activation scales are for inputs of variance 1; norms multiply by 1, and biases are 0.
    """
    keys = map(jax.random.key, itertools.count())
    for _, module in named_modules(model):
        if isinstance(module, QuantizedLayer):
            scheme, k = module.weight_scheme, module.weight.shape[-1]
            module.weight.set_value(_codes(scheme, module.weight.shape, next(keys)))
            module.weight_scale.set_value(_scales(scheme, k, module.weight_scale.shape, next(keys)))
            if module.input_scale is not None:
                scale = 1.0 if module.recipe.activation.scale_rule == "unit" else 4 / module.recipe.activation.max
                module.input_scale.set_value(jnp.full(module.input_scale.shape, scale, jnp.float32))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        abstract = variable.get_value()
        if not isinstance(abstract, jax.ShapeDtypeStruct):
            continue
        if abstract.ndim > 1:  # nnx.Linear holds [K, N]
            k = abstract.shape[0 if path[-1] == "kernel" else -1]
            variable.set_value(_normal(abstract.shape, abstract.dtype, k**-0.5, next(keys)))
        else:
            variable.set_value(jnp.full(abstract.shape, path[-1] == "scale", abstract.dtype))


# Codes of 0x20 to 0x3f: eight octaves of e5m2 up to 1.75, four of e4m3 up to 1.875; their root mean squares.
_FIRST, _MASK = 0x20, 0x1F
_RMS = {"e4m3": 0.845, "e5m2": 0.573}


@jax.jit(static_argnums=(0, 1))
def _codes(scheme: Scheme, shape: tuple[int, ...], key) -> Float[Array, "..."]:
    first = _FIRST
    if scheme.scale_rule == "unit":  # the codes themselves have to be as small as 1/sqrt(K)
        octaves = min(int(math.log2(shape[-1]) / 2), (_FIRST >> ELEMENTS[scheme.element].mantissa_bits) - 1)
        first -= octaves << ELEMENTS[scheme.element].mantissa_bits
    bits = jax.random.bits(key, shape, jnp.uint8)
    return jax.lax.bitcast_convert_type((bits & 0x80) | ((bits & _MASK) + np.uint8(first)), scheme.dtype)


@jax.jit(static_argnums=(0, 1, 2))
def _scales(scheme: Scheme, k: int, shape: tuple[int, ...], key) -> Float[Array, "..."]:
    mean = k**-0.5 / _RMS[scheme.element]
    if scheme.is_mx:
        first = 127 + round(math.log2(mean)) - 1
        return jax.lax.bitcast_convert_type(jax.random.randint(key, shape, first, first + 3).astype(jnp.uint8), E8M0)
    if scheme.scale_rule == "unit":
        return jnp.ones(shape, jnp.float32)
    return jax.random.uniform(key, shape, minval=0.5 * mean, maxval=1.5 * mean)


@jax.jit(static_argnums=(0, 1, 2))
def _normal(shape: tuple[int, ...], dtype, scale: float, key) -> Float[Array, "..."]:
    return scale * jax.random.normal(key, shape, dtype)
