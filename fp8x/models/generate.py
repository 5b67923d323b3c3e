"""`generate`: continue prompts, greedily or by sampling, in one compiled function."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, UInt32

from fp8x.errors import DataError
from fp8x.models.decoder import Decoder
from fp8x.nn.walk import check_calibrated
from fp8x.sharding.run import batch_spec, call, check_batch


def generate(
    model: Decoder,
    ids: Int[Array, "b t"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    seed: int = 0,
) -> Int32[Array, "b t_and_new"]:
    """Prompts with `max_new_tokens` more tokens each.

    Prefill and decoding are one compiled function with the keys and values of what was read in a cache. It is compiled
    once for each shape of prompt, `max_new_tokens` and `top_k`; `temperature`, `eos_id` and `seed` may change freely.

    Arguments:
        model: the decoder.
        ids: prompts of one length, `[B, T]`.
        max_new_tokens: tokens to add.
        temperature: 0 takes the most likely token; otherwise tokens are drawn from `softmax(logits / temperature)`.
        top_k: draw among the k most likely tokens only.
        eos_id: tokens that end a text, such as `model.config.eos_token_id`; what follows one is filled with the first
            of them. By default none does.
        seed: of the draws.

    Raises:
        DataError: an empty prompt, token ids outside the vocabulary, or an option out of range.
        CalibrationError: a layer's static activation scale is missing, or the layer is in calibration.
        MeshError: a number of prompts that the devices along the axis `data` can't share evenly.
    """
    vocab_size = model.config.vocab_size
    prompt = _check_ids("ids", ids, vocab_size)
    if prompt.ndim != 2 or not prompt.size:
        raise DataError(f"ids: shape is {list(prompt.shape)}; give at least one prompt of at least one token as [B, T]")
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens: {max_new_tokens} does not fit; use 1 or more")
    if not 0 <= temperature < float("inf"):
        raise DataError(f"temperature: {temperature} does not fit; use 0 for greedy decoding, or a positive number")
    if top_k is not None and top_k < 1:
        raise DataError(f"top_k: {top_k} does not fit; use 1 or more, or None for all tokens")
    ends = _check_ids("eos_id", () if eos_id is None else eos_id, vocab_size).reshape(-1)
    check_calibrated(model)
    # None for no ends: XLA (jax 0.11.2, CPU) crashes on an empty array in a step over several devices.
    args = (prompt, temperature or None, ends if ends.size else None, np.uint32(seed))
    top_k = None if top_k is None else min(top_k, vocab_size)
    if model.placement is None:
        graphdef, state = nnx.split(model)
        return _generate(Continuation(max_new_tokens, top_k), graphdef, state, args)
    check_batch(model.placement, len(prompt), "ids")
    step = Continuation(max_new_tokens, top_k, model.placement.batch)
    in_specs = (batch_spec(model.placement), P(), P(), P())
    return call(step, model, *args, in_specs=in_specs, out_specs=P())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    step: "Continuation", graphdef: nnx.GraphDef, state: nnx.State, args: tuple[Any, ...]
) -> Int32[Array, "b t_and_new"]:
    return step(nnx.merge(graphdef, state), *args)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Prefill and decoding. Its fields are compiled in.

    Attributes:
        batch_axes: mesh axes over which the prompts are split; every device returns the texts of all.
    """

    max_new_tokens: int
    top_k: int | None
    batch_axes: tuple[str, ...] = ()

    def __call__(
        self,
        model: Decoder,
        prompt: Int32[Array, "b t"],
        temperature: Float[Array, ""] | None,
        ends: Int32[Array, " n"] | None,
        seed: UInt32[Array, ""],
    ) -> Int32[Array, "b t_and_new"]:
        batch, length = prompt.shape
        capacity, key = length + self.max_new_tokens, jax.random.key(seed)

        def choose(hidden: Float[Array, "b hidden"], step: Int[Array, ""]) -> Int32[Array, " b"]:
            return self._choose(model.logits(hidden), temperature, jax.random.fold_in(key, step))

        def is_end(token: Int32[Array, " b"]) -> Bool[Array, " b"]:
            return jnp.zeros(token.shape, bool) if ends is None else jnp.isin(token, ends)

        def is_unfinished(carry) -> Array:
            # On a mesh, devices with other prompts may take more steps: no collective in a step reaches them.
            step, _, _, done, _ = carry
            return (step < self.max_new_tokens) & ~jnp.all(done)

        def decode(carry):
            step, texts, last, done, cache = carry
            hidden, cache = model.extend(last[:, None], cache)
            new = choose(hidden[:, 0], step)
            new = jnp.where(done, filler, new)
            texts = jax.lax.dynamic_update_slice_in_dim(texts, new[:, None], length + step, axis=1)
            return step + 1, texts, new, done | is_end(new), cache

        hidden, cache = model.extend(prompt, model.init_cache(batch, capacity))
        first = choose(hidden[:, -1], jnp.int32(0))
        filler = jnp.int32(0) if ends is None else ends[0]
        texts = jnp.full((batch, capacity), filler, jnp.int32)
        texts = texts.at[:, :length].set(prompt).at[:, length].set(first)
        carry = (jnp.int32(1), texts, first, is_end(first), cache)
        texts = jax.lax.while_loop(is_unfinished, decode, carry)[1]
        return jax.lax.all_gather(texts, self.batch_axes, tiled=True) if self.batch_axes else texts

    def _choose(
        self, logits: Float32[Array, "b vocab"], temperature: Float[Array, ""] | None, key: Key[Array, ""]
    ) -> Int32[Array, " b"]:
        """The next token of each text: the likeliest without a temperature, else drawn from the `top_k` likeliest."""
        if temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if self.top_k is not None:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        logits /= temperature
        if not self.batch_axes:
            return jax.random.categorical(key, logits).astype(jnp.int32)
        # The draws of the whole batch, of which these rows are some.
        rows, batch = logits.shape[0], logits.shape[0] * jax.lax.axis_size(self.batch_axes)
        first = jax.lax.axis_index(self.batch_axes) * rows
        every = jax.lax.dynamic_update_slice_in_dim(jnp.zeros((batch, logits.shape[1])), logits, first, axis=0)
        drawn = jax.random.categorical(key, every).astype(jnp.int32)
        return jax.lax.dynamic_slice_in_dim(drawn, first, rows)


def _check_ids(name: str, ids, vocab_size: int) -> Int32[np.ndarray, "..."]:
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise DataError(f"{name}: rows have different lengths; give prompts of one length as [B, T]") from error
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{name}: dtype is {array.dtype}; token ids are integers")
    if bad := array[(array < 0) | (array >= vocab_size)].tolist():
        raise DataError(f"{name}: {bad[0]} is outside the model's vocabulary; use 0 to {vocab_size - 1}")
    return array.astype(np.int32)
