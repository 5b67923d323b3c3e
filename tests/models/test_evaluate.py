"""Bits per byte and perplexity against the rule written out in numpy."""

import dataclasses
import math

import numpy as np
import pytest
from flax import nnx

import fp8x
from fp8x.errors import CalibrationError, ConfigError, DataError
from fp8x.models import Decoder, DecoderConfig
from fp8x.models import evaluate as module
from fp8x.models.evaluate import default_context, evaluate, first_token

CONFIG = DecoderConfig.from_hf(
    {
        "model_type": "mixtral",
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
)
TEXTS = ["The quick brown fox jumps over the lazy dog.", "é", "", "A second, longer document about foxes. " * 3]


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


def by_the_rule(model, tokenizer, texts, context):
    """Nats and tokens, one window at a time, in float64."""
    call = nnx.jit(lambda model, ids: model(ids))
    nats, tokens = 0.0, 0
    for text in texts:
        ids = [256, *tokenizer.encode(text).ids]
        for start in range(0, len(ids) - 1, context):
            window = ids[start : start + context + 1]
            # Zeros behind the window change nothing before them, and keep one shape.
            row = window[:-1] + [0] * (context - len(window) + 1)
            logits = np.asarray(call(model, np.array([row], np.int32))[0], np.float64)[: len(window) - 1]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nats -= log_p[np.arange(len(window) - 1), window[1:]].sum()
            tokens += len(window) - 1
    return nats, tokens


@pytest.mark.sample
@pytest.mark.parametrize("context", [7, 44, 200])
def test_the_rule(model, byte_tokenizer, context):
    nats, tokens = by_the_rule(model, byte_tokenizer, TEXTS, context)
    found = evaluate(model, byte_tokenizer, TEXTS, context=context, batch_size=3)
    size = sum(len(text.encode()) for text in TEXTS)
    assert found.tokens == tokens == size == found.bytes  # a token a byte
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)


@pytest.mark.slow
def test_batch_size_changes_nothing(model, byte_tokenizer):
    first, second = (evaluate(model, byte_tokenizer, TEXTS, context=16, batch_size=b) for b in (1, 64))
    assert first.bits_per_byte == pytest.approx(second.bits_per_byte, rel=1e-6)


def test_one_shape_is_compiled(model, byte_tokenizer, monkeypatch):
    shapes = set()

    def record(model, inputs, targets):
        shapes.add((inputs.shape, targets.shape))
        return np.zeros(len(inputs))

    monkeypatch.setattr(module, "_negative_log_likelihood", record)
    done = []
    evaluate(model, byte_tokenizer, TEXTS, context=16, batch_size=4, progress=lambda *p: done.append(p))
    assert shapes == {((4, 16), (4, 16))}
    assert done == [(4, 12), (8, 12), (12, 12)]


def test_a_quantized_model(model, byte_tokenizer):
    quantized = fp8x.quantize_model(nnx.clone(model), "e4m3_e4m3_bf16_dynamic")
    reference = evaluate(model, byte_tokenizer, TEXTS, context=32)
    found = evaluate(quantized, byte_tokenizer, TEXTS, context=32)
    assert found.bits_per_byte == pytest.approx(reference.bits_per_byte, rel=0.02)
    assert found.bits_per_byte != reference.bits_per_byte


def test_nothing_to_predict(model, byte_tokenizer):
    with pytest.raises(DataError, match="1 documents hold no token"):
        evaluate(model, byte_tokenizer, [""])


def test_documents_of_ids_have_no_bytes(model, byte_tokenizer):
    with pytest.raises(DataError, match="bits per byte needs its text"):
        evaluate(model, byte_tokenizer, [[1, 2]])


def test_a_foreign_tokenizer(byte_tokenizer):
    # The error comes before any weight is used.
    small = nnx.eval_shape(lambda: Decoder(dataclasses.replace(CONFIG, vocab_size=64), rngs=nnx.Rngs(0)))
    with pytest.raises(DataError, match="beyond the model's vocab_size 64"):
        evaluate(small, byte_tokenizer, ["zebra"], bos_id=0)


def test_the_first_token():
    without_bos = {k: v for k, v in CONFIG.hf.items() if k != "bos_token_id"}
    config = dataclasses.replace(CONFIG, hf=without_bos)
    assert first_token(CONFIG) == 256 and first_token(config) == 257
    with pytest.raises(ConfigError, match="bos_token_id is None"):
        first_token(dataclasses.replace(config, eos_token_id=()))
    with pytest.raises(ConfigError, match="bos_token_id is 258"):
        first_token(dataclasses.replace(config, hf={"bos_token_id": 258}))


def test_default_context():
    sizes = {None: 2048, 64: 64, 131072: 2048}
    for given, expected in sizes.items():
        assert default_context(dataclasses.replace(CONFIG, context=given)) == expected


def test_an_uncalibrated_model_is_refused(tiny_checkpoint, byte_tokenizer):
    model = fp8x.load(tiny_checkpoint, "e4m3_e4m3_bf16")
    with pytest.raises(CalibrationError, match=r"layers.0.mlp.w13, .* not calibrated; run fp8x.calibrate"):
        evaluate(model, byte_tokenizer, ["text"])
