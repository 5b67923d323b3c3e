"""The gate of an MLP: `activation(gate) * up`, in one rounding."""

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


def gate_activation(name: str):
    """The gate's activation by its Hugging Face name.

    Raises:
        ShapeError: an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ShapeError(f"activation: {name!r} is unknown; use one of {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[name]


def gated(gate_up: Float[Array, "m 2 i"], activation: str) -> Float[Array, "m i"]:
    """`activation(gate) * up` in float32, rounded once to `gate_up`'s type.

    In 16 bits XLA would round after every operation or after some, depending on the backend and on what is fused.
    """
    gate_up = rounded(gate_up)
    gate, up = gate_up[:, 0].astype(jnp.float32), gate_up[:, 1].astype(jnp.float32)
    return rounded((gate_activation(activation)(gate) * up).astype(gate_up.dtype))


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
