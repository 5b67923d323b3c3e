"""A model reads no more than its context, unless the user says so."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshes import mesh_of
from small import WITH_BYTES
from typer.testing import CliRunner

import fp8x
from fp8x.cli import app
from fp8x.errors import ConfigError, DataError
from fp8x.models import Decoder, DecoderConfig, generate, stream
from fp8x.models.evaluate import evaluate

LLAMA = WITH_BYTES | {"max_position_embeddings": 8}
LONG = np.zeros((1, 9), np.int32)


@pytest.fixture
def model():
    return Decoder(DecoderConfig.from_hf(LLAMA), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("positions", "scaling", "expected"),
    [
        (None, None, None),
        (4096, None, 4096),
        (4096, {"type": "linear", "factor": 4.0}, 16384),  # lmsys/vicuna-13b-v1.5-16k
        (  # meta-llama/Llama-3.1-8B: what is stretched already
            131072,
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            131072,
        ),
        # As Qwen/Qwen2.5-7B-Instruct's page has it: what was before ...
        (32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        # ... and deepseek-ai/DeepSeek-V3: what came of it.
        (163840, {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),
        (32768, {"type": "yarn", "factor": 2.0}, 65536),
        (None, {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 100}, 200),
    ],
)
def test_the_context_of_config_json(positions, scaling, expected):
    hf = LLAMA | {"max_position_embeddings": positions, "rope_scaling": scaling}
    assert DecoderConfig.from_hf(hf).context == expected


def test_a_sliding_window_is_no_limit():
    hf = LLAMA | {"model_type": "mistral", "sliding_window": 4}
    assert DecoderConfig.from_hf(hf).context == 8


CALLS = {
    "called": (lambda model: model(LONG), "ids: 9 tokens"),
    "compiled": (lambda model: nnx.jit(lambda model, ids: model(ids))(model, LONG), "ids: 9 tokens"),
    "closed over": (lambda model: jax.jit(lambda ids: model(ids))(LONG), "ids: 9 tokens"),
    "init_cache": (lambda model: model.init_cache(1, 9), "capacity: 9 tokens"),
    "generate": (lambda model: generate(model, [[1, 2, 3]], max_new_tokens=6), "max_new_tokens: 6 after .* 3 .* are 9"),
    "stream": (lambda model: stream(model, LONG, max_new_tokens=1), "max_new_tokens: 1 after a prompt of 9 .* are 10"),
    "calibrate": (
        lambda model: fp8x.calibrate(fp8x.quantize_model(model, "e4m3_e4m3_bf16"), [LONG]),
        r"batches\[0\]: 9 tokens",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_more_than_the_context_is_an_error(model, case):
    call, message = CALLS[case]
    with pytest.raises(DataError, match=f"{message}.*, but the model's context is 8.*set_context\\((9|10)\\)"):
        call(model)


def test_generate_says_what_fits(model):
    with pytest.raises(DataError, match=r"; use 5 at most; to go beyond it, say so with model.set_context\(9\)"):
        generate(model, [[1], [1, 2, 3]], max_new_tokens=6)
    with pytest.raises(DataError, match=r"; give a shorter prompt; "):
        generate(model, LONG, max_new_tokens=1)


def test_windows_of_an_evaluation(model, byte_tokenizer):
    with pytest.raises(DataError, match=r"context: 9 tokens, but the model's context is 8"):
        evaluate(model, byte_tokenizer, ["text"], context=9)


def test_on_a_mesh(model):
    model = fp8x.sharding.shard(model, mesh_of(data=2))
    with pytest.raises(DataError, match="ids: 9 tokens"):
        model(LONG.repeat(2, axis=0))
    with pytest.raises(DataError, match="capacity: 9 tokens"):
        model.init_cache(2, 9)
    model.set_context(9)
    assert model(LONG.repeat(2, axis=0)).shape == (2, 9, 258)


def test_a_user_may_mean_it(model, byte_tokenizer):
    # Positions have no table: a model of a larger context has the same numbers.
    larger = Decoder(dataclasses.replace(model.config, context=64), rngs=nnx.Rngs(0))
    for context in (9, None, np.int64(10)):
        model.set_context(context)
        np.testing.assert_array_equal(model(LONG), larger(LONG))
    assert generate(model, LONG, max_new_tokens=1).shape == (1, 10)
    assert evaluate(model, byte_tokenizer, ["text"], context=10).tokens == 4
    model.set_context(3)
    with pytest.raises(DataError, match="context is 3"):
        model(LONG[:, :4])
    assert nnx.clone(model).config.context == 3
    for wrong in (0, 1.5, "9"):
        with pytest.raises(ConfigError, match=f"tokens: {wrong!r} does not fit; use a positive integer, or None"):
            model.set_context(wrong)


def test_a_cache_has_room(model):
    cache = model.init_cache(2, 4)
    ids = jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(DataError, match=r"cache: it is of 2 texts, but ids are of 1"):
        model.extend(ids[:1], cache)
    with pytest.raises(DataError, match=r"room for 4 tokens, of which 0 are taken, and ids are 5 more; .*\(2, 5\)"):
        model.extend(jnp.zeros((2, 5), jnp.int32), cache)
    with pytest.raises(DataError, match="room for 4 tokens"):
        jax.jit(model.extend)(jnp.zeros((2, 5), jnp.int32), cache)
    for lengths, taken in ((None, 3), (jnp.array([1, 2]), 2)):
        _, after = model.extend(ids, cache, lengths)
        with pytest.raises(DataError, match=rf"of which {taken} are taken, and ids are 3 more; .*\(2, {taken + 3}\)"):
            model.extend(ids, after)


def test_commands(model, tmp_path, byte_tokenizer):
    path, texts = tmp_path / "model", tmp_path / "texts.jsonl"
    fp8x.save(model, path)
    byte_tokenizer.save(str(path / "tokenizer.json"))
    texts.write_text(json.dumps({"text": "Some words. " * 8}) + "\n")
    commands = [
        (("generate", path, "Some", "-n", 5), 9),
        (("calibrate", path, texts, "--recipe", "e4m3_e4m3_bf16", "--max-length", 9, "--num-samples", 1), 9),
    ]
    for command, length in commands:
        failed = CliRunner().invoke(app, [*map(str, command)])
        message = f"but the model's context is 8, .* --context {length} of a command"
        assert failed.exit_code == 2 and re.search(message, failed.stderr), failed.output
        done = CliRunner().invoke(app, [*map(str, command), "--context", str(length)])
        assert done.exit_code == 0, done.output
        assert f"--context {length}: model was made for 8 tokens" in done.stderr
    evaluated = CliRunner().invoke(app, ["eval", str(path), "-d", str(texts), "--context", "9", "--json"])
    assert "was made for 8 tokens" in evaluated.stderr and json.loads(evaluated.stdout)["context"] == 9
