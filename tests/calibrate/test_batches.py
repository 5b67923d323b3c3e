"""What is no batch, or none that the model can read."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8x
from fp8x.calibrate.batches import arguments_of
from fp8x.errors import DataError

IDS = np.arange(16, dtype=np.int32).reshape(2, 8)

NO_BATCHES = {
    "an array": (IDS, r"batches: an array of shape \[2, 8\] is one batch; give an iterable .* such as \[ids\]"),
    "an array of JAX": (lambda: jnp.ones((4, 32)), r"an array of shape \[4, 32\] is one batch"),
    "text": ("texts.jsonl", "batches: str does not fit; give an iterable"),
    "a dict": ({"input_ids": IDS}, "batches: dict does not fit"),
    "a number": (3, "batches: int does not fit"),
    "None": (None, "batches: NoneType does not fit"),
}

NO_BATCH = {
    "ids": ([1, 2, 3], r"batches\[0\]: is int, not an array of NumPy or JAX"),
    "lists of ids": ([[1, 2], [3, 4]], r"batches\[0\]: holds int, not an array"),
    "texts": (["one", "two"], r"batches\[0\]: is str, not an array"),
    "None in second place": ([np.ones((4, 32), np.float32), None], r"batches\[1\]: is NoneType, not an array"),
    "objects": ([np.asarray(["a", None])], r"batches\[0\]: is numpy.ndarray of object, not an array"),
    "no rows": ([np.ones((0, 32), np.float32)], r"batches\[0\]: shape is \[0, 32\], which holds nothing"),
    "a tuple with text": ([(np.ones((4, 32), np.float32), "x")], r"batches\[0\]: holds str, not an array"),
}

NO_IDS = {
    "rows": (IDS[0], r"batches\[0\]: shape is \[8\]; give \[B, T\], for one text ids\[None\]"),
    "floats": (IDS.astype(np.float32), r"batches\[0\]: dtype is float32; token ids are integers"),
    "a dict": ({"input_ids": IDS}, r"batches\[0\]: is of type dict; give an array \[B, T\]"),
    "a mask": ((IDS, IDS > 0), r"batches\[0\]: is 2 arguments, but a decoder takes token ids"),
    "beyond": (IDS + 250, r"batches\[0\]\[.*\]: 258 is outside the model's vocabulary of 258"),
    "below": (IDS - 3, r"batches\[0\]\[.*\]: -3 is outside the model's vocabulary of 258"),
    "of JAX, beyond": (lambda: jnp.asarray(IDS + 250), r"batches\[0\]\[.*\]: 258 is outside"),
}


def made(value):
    """No array of JAX is made while pytest collects."""
    return value() if callable(value) else value


@pytest.fixture
def layer():
    return fp8x.nn.Linear(32, 16, recipe="e4m3_e4m3_bf16", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("case", NO_BATCHES | NO_BATCH)
def test_what_is_no_batch(layer, case):
    batches, message = (NO_BATCHES | NO_BATCH)[case]
    with pytest.raises(DataError, match=message):
        fp8x.calibrate(layer, made(batches))
    assert not layer.is_calibrating and np.isnan(layer.input_scale[...]).all()


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint):
    return fp8x.load(tiny_checkpoint, "e4m3_e4m3_bf16")


@pytest.mark.parametrize("case", NO_IDS)
def test_what_is_no_batch_of_a_decoder(decoder, case):
    batch, message = NO_IDS[case]
    with pytest.raises(DataError, match=message):
        fp8x.calibrate(decoder, [made(batch)])


def test_what_fits():
    x = np.ones((4, 32), np.float32)
    for batch in (x, jnp.asarray(x), {"x": x}, [x, x]):
        (argument,) = arguments_of(batch, "batches[0]", None)
        assert argument is batch
    several = (x, 3.0, None)
    assert arguments_of(several, "batches[0]", None) is several
    assert arguments_of(IDS, "batches[0]", lambda ids, name: None)[0] is IDS


def test_an_iterator_of_batches(layer):
    x = np.ones((4, 32), np.float32)
    assert fp8x.calibrate(layer, (batch for batch in (x, x))).batches == 2
