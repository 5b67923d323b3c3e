import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8x
from fp8x.models import Decoder, DecoderConfig


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def test_logits_are_those_of_transformers(golden, run):
    ids, expected = golden.tensors["ids"], golden.tensors["logits_f32"]
    logits = run(golden.model_f32, ids)
    assert logits.dtype == jnp.float32
    # Measured: 5e-6 of the deviation. Sums in another order are all that differs.
    assert np.abs(logits - expected).max() < 5e-5 * expected.std()


def test_logits_in_the_checkpoints_type_are_as_near_as_its_rounding_allows(golden, run):
    """In bf16 both frameworks round after every operation, but not in the same places.

    How much that moves logits is seen in transformers itself, in bf16 and in float32; two independent roundings
    differ by the square root of two as much.
    """
    model = golden.model
    logits = run(model, golden.tensors["ids"])
    assert logits.dtype == jnp.float32
    expected = golden.tensors["logits"]
    rounding = rms(expected - golden.tensors["logits_f32"])
    assert rms(logits - expected) < 1.5 * rounding + 1e-5 * expected.std()


def test_every_tensor_has_the_type_of_the_config(golden):
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(golden.model))}
    assert dtypes == {jnp.dtype(golden.hf.get("dtype", golden.hf.get("torch_dtype")))}


@pytest.mark.sample
def test_reading_token_by_token_is_reading_at_once(golden):
    np.testing.assert_allclose(golden.logits_in_pieces(), golden.tensors["logits_f32"], atol=1e-4)


def test_a_token_sees_only_what_is_before_it(golden, run):
    model, ids = golden.model_f32, golden.tensors["ids"]
    changed = np.array(ids)
    changed[:, 7] = (changed[:, 7] + 1) % golden.hf["vocab_size"]
    before, after = (np.asarray(run(model, x)) for x in (ids, changed))
    np.testing.assert_allclose(before[:, :7], after[:, :7], atol=1e-5)
    assert (np.abs(before[:, 7] - after[:, 7]).max(axis=-1) > 0.1).all()


@pytest.mark.slow
def test_a_sliding_window_ends_what_a_token_sees(qwen, run):
    """One layer and a window of 6: token 11 sees tokens 6 to 11."""
    one_layer = DecoderConfig.from_hf(qwen.hf | {"num_hidden_layers": 1})
    model, ids = Decoder(one_layer, rngs=nnx.Rngs(0), param_dtype=jnp.float32), qwen.tensors["ids"]
    logits = run(model, ids)[:, 11]
    for position, is_seen in [(5, False), (6, True)]:
        changed = np.array(ids)
        changed[:, position] = (changed[:, position] + 1) % one_layer.vocab_size
        assert bool(jnp.any(run(model, changed)[:, 11] != logits)) == is_seen


def test_decoder_runs_under_jit_over_its_state(qwen, run):
    model, ids = qwen.model_f32, qwen.tensors["ids"]
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids)
    np.testing.assert_allclose(logits, run(model, ids), atol=1e-5)


def test_eval_shape_makes_no_array(qwen):
    model = nnx.eval_shape(lambda: Decoder(DecoderConfig.from_hf(qwen.hf), rngs=nnx.Rngs(0)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))
    assert model.layers[1].mlp.w13.weight.shape == (6, 2, 96, 32)
    assert model.layers[0].mlp.gate_proj.kernel.shape == (32, 64)


@pytest.mark.slow
def test_gradients_reach_every_parameter(qwen):
    for path, leaf in nnx.to_flat_state(qwen.gradient()):
        assert jnp.all(jnp.isfinite(leaf[...])), path
        # A key's bias moves all scores of a query alike but for the rotation, so its gradient is small, not zero.
        assert jnp.any(leaf[...] != 0), path


@pytest.mark.sample
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_everything_is_computed_in_the_parameters_type(qwen, dtype):
    model = nnx.eval_shape(lambda: Decoder(DecoderConfig.from_hf(qwen.hf), rngs=nnx.Rngs(0), param_dtype=dtype))
    ids = qwen.tensors["ids"]
    hidden, cache = nnx.eval_shape(lambda model: model.extend(ids, model.init_cache(*ids.shape)), model)
    assert {leaf.dtype for leaf in jax.tree.leaves((hidden, cache.layers))} == {jnp.dtype(dtype)}
    assert nnx.eval_shape(lambda model: model(ids), model).dtype == jnp.float32


def test_tied_models_have_no_head(golden):
    model = golden.model
    assert (model.lm_head is None) == golden.hf["tie_word_embeddings"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["e4m3_bf16", "e4m3_e4m3_f16_dynamic"])
def test_a_quantized_decoder_reads_token_by_token_as_at_once(qwen, recipe, run):
    """Layers that answer in their recipe's type leave the residual stream and the cache in the model's."""
    model = fp8x.quantize_model(nnx.clone(qwen.model_f32), recipe)
    ids, extend = jnp.asarray(qwen.tensors["ids"]), nnx.jit(Decoder.extend)
    hidden, cache = extend(model, ids[:, :8], model.init_cache(*ids.shape))
    assert {leaf.dtype for leaf in jax.tree.leaves((hidden, cache.layers))} == {jnp.dtype(jnp.float32)}
    rest, _ = extend(model, ids[:, 8:], cache)
    logits = model.logits(jnp.concatenate([hidden, rest], axis=1))
    at_once = run(model, ids)
    np.testing.assert_allclose(logits, at_once, atol=0.02 * float(at_once.std()))
    assert rms(at_once - qwen.tensors["logits_f32"]) < 0.2 * qwen.tensors["logits_f32"].std()
