"""`generate` and `stream` compile for classes of lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshes import mesh_of
from small import LLAMA

import fp8x
from fp8x.errors import DataError
from fp8x.models import Decoder, DecoderConfig, generate, stream
from fp8x.models.request import length_class

CHUNK = 6


@pytest.fixture(scope="module")
def model():
    return Decoder(DecoderConfig.from_hf(LLAMA | {"vocab_size": 61}), rngs=nnx.Rngs(0))


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, 61, (2, 12))


@pytest.fixture
def programs():
    """The names of functions that XLA compiles."""
    names = []

    def listen(event, duration, fun_name="?", **options):
        if event.endswith("backend_compile_duration"):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_second_prompt_compiles_nothing(model, ids, programs):
    """Of other lengths and as many new tokens as it likes, as far as its class goes."""
    rng = np.random.default_rng(0)
    shapes = [(5, 40), (32, 20), (1, 63), (31, 2)]  # up to 32 and up to 64 tokens
    for function in (generate, lambda *args, **options: [*stream(*args, **options)]):
        for options in ({}, {"prefill_chunk": CHUNK}):
            for length, new in shapes:
                function(model, rng.integers(0, 61, (1, length)), max_new_tokens=new, **options)
                if (length, new) == shapes[0]:
                    assert "jit(_run)" in programs
                    programs.clear()
            assert programs == []


@pytest.mark.sample
@pytest.mark.parametrize(("context", "length", "count"), [(None, 31, 4), (40, 33, 7), (None, 64, 2)])
def test_a_class_changes_no_token(model, run, context, length, count):
    """At its borders, and where the context ends it: each new token is the likeliest of a whole pass over the text."""
    model = nnx.clone(model)
    model.set_context(context)
    prompts = np.random.default_rng(length).integers(0, 61, (2, length))
    for given in (prompts, [prompts[0], prompts[1, :-3]]):
        texts = np.asarray(generate(model, given, max_new_tokens=count))
        assert texts.shape == (2, length + count)
        predicted = np.asarray(jnp.argmax(run(model, texts), axis=-1))
        for text, prompt, likeliest in zip(texts, given, predicted, strict=True):
            first, end = len(prompt), len(prompt) + count
            np.testing.assert_array_equal(text[first:end], likeliest[first - 1 : end - 1])
            np.testing.assert_array_equal(text[:first], prompt)
            assert not text[end:].any()


def test_classes_of_lengths():
    classes = [32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560]
    assert sorted({length_class(tokens) for tokens in range(1, 2561)}) == classes
    assert all(length_class(size) == size and length_class(size + 1) > size for size in classes)


def test_a_cache_is_no_larger_than_the_context(model, ids, monkeypatch):
    capacities = []
    empty_cache = Decoder.empty_cache
    monkeypatch.setattr(Decoder, "empty_cache", lambda *args: capacities.append(args[2]) or empty_cache(*args))
    short = nnx.clone(model)
    short.set_context(15)
    assert generate(short, ids, max_new_tokens=3).shape == (2, 15)
    assert capacities == [0, 15]


@pytest.mark.slow
def test_on_a_mesh(model, ids):
    placed = fp8x.sharding.shard(nnx.clone(model), mesh_of(data=2, tensor=2))
    # Devices along `data` read different numbers of chunks.
    given = [ids[0], ids[1, :5]]
    found = generate(placed, given, max_new_tokens=3, prefill_chunk=CHUNK)
    np.testing.assert_array_equal(found, generate(model, given, max_new_tokens=3))


def test_not_inside_a_compiled_function(model, ids):
    message = "ids: generate and stream compile a loop of their own, and can't be called inside jax.jit"
    for function in (generate, stream):
        for call in (
            lambda: jax.jit(lambda ids: function(model, ids, max_new_tokens=4))(ids),  # noqa: B023
            lambda: jax.jit(lambda: function(model, [[1, 2]], max_new_tokens=4))(),  # noqa: B023
            lambda: nnx.jit(lambda model: function(model, ids, max_new_tokens=4))(model),  # noqa: B023
            lambda: nnx.grad(lambda model: function(model, ids, max_new_tokens=4).sum())(model),  # noqa: B023
        ):
            with pytest.raises(DataError, match=message):
                call()
