"""Whole texts. Most tests share the class of lengths up to 32: XLA compiles for every other one."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models

import fp8x
from fp8x.errors import CalibrationError, DataError, RecipeError
from fp8x.models import generate, stream
from fp8x.models.generate import _run
from fp8x.scheme import KV_HEAD, Scheme

CHUNK = 6  # both prompts are two of these
DRAWN = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 0.9, "min_p": 0.01, "prefill_chunk": CHUNK}


@pytest.fixture(scope="module")
def model(qwen):
    return qwen.model


@pytest.fixture
def ids(qwen):
    return qwen.tensors["ids"]


@pytest.fixture
def prompts(ids):
    return [ids[0], ids[1, :7]]


def new_of(texts, prompts) -> list[np.ndarray]:
    """What follows each prompt; checks that the text begins with it, and that zeros follow."""
    found = []
    for text, prompt in zip(np.asarray(texts), prompts, strict=True):
        np.testing.assert_array_equal(text[: len(prompt)], prompt)
        assert not text[len(prompt) + 16 :].any()
        found.append(text[len(prompt) : len(prompt) + 16])
    return found


@pytest.mark.sample
def test_greedy_texts_are_those_of_transformers(golden):
    texts = generate(golden.model, golden.tensors["ids"], max_new_tokens=16)
    assert texts.dtype == jnp.int32
    np.testing.assert_array_equal(texts, np.concatenate([golden.tensors["ids"], golden.tensors["generated"]], axis=1))


@pytest.mark.sample
def test_the_cache_changes_no_token(golden, run):
    """Read at once, a text predicts at each place the token that generation put there."""
    prompts = [golden.tensors["ids"][0], golden.tensors["ids"][1, :7]]
    texts = generate(golden.model_f32, prompts, max_new_tokens=16)
    predicted = np.asarray(jnp.argmax(run(golden.model_f32, texts), axis=-1))
    for row, new in enumerate(new_of(texts, prompts)):
        start = len(prompts[row]) - 1
        np.testing.assert_array_equal(predicted[row, start : start + 16], new)


@pytest.mark.slow
def test_lengths_and_chunks_change_no_text(model, ids, prompts):
    texts = generate(model, prompts, max_new_tokens=16)
    np.testing.assert_array_equal(generate(model, prompts, max_new_tokens=16, prefill_chunk=CHUNK), texts)
    padded = np.concatenate([ids, np.full((2, 3), -1)], axis=1)
    padded[1, 7:] = 999
    np.testing.assert_array_equal(generate(model, padded, lengths=[12, 7], max_new_tokens=16), texts)
    for prompt, new in zip(prompts, new_of(texts, prompts)):
        alone = generate(model, prompt[None], max_new_tokens=16, prefill_chunk=CHUNK)
        np.testing.assert_array_equal(alone[0], np.concatenate([prompt, new]))


@pytest.mark.slow
def test_a_text_with_a_seed_is_drawn_as_alone(model, prompts):
    texts = generate(model, prompts, seed=[3, 4], **DRAWN)
    for prompt, new, seed in zip(prompts, new_of(texts, prompts), (3, 4)):
        np.testing.assert_array_equal(generate(model, prompt[None], seed=seed, **DRAWN)[0, len(prompt) :], new)
    before = _run._cache_size()
    streamed = np.stack([*stream(model, prompts, seed=[3, 4], **DRAWN)], axis=1)
    np.testing.assert_array_equal(streamed, new_of(texts, prompts))
    assert _run._cache_size() == before + 2  # the prefill and a step


@pytest.mark.slow
def test_rows_of_one_seed_are_drawn_apart(model, prompts):
    texts = np.asarray(generate(model, prompts, seed=3, **DRAWN))
    alike = np.asarray(generate(model, prompts, seed=[3, 3], **DRAWN))
    assert (texts == alike).all(axis=1).tolist() == [True, False]
    np.testing.assert_array_equal(generate(model, prompts, seed=3, **DRAWN), texts)


@pytest.mark.slow
def test_drawing_among_one_is_greedy(model, prompts):
    greedy = generate(model, prompts, max_new_tokens=16)
    np.testing.assert_array_equal(generate(model, prompts, **(DRAWN | {"top_p": 0.0, "temperature": 5.0})), greedy)


def test_one_token_prompt_and_one_new_token(model, ids, run):
    texts = generate(model, ids[:, :1], max_new_tokens=1)
    np.testing.assert_array_equal(texts[:, 1], jnp.argmax(run(model, ids)[:, 0], axis=-1))


def spelled(*texts: str) -> Tokenizer:
    """A tokenizer of 64 tokens with these texts, the last for all others."""
    vocab = {text: number for number, text in enumerate(texts)} | {f"x{n}": n for n in range(len(texts), 64)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_compiled_once_for_all_values(model, ids):
    before = _run._cache_size()
    for number, (width, top_k) in enumerate([(3, 64), (2, 70), (1, 1000)]):
        share = 0.9 - number / 10
        generate(
            nnx.clone(model),
            ids[:, :width],
            max_new_tokens=3 + number,
            temperature=share,
            top_k=top_k,
            top_p=share,
            min_p=share / 10,
            seed=[number, 2**32 - 1] if number else number,
            eos_id=number,
            stop_strings=["ab" * (1 + number)],
            tokenizer=spelled("a", "b"),
            prefill_chunk=3,
        )
    assert _run._cache_size() == before + 1


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_end_token_may_come_first(model, qwen, ids):
    end = int(qwen.tensors["generated"][0, 0])
    assert (generate(model, ids[[0, 0]], max_new_tokens=16, eos_id=end)[:, 12:] == end).all()


@pytest.mark.slow
def test_a_stop_string_ends_its_text_only(model, qwen, ids):
    free = qwen.tensors["generated"]
    tokenizer = spelled(*(f"<{number}>" for number in range(64)))
    # From inside one token to inside the next but one.
    string = "".join(f"<{number}>" for number in free[0, 3:6])[1:-1]
    options = {"max_new_tokens": 16, "stop_strings": [string, "never"], "tokenizer": tokenizer}
    texts = np.asarray(generate(model, ids, **options))[:, 12:]
    np.testing.assert_array_equal(texts, [[*free[0, :6], *[0] * 10], free[1]])
    # What the prompt has does not count, and no step is taken for texts that have ended.
    prompt = "".join(f"<{number}>" for number in ids[0])
    streamed = [*stream(model, ids[[0, 0]], **(options | {"stop_strings": [string, prompt[-6:]]}))]
    np.testing.assert_array_equal(streamed, free[0, :6, None].repeat(2, axis=1))


def test_the_cache_may_be_in_8_bits(model, ids, monkeypatch):
    keys = []
    extend = type(model).extend
    monkeypatch.setattr(type(model), "extend", lambda *args: keys.append(args[2].layers[0].keys) or extend(*args))
    generate(model, ids[:, :1], max_new_tokens=1, cache_dtype="e4m3")
    assert keys[0].data.dtype == jnp.float8_e4m3fn


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[]], {}, r"ids: shape is \[1, 0\]; give at least one prompt of at least one token as \[B, T\], or lists"),
        ([], {}, r"ids: shape is \[0\]"),
        ([1, 2], {}, r"ids: shape is \[2\]; .* as \[B, T\]"),
        ([[1, 2], []], {}, r"ids\[1\]: shape is \[0\]; give each prompt as a list of at least one token"),
        ([[1, 2], 3], {}, r"ids\[1\]: shape is \[\]"),
        ([[1, 2], [[3], 4]], {}, r"ids\[1\]: is no list of token ids"),
        ([[1, 2], [64]], {}, r"ids\[1\]\[0\]: 64 is outside the model's vocabulary of 64"),
        ([[1, 64]], {}, r"ids\[0, 1\]: 64 is outside the model's vocabulary of 64; use 0 to 63"),
        ([[-1, 2]], {}, r"ids\[0, 0\]: -1 is outside the model's vocabulary"),
        ([[True, False]], {}, r"ids: dtype is bool; token ids are integers"),
        ([[1.0, 2.0]], {}, r"ids: dtype is float64; token ids are integers"),
        ([[1, 2], [3]], {"lengths": [2, 1]}, r"lengths: ids are rows of different lengths already; leave lengths out"),
        ([[1, 2]], {"lengths": [3]}, r"lengths: 3 does not fit; ids are 2 wide, so use 1 to 2"),
        ([[1, 2]], {"lengths": [0]}, r"lengths: 0 does not fit"),
        ([[1, 2]], {"lengths": [1, 1]}, r"lengths: int64 of shape \[2\] does not fit; give 1 integers"),
        ([[1]], {"eos_id": 64}, r"eos_id: 64 is outside the model's vocabulary"),
        ([[1]], {"max_new_tokens": 0}, r"max_new_tokens: 0 does not fit; use 1 or more"),
        ([[1]], {"max_new_tokens": 1.5}, r"max_new_tokens: 1.5 does not fit; use 1 or more"),
        ([[1]], {"temperature": -1.0}, r"temperature: -1.0 does not fit; use 0 for greedy decoding"),
        ([[1]], {"temperature": float("nan")}, r"temperature: nan does not fit"),
        ([[1]], {"top_k": 0}, r"top_k: 0 does not fit; use 1 or more, or None for all tokens"),
        ([[1]], {"top_p": 1.1}, r"top_p: 1.1 does not fit; use 0 to 1, or None for all tokens"),
        ([[1]], {"min_p": -0.1}, r"min_p: -0.1 does not fit; use 0 to 1"),
        ([[1]], {"prefill_chunk": 0}, r"prefill_chunk: 0 does not fit; use 1 or more, or None for whole prompts at"),
        ([[1]], {"seed": -1}, r"seed: -1 does not fit; use 0 to 2\*\*32 - 1"),
        ([[1]], {"seed": [1, 2]}, r"seed: \[1, 2\] does not fit; use an integer, or one for each of 1 prompts"),
        ([[1]], {"seed": 0.5}, r"seed: 0.5 does not fit"),
        ([[1]], {"stop_strings": "text"}, r"stop_strings: 'text' does not fit; give a list of strings"),
        ([[1]], {"stop_strings": ["a", ""]}, r"stop_strings: one is empty"),
        ([[1]], {"stop_strings": ["a"]}, r"tokenizer: missing; stop_strings need"),
    ],
)
def test_what_does_not_fit_is_named(model, prompt, options, message):
    for function in (generate, stream):  # stream before its first token
        with pytest.raises(DataError, match=message):
            function(model, prompt, **({"max_new_tokens": 4} | options))


def test_caches_that_do_not_fit(model, ids):
    with pytest.raises(RecipeError, match="cache_dtype: 'int4' is no type for keys and values"):
        generate(model, ids, max_new_tokens=4, cache_dtype="int4")
    with pytest.raises(CalibrationError, match="kv_cache: its scales are missing"):
        generate(model, ids, max_new_tokens=4, cache_dtype=Scheme("e4m3", block=KV_HEAD))
    uncalibrated = nnx.clone(model)
    uncalibrated.set_kv_cache(Scheme("e4m3", block=KV_HEAD))
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.k_cache, .* are not calibrated"):
        generate(uncalibrated, ids, max_new_tokens=4)


def test_an_uncalibrated_model_is_refused(qwen, ids):
    model = fp8x.quantize_model(nnx.clone(qwen.model), "e4m3_e4m3_bf16")
    with pytest.raises(CalibrationError, match=r"layers.0.mlp.down_proj.* not calibrated; run fp8x"):
        generate(model, ids, max_new_tokens=4)
