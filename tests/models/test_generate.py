import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8x
from fp8x.errors import CalibrationError, DataError
from fp8x.models import generate
from fp8x.models.generate import _generate


@pytest.fixture(scope="module")
def model(qwen):
    return qwen.model


@pytest.fixture
def ids(qwen):
    return qwen.tensors["ids"]


def test_greedy_texts_are_those_of_transformers(golden):
    texts = generate(golden.model, golden.tensors["ids"], max_new_tokens=16)
    assert texts.dtype == jnp.int32
    np.testing.assert_array_equal(texts, np.concatenate([golden.tensors["ids"], golden.tensors["generated"]], axis=1))


def test_the_cache_changes_no_token(golden, run):
    """Read at once, a text predicts at each place the token that generation put there."""
    texts = generate(golden.model_f32, golden.tensors["ids"], max_new_tokens=16)
    predicted = jnp.argmax(run(golden.model_f32, texts), axis=-1)
    np.testing.assert_array_equal(predicted[:, 11:-1], texts[:, 12:])


def test_a_prompt_alone_is_continued_as_in_a_batch(model, ids):
    texts = generate(model, ids, max_new_tokens=16)
    for row in range(len(ids)):
        np.testing.assert_array_equal(generate(model, ids[row : row + 1], max_new_tokens=16)[0], texts[row])


def test_one_token_prompt_and_one_new_token(model, ids, run):
    texts = generate(model, ids[:, :1], max_new_tokens=1)
    np.testing.assert_array_equal(texts[:, 1], jnp.argmax(run(model, ids)[:, 0], axis=-1))


def test_compiled_once_per_shape(model, ids):
    before = _generate._cache_size()
    for seed, temperature in enumerate([0.5, 1.0, 2.0]):
        generate(nnx.clone(model), ids[:, :3], max_new_tokens=3, temperature=temperature, seed=seed, eos_id=seed)
    assert _generate._cache_size() == before + 1


def test_an_end_token_ends_its_text_only(model, qwen, ids):
    free = qwen.tensors["generated"]
    end = int(free[0, 4])
    assert end not in free[0, :4]
    length = [list(row).index(end) + 1 if end in row else 16 for row in free]
    assert length[0] < length[1]
    for eos_id in (end, [end, 0], np.int32(end)):
        texts = np.asarray(generate(model, ids, max_new_tokens=16, eos_id=eos_id))[:, 12:]
        for row in range(2):
            np.testing.assert_array_equal(texts[row, : length[row]], free[row, : length[row]])
            assert (texts[row, length[row] :] == end).all()


def test_the_end_token_may_come_first(model, qwen, ids):
    end = int(qwen.tensors["generated"][0, 0])
    assert (generate(model, ids[:1], max_new_tokens=16, eos_id=end)[:, 12:] == end).all()


def test_draws_follow_the_softmax(model, ids, run):
    draws, temperature, top_k = 4096, 0.7, 5
    logits = np.asarray(run(model, ids)[0, -1])
    kept = np.argsort(logits)[-top_k:]
    p = np.zeros_like(logits)
    p[kept] = jax.nn.softmax(logits[kept] / temperature)
    prompts = np.repeat(ids[:1], draws, axis=0)
    drawn = generate(model, prompts, max_new_tokens=1, temperature=temperature, top_k=top_k, seed=1)[:, -1]
    frequency = np.bincount(drawn, minlength=logits.size) / draws
    # Five standard deviations of a binomial; what has probability 0 is never drawn.
    assert (np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / draws)).all()


def test_a_seed_decides_the_draws(model, ids):
    def draw(seed, **options):
        return np.asarray(generate(model, ids, max_new_tokens=8, temperature=1.0, seed=seed, **options))

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
    # top_k beyond the vocabulary leaves every token in.
    np.testing.assert_array_equal(draw(0), draw(0, top_k=1000))


def test_drawing_among_one_is_greedy(model, ids):
    greedy = generate(model, ids, max_new_tokens=16)
    np.testing.assert_array_equal(generate(model, ids, max_new_tokens=16, temperature=5.0, top_k=1), greedy)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[]], {}, r"ids: shape is \[1, 0\]; give at least one prompt of at least one token as \[B, T\]"),
        ([], {}, r"ids: shape is \[0\]"),
        ([1, 2], {}, r"ids: shape is \[2\]; .* as \[B, T\]"),
        ([[1, 2], [3]], {}, r"ids: rows have different lengths"),
        ([[1, 64]], {}, r"ids: 64 is outside the model's vocabulary; use 0 to 63"),
        ([[-1, 2]], {}, r"ids: -1 is outside the model's vocabulary"),
        ([[1.0, 2.0]], {}, r"ids: dtype is float64; token ids are integers"),
        ([[1]], {"eos_id": 64}, r"eos_id: 64 is outside the model's vocabulary"),
        ([[1]], {"max_new_tokens": 0}, r"max_new_tokens: 0 does not fit; use 1 or more"),
        ([[1]], {"temperature": -1.0}, r"temperature: -1.0 does not fit; use 0 for greedy decoding"),
        ([[1]], {"temperature": float("nan")}, r"temperature: nan does not fit"),
        ([[1]], {"top_k": 0}, r"top_k: 0 does not fit; use 1 or more"),
    ],
)
def test_what_does_not_fit_is_named(model, prompt, options, message):
    with pytest.raises(DataError, match=message):
        generate(model, prompt, **({"max_new_tokens": 4} | options))


def test_an_uncalibrated_model_is_refused(qwen, ids):
    model = fp8x.quantize_model(nnx.clone(qwen.model), "e4m3_e4m3_bf16")
    with pytest.raises(CalibrationError, match=r"layers.0.mlp.down_proj.* not calibrated; run fp8x"):
        generate(model, ids, max_new_tokens=4)
