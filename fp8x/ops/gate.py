"""The gate of an MLP: `activation(gate) * up`, in one rounding."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fp8x.errors import ShapeError
from fp8x.numerics import rounded

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class ClampedSwiGLU:
    """gpt-oss's gate: `g * sigmoid(alpha * g) * (u + 1)` of `g = min(gate, limit)` and `u = clip(up, -limit, limit)`.

    Source: `GptOssExperts` of transformers' `modeling_gpt_oss.py`.

    Raises:
        ShapeError: an alpha or a limit that is no positive number.
    """

    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self):
        for name in ("alpha", "limit"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ShapeError(f"{name}: {value!r} does not fit; use a positive number")

    def __call__(
        self, gate: Float[Array, "..."], up: Float[Array, "..."], *, sigmoid: Callable = jax.nn.sigmoid
    ) -> Float[Array, "..."]:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * sigmoid(gate * self.alpha) * (up + 1)


Gate = str | ClampedSwiGLU


def gate_activation(name: str):
    """The gate's activation by its Hugging Face name.

    Raises:
        ShapeError: an unknown name.
    """
    if name not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ShapeError(f"activation: {name!r} is unknown; use one of {known}, or a fp8x.ops.ClampedSwiGLU")
    return ACTIVATIONS[name]


def check_gate(gate: Gate) -> Gate:
    """A gate, as it came: the name of an activation, or a `ClampedSwiGLU`.

    Raises:
        ShapeError: an unknown name.
    """
    if not isinstance(gate, ClampedSwiGLU):
        gate_activation(gate)
    return gate


def apply_gate(gate: Float[Array, "..."], up: Float[Array, "..."], activation: Gate) -> Float[Array, "..."]:
    """`activation(gate) * up`, or what a `ClampedSwiGLU` makes of both; in their type."""
    return activation(gate, up) if isinstance(activation, ClampedSwiGLU) else gate_activation(activation)(gate) * up


def gated(gate_up: Float[Array, "m 2 i"], activation: Gate) -> Float[Array, "m i"]:
    """`apply_gate` in float32, rounded once to `gate_up`'s type.

    In 16 bits XLA would round after every operation or after some, depending on the backend and on what is fused.
    """
    gate_up = rounded(gate_up)
    gate, up = gate_up[:, 0].astype(jnp.float32), gate_up[:, 1].astype(jnp.float32)
    return rounded(apply_gate(gate, up, activation).astype(gate_up.dtype))


def _sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    # A GPU has instructions for 2^x and 1/sqrt(x), but divides in six.
    root = jax.lax.rsqrt(1 + jnp.exp(-x))
    return root * root


# Activations for kernels, a third of the instructions: within 2^-20 of those above, relatively, in float32. The second
# is the same function: (1 + tanh(u)) / 2 = sigmoid(2 u).
KERNEL_ACTIVATIONS = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu_pytorch_tanh": lambda x: x * _sigmoid(x * (1.5957691216 + 0.0713548163 * (x * x))),
}


def not_in_kernels(gate: Gate) -> str | None:
    """Why kernels do not apply a gate; None if they do."""
    if isinstance(gate, ClampedSwiGLU) or gate in KERNEL_ACTIVATIONS:
        return None
    return f"applies {', '.join(KERNEL_ACTIVATIONS)} or a ClampedSwiGLU, not {gate}"


@functools.cache  # equal gates are one function, by which compiled kernels are found again
def kernel_gate(gate: Gate) -> Callable[[Float[Array, "..."], Float[Array, "..."]], Float[Array, "..."]]:
    """The gate for kernels, a function of gate and up in float32: within 2^-20 of `apply_gate`, relatively.

    NaN stays NaN, also where a `ClampedSwiGLU` clamps: PTX's `min` and `max` would return the limit, but Mosaic lowers
    jnp's to `min.NaN` and `max.NaN`.
    """
    if isinstance(gate, ClampedSwiGLU):
        return functools.partial(gate, sigmoid=_sigmoid)
    activation = KERNEL_ACTIVATIONS[gate]
    return lambda gate, up: activation(gate) * up
