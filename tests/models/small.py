"""A model that compiles in a second, and whether two are the same."""

import numpy as np
from flax import nnx

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rope_theta": 1e4,
}
WITH_BYTES = LLAMA | {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257}


def assert_same(model: nnx.Module, other: nnx.Module) -> None:
    assert nnx.graphdef(model) == nnx.graphdef(other)
    states = [nnx.to_flat_state(nnx.state(each)) for each in (model, other)]
    for (path, a), (_, b) in zip(*states, strict=True):
        a, b = np.asarray(a[...]), np.asarray(b[...])
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path
