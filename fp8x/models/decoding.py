"""What `generate` and `stream` compile: the prefill, a step, and the loop over steps."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int16, Int32

from fp8x.models.decoder import Decoder
from fp8x.models.kv_cache import Cache
from fp8x.models.sampling import Sampling, choose
from fp8x.models.stop import Stops
from fp8x.scheme import Scheme


class Controls(NamedTuple):
    """What is not compiled in: how tokens are chosen, and what ends a text.

    None stands for no ends: XLA (jax 0.11.2, CPU) crashes on an empty array in a step over several devices.
    """

    max_new_tokens: Int32[Array, ""]
    sampling: Sampling
    ends: Int32[Array, " n"] | None
    stops: Stops | None

    @property
    def filler(self) -> Int32[Array, ""]:
        """What follows the end of a text."""
        return jnp.int32(0) if self.ends is None else self.ends[0]


class Running(NamedTuple):
    """Where texts are, apart from their cache.

    Attributes:
        step: how many new tokens each has.
        last: the newest, which is not in the cache yet.
        done: which texts have ended.
        tail: their last bytes, with stop strings.
    """

    step: Int32[Array, ""]
    last: Int32[Array, " b"]
    done: Bool[Array, " b"]
    tail: Int16[Array, "b length"] | None


@dataclasses.dataclass(frozen=True)
class Step:
    """Reads the last token of each text and chooses the next. Its fields are compiled in, as those of the others here.

    Attributes:
        top_k: as `warp` takes it.
    """

    top_k: int | None

    def __call__(self, model: Decoder, cache: Cache, running: Running, controls: Controls) -> tuple[Cache, Running]:
        hidden, cache = model.extend(running.last[:, None], cache)
        return cache, self.add_token(model, hidden[:, 0], running, controls)

    def add_token(
        self, model: Decoder, hidden: Float[Array, "b hidden"], running: Running, controls: Controls
    ) -> Running:
        """Chooses the token that follows the one with final states `hidden`."""
        token = choose(model.logits(hidden), controls.sampling, self.top_k, running.step)
        token = jnp.where(running.done, controls.filler, token)
        done, tail = running.done, running.tail
        if controls.ends is not None:
            done |= jnp.isin(token, controls.ends)
        if controls.stops is not None:
            is_stopped, tail = controls.stops.read(tail, token)
            done |= is_stopped
        return Running(running.step + 1, token, done, tail)


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Reads the prompts and chooses the first token of each.

    Attributes:
        step: how tokens are chosen.
        capacity: how many tokens of a text the cache has room for, its prompt and new ones.
        chunk: how many tokens are read at a time; divides the width of the prompts.
        cache_dtype: as `Decoder.init_cache` takes it.
    """

    step: Step
    capacity: int
    chunk: int
    cache_dtype: Scheme | np.dtype | None

    def __call__(
        self, model: Decoder, prompt: Int32[Array, "b t"], lengths: Int32[Array, "*b"], controls: Controls
    ) -> tuple[Cache, Running]:
        batch, width = prompt.shape

        def read(index, carry):
            cache, final = carry
            start = index * self.chunk
            hidden, cache = model.extend(jax.lax.dynamic_slice_in_dim(prompt, start, self.chunk, axis=1), cache)
            place = jnp.broadcast_to(lengths - 1 - start, batch)
            is_here = (place >= 0) & (place < self.chunk)
            picked = jnp.take_along_axis(hidden, jnp.clip(place, 0, self.chunk - 1)[:, None, None], axis=1)[:, 0]
            return cache, jnp.where(is_here[:, None], picked, final)

        cache = model.empty_cache(batch, self.capacity, self.cache_dtype)
        final = jnp.zeros((batch, model.config.hidden_size), model.embed_tokens.embedding.dtype)
        # Chunks behind the longest prompt are not read.
        count = 1 if self.chunk == width else (jnp.max(lengths) - 1) // self.chunk + 1
        cache, final = jax.lax.fori_loop(0, count, read, (cache, final))
        # What was read behind the end of a prompt, the next tokens overwrite.
        cache = Cache(cache.layers, lengths)
        tail = None if controls.stops is None else controls.stops.empty_tail(batch)
        before = Running(jnp.int32(0), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool), tail)
        return cache, self.step.add_token(model, final, before, controls)


@dataclasses.dataclass(frozen=True)
class Generate:
    """Prefill and steps, until all texts have ended or are long enough: the new tokens, then the filler.

    Attributes:
        batch_axes: mesh axes over which the prompts are split; every device returns the tokens of all.
    """

    prefill: Prefill
    batch_axes: tuple[str, ...] = ()

    def __call__(
        self, model: Decoder, prompt: Int32[Array, "b t"], lengths: Int32[Array, "*b"], controls: Controls
    ) -> Int32[Array, "b capacity"]:
        def is_unfinished(carry):
            # On a mesh, devices with other prompts may take more steps: no collective in a step reaches them.
            _, running, _ = carry
            return (running.step < controls.max_new_tokens) & ~jnp.all(running.done)

        def add_token(carry):
            cache, running, new = carry
            place = running.step
            cache, running = self.prefill.step(model, cache, running, controls)
            return cache, running, jax.lax.dynamic_update_slice_in_dim(new, running.last[:, None], place, axis=1)

        cache, running = self.prefill(model, prompt, lengths, controls)
        new = jnp.full((prompt.shape[0], self.prefill.capacity), controls.filler, jnp.int32).at[:, 0].set(running.last)
        new = jax.lax.while_loop(is_unfinished, add_token, (cache, running, new))[2]
        return jax.lax.all_gather(new, self.batch_axes, tiled=True) if self.batch_axes else new
