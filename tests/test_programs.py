"""Compiled programs that outlive a process."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

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
