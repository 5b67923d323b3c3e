"""What XLA makes of attention over a cache in 8 bits for a described H200: both products read 8 bits, and a step writes
into the cache where it is. On a CPU none of this would show."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from fp8x import Scheme
from fp8x.array import ScaledArray
from fp8x.benchmark.program import optimized
from fp8x.models.attention import attend
from fp8x.models.kv_cache import KeyValues, remember
from fp8x.models.kv_quantizer import KVQuantizer, stored_scheme
from fp8x.pallas import aot
from fp8x.scheme import KV_TENSOR, per_row

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
BATCH, CAPACITY, HEADS, KV, DIM = 2, 1024, 8, 2, 64
SCHEMES = [Scheme("e4m3", block=KV_TENSOR), per_row()]
array = jax.ShapeDtypeStruct


def room(scheme: Scheme) -> ScaledArray:
    scheme, shape = stored_scheme(scheme), (BATCH, CAPACITY, KV, DIM)
    return ScaledArray(array(shape, scheme.dtype), array(scheme.scale_shape(shape), scheme.scale_dtype), scheme)


def heads(count: int, tokens: int) -> jax.ShapeDtypeStruct:
    return array((BATCH, tokens, count, DIM), jnp.bfloat16)


@pytest.mark.sample
@pytest.mark.parametrize("start", [(), (BATCH,)], ids=["alike", "of each text"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_step_reads_8_bits_and_writes_in_place(scheme, start):
    def generate(query, cache, start):
        def step(carry):
            count, query, cache = carry
            cache = cache.write(KeyValues(query[:, :, :KV], query[:, :, -KV:]), start + count)
            mask = (jnp.arange(CAPACITY) <= jnp.reshape(start + count, (-1, 1)))[:, None]
            return count + 1, attend(query, *cache, mask, 0.1), cache

        return jax.lax.while_loop(lambda carry: carry[0] < 9, step, (jnp.int32(0), query, cache))[1]

    cache = KeyValues(room(scheme), room(scheme))
    program = optimized(generate, heads(HEADS, 1), cache, array(start, jnp.int32))
    body = program[program.index(f"\n%{re.search(r' while\(.*body=%([^\s,]+)', program)[1]} ") :]
    written = re.findall(r"= (\w+)\[([\d,]+)\]\S* (fusion|copy)\(.*?calls=%(\w+)", body[: body.index("\n}")])
    large = [(dtype, called) for dtype, dims, _, called in written if size(dims) >= BATCH * CAPACITY * KV * DIM]
    assert [dtype for dtype, _ in large] == ["f8e4m3fn"] * 2, large
    assert all("dynamic_update_slice" in called or "scatter" in called for _, called in large)


@pytest.mark.sample
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_without_a_cache_they_are_rounded_too(scheme):
    """XLA would pass the 8 bits by where it sees both conversions at once."""
    scale = 0.02 if scheme.block == KV_TENSOR else None

    def at_once(query, keys, values):
        quantizers = tuple(KVQuantizer(scheme, (KV, DIM), scale) for _ in range(2))
        seen = remember(KeyValues(keys, values), quantizers, None, 0)
        return attend(query, *seen, jnp.tril(jnp.ones((128, 128), bool))[None], 0.1)

    program = optimized(at_once, heads(HEADS, 128), heads(KV, 128), heads(KV, 128))
    assert {size(dims) for dims in re.findall(r"f8e4m3fn\[([\d,]+)\]", program)} >= {BATCH * 128 * KV * DIM}


def size(dims: str) -> int:
    return math.prod(map(int, dims.split(",")))
