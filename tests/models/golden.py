"""`Golden`: a checkpoint of `tests/goldens`, loaded, with what transformers makes of it."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

import fp8x
from fp8x.models import Decoder

GOLDENS = Path(__file__).parents[1] / "goldens"


@dataclasses.dataclass(frozen=True)
class Golden:
    """One case of `make_hf_goldens.py`, whose docstring says what `tensors` holds."""

    path: Path
    hf: dict
    tensors: dict[str, np.ndarray]

    @functools.cached_property
    def model(self) -> Decoder:
        return fp8x.load(self.path)

    @functools.cached_property
    def model_f32(self) -> Decoder:
        """The same weights in float32."""
        model = nnx.clone(self.model)
        nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(model)))
        return model

    def logits_in_pieces(self) -> np.ndarray:
        """Of the prompts in float32: five tokens, and then one after another, by a cache."""
        model, ids = self.model_f32, jnp.asarray(self.tensors["ids"])
        cache, extend, hidden = model.init_cache(*ids.shape), nnx.jit(Decoder.extend), []
        for piece in jnp.split(ids, list(range(5, ids.shape[1])), axis=1):
            of_piece, cache = extend(model, piece, cache)
            hidden.append(of_piece)
        assert cache.length == ids.shape[1]
        return model.logits(jnp.concatenate(hidden, axis=1))

    def gradient(self) -> nnx.State:
        """Of the mean negative log-likelihood of the prompts, by every parameter in float32."""
        graphdef, state = nnx.split(self.model_f32)
        ids = jnp.asarray(self.tensors["ids"])

        @jax.jit
        @jax.grad
        def gradient(state):
            log_p = jax.nn.log_softmax(nnx.merge(graphdef, state)(ids[:, :-1]))
            return -jnp.mean(jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1))

        return gradient(state)


@functools.cache
def read_golden(name: str) -> Golden:
    path = GOLDENS / name
    return Golden(path, json.loads((path / "config.json").read_text()), load_file(path / "golden.safetensors"))
