"""Compiled programs that outlive a process."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from typer.testing import CliRunner

import fp8x
from fp8x.cli import app
from fp8x.models import Decoder, DecoderConfig
from fp8x.programs import kept_programs


@pytest.fixture
def no_cache():
    """As in a process of a user who has set up no compilation cache."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def settings() -> dict:
    return {name: value for name, value in jax.config.values.items() if "cache" in name}


def compile_something(number: float) -> None:
    jax.jit(lambda x: x * number)(jnp.ones(3))


def test_programs_are_kept_and_settings_are_not(no_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("FP8X_PROGRAMS", str(tmp_path / "kept"))
    before = settings()
    with kept_programs():
        compile_something(3.25)
    assert list((tmp_path / "kept").glob("*-cache"))
    assert settings() == before
    count = len(list(tmp_path.rglob("*")))
    compile_something(4.25)
    assert len(list(tmp_path.rglob("*"))) == count


def test_a_user_s_own_cache_is_left_alone(no_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("FP8X_PROGRAMS", str(tmp_path / "kept"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with kept_programs():
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("where", ["", "file/below"])
def test_nothing_is_kept_where_it_can_not_be(no_cache, tmp_path, monkeypatch, where):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FP8X_PROGRAMS", where and str(tmp_path / where))
    with kept_programs():
        assert jax.config.jax_compilation_cache_dir is None
        compile_something(5.25)


def test_a_second_command_compiles_nothing(no_cache, tmp_path, monkeypatch, byte_tokenizer):
    """Another prompt of the same class, in what is a new process as far as JAX knows."""
    monkeypatch.setenv("FP8X_PROGRAMS", str(tmp_path / "kept"))
    hf = {"model_type": "llama", "vocab_size": 258, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    hf |= {"num_attention_heads": 2, "num_key_value_heads": 2, "rope_theta": 1e4, "eos_token_id": 257}
    fp8x.save(Decoder(DecoderConfig.from_hf(hf), rngs=nnx.Rngs(0)), tmp_path / "model")
    byte_tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    kept = []
    for prompt, count in (("The file", 3), ("Another one", 4)):
        jax.clear_caches()
        arguments = ["generate", tmp_path / "model", prompt, "-n", count]
        assert CliRunner().invoke(app, [*map(str, arguments)]).exit_code == 0
        kept.append({path.name for path in (tmp_path / "kept").glob("*-cache")})
    assert kept[0] == kept[1] and any("_run" in name for name in kept[0])
