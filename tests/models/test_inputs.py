"""What a decoder can't be called with is named, wherever a user calls it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshes import mesh_of
from small import WITH_BYTES
from tokenizers import AddedToken, Tokenizer
from typer.testing import CliRunner

import fp8x
from fp8x.cli import app
from fp8x.errors import DataError
from fp8x.models import Decoder, DecoderConfig, generate, stream
from fp8x.models.evaluate import evaluate

GOOD = np.array([[1, 2, 257], [0, 4, 5]])


@pytest.fixture
def model():
    return Decoder(DecoderConfig.from_hf(WITH_BYTES), rngs=nnx.Rngs(0))


CALLS = {
    "call": lambda model, ids: model(ids),
    "extend": lambda model, ids: model.extend(ids, model.init_cache(2, 3)),
    "generate": lambda model, ids: generate(model, ids, max_new_tokens=1),
    "stream": lambda model, ids: stream(model, ids, max_new_tokens=1),
    "mesh": lambda model, ids: fp8x.sharding.shard(model, mesh_of(data=2))(ids),
    "vocabulary over a mesh": lambda model, ids: fp8x.sharding.shard(model, mesh_of(tensor=2))(ids),
}


@pytest.mark.parametrize(("wrong", "make"), [(258, np.array), (-1, np.array), (2**40, np.array), (258, jnp.array)])
@pytest.mark.parametrize("case", CALLS)
def test_ids_outside_the_vocabulary(model, case, wrong, make):
    ids = GOOD.copy()
    ids[1, 2] = wrong
    with pytest.raises(
        DataError, match=rf"^ids\[1, 2\]: {wrong} is outside the model's vocabulary of 258; use 0 to 257"
    ):
        CALLS[case](model, make(ids))


@pytest.mark.parametrize("dtype", [bool, np.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CALLS)
def test_ids_that_are_no_integers(model, case, dtype):
    with pytest.raises(DataError, match=f"^ids: dtype is {np.dtype(dtype).name}; token ids are integers"):
        CALLS[case](model, GOOD.astype(dtype))


def test_any_integers_fit(model):
    expected = model(jnp.array(GOOD))
    for dtype in (np.int64, np.uint16):
        np.testing.assert_array_equal(model(GOOD.astype(dtype)), expected)
    few = model(np.array([[1, 2]], np.uint8))
    np.testing.assert_allclose(few, expected[:1, :2], rtol=1e-4, atol=1e-5)  # another shape is another order of sums


def test_inside_jit_they_give_nan_and_check_ids_finds_them(model):
    for placed in (model, fp8x.sharding.shard(nnx.clone(model), mesh_of(tensor=2))):
        ids = jnp.array([[1, 258], [1, -1], [1, 2]])
        logits = nnx.jit(lambda model, ids: model(ids))(placed, ids)
        assert np.isnan(logits).all(axis=(1, 2)).tolist() == [True, True, False]
        assert np.isfinite(logits[2]).all()
    with pytest.raises(DataError, match=r"rows\[0, 1\]: 258 is outside"):
        model.check_ids(ids, "rows")
    # Types are known there.
    with pytest.raises(DataError, match="ids: dtype is float32"):
        nnx.jit(lambda model, ids: model(ids))(model, ids.astype(float))


def test_calibration_checks_its_batches(model):
    for mesh in (None, mesh_of(data=2)):
        quantized = fp8x.quantize_model(nnx.clone(model), "e4m3_e4m3_bf16")
        fp8x.calibrate(quantized, [GOOD])
        before = jax.tree.map(np.asarray, nnx.state(quantized))
        for batch in (GOOD + 1, (GOOD + 1,)):
            with pytest.raises(DataError, match=r"batches\[1\]\[0, 2\]: 258 is outside the model's vocabulary of 258"):
                fp8x.calibrate(quantized, [GOOD, batch], mesh)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, nnx.state(quantized), before)))


def test_tokens_that_were_added_to_a_tokenizer(model, byte_tokenizer, tmp_path):
    tokenizer = Tokenizer.from_str(byte_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken("<new>")])
    message = "gives token id 258 ('<new>'), beyond the model's vocab_size 258; use the tokenizer of this model"
    with pytest.raises(DataError) as error:
        evaluate(model, tokenizer, ["A <new> token"])
    assert f"tokenizer: {message}" in str(error.value)
    fp8x.save(model, tmp_path / "model")
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "texts.jsonl").write_text('{"text": "A <new> token"}\n')
    model, texts = str(tmp_path / "model"), str(tmp_path / "texts.jsonl")
    for command in (
        ["generate", model, "A <new> token"],
        ["eval", model, "-d", texts],
        ["calibrate", model, texts, "--recipe", "e4m3_e4m3_bf16"],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2 and message in result.stderr, result.output


def test_the_token_before_a_document(model, byte_tokenizer):
    for bos_id in (258, -1):
        with pytest.raises(DataError, match=f"bos_id: {bos_id} is outside the model's vocabulary"):
            evaluate(model, byte_tokenizer, ["text"], bos_id=bos_id)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], r"ids: is of type list; give an array \[B, T\], such as np.array\(\[\[1, 2, 3\]\]\)"),
        ([[1, 2]], r"ids: is of type list; give an array"),
        (((1, 2),), r"ids: is of type tuple"),
        (3, r"ids: is of type int"),
        (np.array([1, 2]), r"ids: shape is \[2\]; give \[B, T\], for one text ids\[None\]"),
        (jnp.array([1, 2]), r"ids: shape is \[2\]; give \[B, T\], for one text ids\[None\]"),
        (np.zeros((1, 2, 3), int), r"ids: shape is \[1, 2, 3\]; give \[B, T\]$"),
    ],
)
def test_what_is_no_batch_of_ids(model, ids, message):
    with pytest.raises(DataError, match=message):
        model(ids)
    with pytest.raises(DataError, match=message):
        model.extend(ids, model.init_cache(1, 4))
    with pytest.raises(DataError, match=message.replace("ids: ", r"batches\[0\]: ", 1)):
        fp8x.calibrate(fp8x.quantize_model(model, "e4m3_e4m3_bf16"), [(ids,)])


def test_no_texts_and_no_tokens(model):
    for shape in ((0, 3), (2, 0), (0, 0)):
        assert model(np.zeros(shape, int)).shape == (*shape, 258)
        hidden, cache = model.extend(np.zeros(shape, int), model.init_cache(shape[0], 3))
        assert hidden.shape == (*shape, 16) and cache.length == shape[1]
