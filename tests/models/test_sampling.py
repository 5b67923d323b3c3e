"""Warped logits against transformers' (tests/goldens/make_sampling_goldens.py), and the draws from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import GOLDENS
from safetensors.numpy import load_file

from fp8x.models.sampling import Sampling, choose, warp

TENSORS = load_file(GOLDENS / "sampling.safetensors")


@pytest.mark.parametrize("case", sorted(TENSORS.keys() - {"logits"}))
def test_warped_logits_are_those_of_transformers(case):
    options = {name: float(value) for name, value in (part.split("=") for part in case.split(","))}
    top_k = int(options["top_k"]) if "top_k" in options else None
    warped = warp(TENSORS["logits"], options["temperature"], top_k, options.get("top_p"), options.get("min_p"))
    found, expected = np.array(jax.nn.log_softmax(warped)), TENSORS[case].copy()
    # Which of equal logits stay, torch's sort leaves open.
    found[3], expected[3] = np.sort(found[3]), np.sort(expected[3])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def sampling(temperature=None, top_p=None, min_p=None, seed=(), stream=()):
    return Sampling(temperature, top_p, min_p, np.asarray(seed, np.uint32), np.asarray(stream, np.uint32))


def test_draws_follow_the_softmax():
    draws = 4096
    logits = TENSORS["logits"][1:2]
    p = np.asarray(jax.nn.softmax(warp(logits, 0.7, 20, 0.9, None)))[0]
    batch = sampling(0.7, 0.9, seed=np.full(draws, 1), stream=np.arange(draws))
    drawn = choose(jnp.repeat(jnp.asarray(logits), draws, axis=0), batch, 20, jnp.int32(0))
    frequency = np.bincount(drawn, minlength=p.size) / draws
    # Five standard deviations of a binomial; what has probability 0 is never drawn.
    assert (np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / draws)).all()


def test_draws_depend_on_seed_stream_and_step_alone():
    logits = jnp.asarray(TENSORS["logits"][[0, 0, 0, 0]])

    def draw(step, rows=slice(None), **options):
        return np.stack([choose(logits[rows], sampling(1.0, **options), None, jnp.int32(step + i)) for i in range(6)])

    every = draw(0, seed=[5, 5, 6, 5], stream=[0, 1, 0, 0])
    np.testing.assert_array_equal(every[:, 0], every[:, 3])
    assert (every[:, 0] != every[:, 1]).any() and (every[:, 0] != every[:, 2]).any()
    np.testing.assert_array_equal(draw(0, slice(1), seed=[6], stream=[0])[:, 0], every[:, 2])
    assert (draw(6, slice(1), seed=[6], stream=[0])[:, 0] != every[:, 2]).any()


def test_no_temperature_takes_the_likeliest():
    logits = TENSORS["logits"]
    np.testing.assert_array_equal(choose(logits, sampling(), None, jnp.int32(0)), logits.argmax(axis=-1))
