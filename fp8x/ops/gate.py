"""The gate of an MLP: `activation(gate) * up`, in one rounding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fp8x.errors import ShapeError

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
    gate, up = gate_up[:, 0].astype(jnp.float32), gate_up[:, 1].astype(jnp.float32)
    return (gate_activation(activation)(gate) * up).astype(gate_up.dtype)
